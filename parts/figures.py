"""One style for every figure; figures of one utterance at several λ, of two rulers, of texts.

The same thing has the same colour everywhere. The colours are Okabe and Ito's palette, which
colour-blind readers can tell apart.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio

from ofa_encoder import FRAME_MS, SAMPLE_RATE

COLOURS = {
    "waveform": "#555555",
    "alpha": "#0072B2",
    "fire": "#D55E00",
    "ofa": "#009E73",
    "peer": "#000000",
    "learned": "#CC79A7",
    "logmel": "#E69F00",
    "random": "#56B4E9",
    "deaf": "#999999",
    "starts": ["#CC79A7", "#0072B2", "#E69F00"],
}
QUIET = -10  # of a log-mel spectrogram: what is below is drawn in the darkest colour
STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "legend.frameon": False,
}


@torch.no_grad()
def utterance_figure(encoder, waveform, text, lams, path):
    """Draw one utterance: its sound, and for each λ its tokens on the log-mel spectrogram and α′.

    waveform (samples,) at 16 kHz, on the encoder's device, the CPU; text: its title; lams: a list
    of λ; path: of the image.
    """
    seconds = len(waveform) / SAMPLE_RATE
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1 + 2 * len(lams),
            1,
            figsize=(11, 1.2 + 2.4 * len(lams)),
            sharex=True,
            layout="constrained",
            height_ratios=[0.7] + [1.4, 0.6] * len(lams),
        )
        draw_waveform(axes[0], waveform)
        axes[0].set(title=f"“{text}”" if text else "")
        for above, below, lam in zip(axes[1::2], axes[2::2], lams):
            out = encoder(waveform[None], lam=lam)
            draw_spectrogram(above, waveform)
            draw_edges(above, out)
            draw_alpha(below, out)
            period = f"one every {out.frame_period():.0f} ms"
            above.set(title=f"λ = {lam:.2f}: {out.lengths.item()} tokens, {period}")
        axes[1].set_title("orange: a token ends", loc="right", color=COLOURS["fire"])
        axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
        figure.savefig(path)
        plt.close(figure)


def draw_waveform(axis, waveform):
    """waveform: (samples,) at 16 kHz."""
    times = np.arange(len(waveform)) / SAMPLE_RATE
    axis.plot(times, waveform.numpy(), color=COLOURS["waveform"], linewidth=0.5)
    axis.set(ylabel="sound", yticks=[])


def log_mel(waveform):
    """The log-mel spectrogram of a waveform (samples,) at 16 kHz: (80, samples // 160 + 1).

    From low to high. The middle of column k lies at k · 10 ms.
    """
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)
    return (mel(waveform) + 1e-6).log()


def draw_spectrogram(axis, waveform):
    """The log-mel spectrogram of a waveform (samples,) at 16 kHz."""
    axis.imshow(
        log_mel(waveform).numpy(),
        origin="lower",
        aspect="auto",
        cmap="gray_r",
        extent=(0, len(waveform) / SAMPLE_RATE, 0, 80),
        vmin=QUIET,
    )
    axis.set(ylabel="mel", yticks=[])


def draw_edges(axis, out):
    """A line where each token of an `Encoded` of one utterance fires."""
    times = out.fired.fire_times[0].numpy() * FRAME_MS / 1000  # (T,) in seconds
    axis.vlines(times, *axis.get_ylim(), color=COLOURS["fire"], linewidth=1.2)


def draw_alpha(axis, out):
    """α′ of each frame of an `Encoded` of one utterance."""
    alpha = out.fired.alpha[0].numpy()  # (S,)
    edges = np.arange(len(alpha) + 1) * FRAME_MS / 1000  # of the frames, in seconds
    axis.stairs(alpha, edges, fill=True, color=COLOURS["alpha"], alpha=0.7)
    axis.set(ylabel="α′", ylim=(0, 1.05), yticks=[0, 1])


def rulers_figure(alpha, fired):
    """CIF as two rulers on one line: the marks of frames and of tokens cut it into pieces.

    alpha: (1, S), of few frames; fired: what `cif` makes of it. Returns the figure.
    """
    figure, axis = plt.subplots(figsize=(10, 2.9), layout="constrained")

    # The upper ruler: frames.
    white = {"color": "white", "edgecolor": COLOURS["alpha"], "linewidth": 2}
    left = 0.0
    for s, width in enumerate(alpha[0].tolist()):
        axis.barh(1, width, left=left, height=0.5, **white)
        axis.text(left + width / 2, 1, f"frame {s + 1}\nα = {width:g}", ha="center", va="center")
        left += width
    total = left

    # The lower one: pieces, in the colour of their token.
    colours = [COLOURS["logmel"], COLOURS["random"], COLOURS["ofa"]]
    left = 0.0
    for token, width in zip(fired.token[0].tolist(), fired.width[0].tolist()):
        axis.barh(0, width, left=left, height=0.5, color=colours[token % 3], edgecolor="black")
        if width > 0:
            axis.text(left + width / 2, 0, f"{width:g}", ha="center", va="center")
        left += width

    for t in range(1, int(total) + 1):
        axis.plot([t, t], [-0.4, 1.4], color=COLOURS["fire"], linewidth=2)
        axis.text(t, 1.5, f"token {t} fires", color=COLOURS["fire"], ha="center")
    axis.set(xlabel="running total of α", xlim=(0, total + 0.02), ylim=(-0.4, 1.8))
    axis.set_yticks([0, 1], ["pieces", "frames"])
    axis.spines["left"].set_visible(False)
    return figure


def align(wanted, predicted) -> list[tuple]:
    """Pairs (unit of wanted, unit of predicted) by the fewest edits, None where one has nothing.

    wanted, predicted: strings, or lists of words. The pairs that are not equal are the errors that
    CER and WER count.
    """
    rows = len(wanted) + 1
    columns = len(predicted) + 1
    edits = np.zeros((rows, columns), int)  # from the first n units to the first m
    edits[:, 0] = np.arange(rows)
    edits[0] = np.arange(columns)
    for n in range(1, rows):
        for m in range(1, columns):
            replaced = edits[n - 1, m - 1] + (wanted[n - 1] != predicted[m - 1])
            edits[n, m] = min(replaced, edits[n - 1, m] + 1, edits[n, m - 1] + 1)

    # Go back from the end by the way that led there.
    pairs = []
    n = len(wanted)
    m = len(predicted)
    while n or m:
        differ = n == 0 or m == 0 or wanted[n - 1] != predicted[m - 1]
        if n and m and edits[n, m] == edits[n - 1, m - 1] + differ:
            n -= 1
            m -= 1
            pairs.append((wanted[n], predicted[m]))
        elif n and edits[n, m] == edits[n - 1, m] + 1:
            n -= 1
            pairs.append((wanted[n], None))
        else:
            m -= 1
            pairs.append((None, predicted[m]))
    return pairs[::-1]


def texts_figure(examples, words=False):
    """What was wanted, and below it what was predicted instead. Returns the figure.

    examples: for each utterance {name of the row: text}, first what was wanted. words: compare word
    by word instead of letter by letter. Errors are orange, a dot stands for a letter that is
    missing, and ␣ for a wrong space.
    """
    rows = sum(len(example) + 1 for example in examples)
    figure, axis = plt.subplots(figsize=(11, 0.34 * rows), layout="constrained")
    longest = 45
    y = 0
    for example in examples:
        wanted = next(iter(example.values()))
        for name, text in example.items():
            axis.text(-7, y, name, color=COLOURS["waveform"])
            if words:
                pairs = align(wanted.split(), text.split())
            else:
                pairs = align(wanted, text)
            longest = max(longest, write_pairs(axis, y, pairs, " " if words else ""))
            y -= 1
        y -= 1
    axis.set(xlim=(-7, longest), ylim=(y + 1, 1))
    axis.axis("off")
    return figure


def write_pairs(axis, y, pairs, after):
    """A line of text at height y, a letter at each whole x; after: what follows each pair.

    Returns how many letters it has.
    """
    column = 0
    for wanted, predicted in pairs:
        shown = "·" * len(wanted) if predicted is None else predicted
        style = {"color": "black"}
        if wanted != predicted:
            shown = shown.replace(" ", "␣")
            style = {"color": COLOURS["fire"], "weight": "bold"}
        for letter in shown + after:
            axis.text(column, y, letter, family="monospace", fontsize=15, **style)
            column += 1
    return column
