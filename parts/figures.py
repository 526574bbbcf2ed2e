"""One style for every figure, and the figure of one utterance at several λ.

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
    """Draw one utterance: its sound, its log-mel spectrogram, and α′ and fire times at each λ.

    waveform (samples,) at 16 kHz, on the encoder's device, the CPU; text: its title; lams: a list
    of λ; path: of the image.
    """
    seconds = len(waveform) / SAMPLE_RATE
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 + len(lams),
            1,
            figsize=(11, 4 + 1.6 * len(lams)),
            sharex=True,
            layout="constrained",
            height_ratios=[0.8, 1.4] + [1] * len(lams),
        )
        draw_sound(axes[0], axes[1], waveform)
        axes[0].set(title=f"“{text}”" if text else "")
        for axis, lam in zip(axes[2:], lams):
            out = encoder(waveform[None], lam=lam)
            draw_tokens(axis, out)
            period = f"one every {out.frame_period():.0f} ms"
            axis.set(title=f"λ = {lam:.2f}: {out.lengths.item()} tokens, {period}")
        axes[2].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
        axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
        figure.savefig(path)
        plt.close(figure)


def draw_sound(above, below, waveform):
    """The waveform (samples,) on the axis above, and its log-mel spectrogram on the one below."""
    seconds = len(waveform) / SAMPLE_RATE
    times = np.arange(len(waveform)) / SAMPLE_RATE
    above.plot(times, waveform.numpy(), color=COLOURS["waveform"], linewidth=0.5)
    above.set(ylabel="waveform", yticks=[])
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)
    below.imshow(
        (mel(waveform) + 1e-6).log().numpy(),  # (80, frames of 10 ms)
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, seconds, 0, 80),
        vmin=-10,
    )
    below.set(ylabel="mel channel", yticks=[0, 40, 80])


def draw_tokens(axis, out):
    """α′ of each frame and the fire times of an `Encoded` of one utterance."""
    alpha = out.fired.alpha[0].numpy()  # (S,)
    edges = np.arange(len(alpha) + 1) * FRAME_MS / 1000  # of the frames, in seconds
    times = out.fired.fire_times[0].numpy() * FRAME_MS / 1000  # (T,)
    axis.vlines(times, 0, 1, color=COLOURS["fire"], linewidth=1.5, label="a token fires")
    axis.stairs(
        alpha,
        edges,
        fill=True,
        color=COLOURS["alpha"],
        alpha=0.7,
        label="α′ of each frame",
    )
    axis.set(ylabel="α′", ylim=(0, 1.05))
