"""One style for every figure, and the figure of one utterance at several λ.

The same thing has the same colour everywhere (from Okabe and Ito's palette, safe for the colour-blind).

"""

import matplotlib
import matplotlib.pyplot as plt
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
    """Draw one utterance, waveform (samples,): its sound, log-mel spectrogram, and at each λ its α′ and fire times."""
    seconds = len(waveform) / SAMPLE_RATE
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)(
        waveform
    )  # (80, frames)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 + len(lams),
            1,
            figsize=(11, 4 + 1.6 * len(lams)),
            sharex=True,
            layout="constrained",
            height_ratios=[0.8, 1.4] + [1] * len(lams),
        )
        axes[0].plot(
            torch.arange(len(waveform)) / SAMPLE_RATE,
            waveform,
            color=COLOURS["waveform"],
            linewidth=0.5,
        )
        axes[0].set(title=f"“{text}”" if text else "", ylabel="waveform", yticks=[])
        axes[1].imshow(
            (mel + 1e-6).log(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(0, seconds, 0, 80),
            vmin=-10,
        )
        axes[1].set(ylabel="mel channel", yticks=[0, 40, 80])
        for axis, lam in zip(axes[2:], lams):
            out = encoder(waveform[None], lam=lam)
            alpha = out.fired.alpha[0]
            times = out.fired.fire_times[0] * FRAME_MS / 1000
            axis.vlines(times, 0, 1, color=COLOURS["fire"], linewidth=1.5, label="a token fires")
            axis.stairs(
                alpha,
                torch.arange(len(alpha) + 1) * FRAME_MS / 1000,
                fill=True,
                color=COLOURS["alpha"],
                alpha=0.7,
                label="α′ of each frame",
            )
            axis.set(
                title=f"λ = {lam:.2f}: {len(times)} tokens, one every {out.frame_period():.0f} ms",
                ylabel="α′",
                ylim=(0, 1.05),
            )
        axes[2].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
        axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
        figure.savefig(path)
        plt.close(figure)
