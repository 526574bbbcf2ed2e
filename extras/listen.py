"""A page that plays: move λ, see the tokens change, and listen to each.

    python -m extras.listen checkpoints/segments-tiny.pt docs/listen.html
    python -m extras.listen checkpoints/ofa-tiny.pt mine.html my.wav another.flac

The page is one HTML file that any browser opens, without a network and without Python: sound,
spectrograms and the α of each frame lie in it. α does not depend on λ, so the browser can do the
rest by itself, α → α′ → CIF, in some seventy lines of JavaScript in listen_template.html, under the
names of cif.py and ofa_encoder.py. tests/test_listen.py compares them with these.

In a notebook:

    from IPython.display import HTML
    from extras.listen import frame, prompt

    HTML(frame(encoder, [prompt(speech, 0)]))

The page has no tokens' vectors, only where they begin and end.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image  # matplotlib brings it
from torch import Tensor

from ofa_encoder import FRAME_MS, SAMPLE_RATE, OFAEncoder, segment_ends
from parts.data import Speech, load, read_sound
from parts.figures import QUIET, log_mel
from parts.runs import atomic_write

TEMPLATE = Path(__file__).with_name("listen_template.html")

# Prompts that the encoder has not heard: one in three languages, and a longer one.
PROMPTS = ("en/vm-next", "en/vm-invalidpassword", "fr/vm-next", "it/vm-next")
MAX_SECONDS = 20  # of a file: at λ = 0 that makes 1,000 tokens to click on

# The embedded corpus: a language, who speaks, and under which licence.
LICENCES = {
    "CC BY-SA 3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
}
CREDITS = {
    "en": ("English", "Allison Smith", "CC BY-SA 3.0"),
    "es": ("Spanish", "Allison Smith", "CC BY-SA 3.0"),
    "fr": ("French", "June Wallack", "CC BY-SA 3.0"),
    "it": ("Italian", "Carlo Flora", "CC BY 3.0"),
    "ru": ("Russian", "provided by Maxim Topal, ivrvoice.ru", "CC BY 3.0"),
}


# 1. What a page is made of.


class Clip(NamedTuple):
    """An utterance to listen to."""

    waveform: Tensor  # (samples,) at 16 kHz
    text: str  # its words, or what else to call it
    language: str = ""  # a key of CREDITS, for a prompt of the embedded corpus


def prompt(speech: Speech, i: int) -> Clip:
    """Utterance i of the embedded corpus, or of a part of it."""
    utterance = speech.utterances[i]
    return Clip(speech[i], utterance.text, utterance.language)


def chosen_prompts() -> list[Clip]:
    """PROMPTS. Raises ValueError or OSError as `load` does."""
    speech = load("asterisk").part("test")
    numbers = {utterance.id: i for i, utterance in enumerate(speech.utterances)}
    return [prompt(speech, numbers[id]) for id in PROMPTS]


def recordings(paths) -> list[Clip]:
    """Sound files of any format and rate. Raises ValueError that names one that can't be used."""
    clips = [Clip(read_sound(path), Path(path).name) for path in paths]
    for path, clip in zip(paths, clips):
        seconds = len(clip.waveform) / SAMPLE_RATE
        if seconds > MAX_SECONDS:
            raise ValueError(f"{path}: {seconds:.2f} s, expected at most {MAX_SECONDS}: cut it")
    return clips


# 2. The page.


def page(encoder: OFAEncoder, clips: list[Clip], inline=False, checkpoint="an encoder") -> str:
    """The page as HTML.

    encoder: in eval mode, on the CPU, with a λ to move. inline: without title and explanations.
    checkpoint: what to call the encoder. Raises ValueError for a fixed-rate peer.
    """
    config = encoder.config
    if config.compression != "cif":
        raise ValueError(
            f"this encoder has one fixed rate ({config.compression}), and no λ to move: "
            "give one with compression cif, such as checkpoints/ofa-tiny.pt"
        )
    data = {
        "mean_alpha": encoder.mean_alpha.item(),
        "utterances": [embed(encoder, clip) for clip in clips],
    }
    content = {
        "__CLASSES__": f"{config.alpha} inline" if inline else config.alpha,
        "__CREDITS__": credits(clips),
        "__CHECKPOINT__": html.escape(str(checkpoint)),
        # A transcript must not end the script element in which it stands.
        "__DATA__": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in content.items():
        text = text.replace(name, value)
    return text


def frame(encoder: OFAEncoder, clips: list[Clip]) -> str:
    """The page for a notebook: HTML of a frame that holds it, apart from the notebook's styles."""
    text = html.escape(page(encoder, clips, inline=True))
    return (
        '<div><iframe title="Listen to tokens" style="width: 100%; height: 56rem; border: 0" '
        f'srcdoc="{text}"></iframe></div>'
    )


@torch.no_grad()
def embed(encoder, clip) -> dict:
    """What the page holds of an utterance of S frames.

    alpha: as many digits as Python would print, so that the browser computes with the same numbers.
    ends: where segments end, or None where α was regressed. pcm: sound as 16-bit samples. mel: its
    spectrogram as a PNG image of 2 S + 1 columns.
    """
    out = encoder(clip.waveform[None])
    if encoder.config.alpha == "segments":
        ends = segment_ends(out.predicted, out.frames, encoder.end_threshold)[0].tolist()
    else:
        ends = None

    # The CNN makes whole frames. What little sound follows the last one belongs to no token.
    waveform = clip.waveform[: out.frames.item() * SAMPLE_RATE * FRAME_MS // 1000]
    pcm = (waveform * 32768).round().clamp(-32768, 32767).numpy().astype("<i2")
    seconds = f"{len(waveform) / SAMPLE_RATE:.1f} s"
    known = clip.language in CREDITS
    return {
        "text": clip.text,
        "language": clip.language,
        "about": f"{CREDITS[clip.language][0]}, {seconds}" if known else seconds,
        "alpha": out.alpha[0].tolist(),
        "ends": ends,
        "pcm": base64.b64encode(pcm.tobytes()).decode(),
        "mel": "data:image/png;base64," + base64.b64encode(spectrogram(waveform)).decode(),
    }


def spectrogram(waveform) -> bytes:
    """The log-mel spectrogram of waveform (samples,), a pixel for each number, as a PNG image."""
    mel = log_mel(waveform).flip(0)  # (80, columns), now from high to low
    levels = 255 * (mel - QUIET) / (mel.max() - QUIET).clamp(min=1)
    image = Image.fromarray(levels.clamp(0, 255).byte().numpy())
    palette = matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3]
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return file.getvalue()


def credits(clips) -> str:
    """Who speaks the prompts among these clips, as HTML; "" if none is a prompt."""
    languages = dict.fromkeys(clip.language for clip in clips if clip.language in CREDITS)
    if not languages:
        return ""
    voices = []
    for language in languages:
        name, who, licence = CREDITS[language]
        voices.append(f'{name}: {who} (<a href="{LICENCES[licence]}">{licence}</a>)')
    return (
        "<p>Voice prompts of the Asterisk telephone exchange, from Debian’s asterisk-core-sounds "
        f"1.6.1, decoded and trimmed. {'; '.join(voices)}.</p>"
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.listen",
        description="A page that plays: move λ, see the tokens change, and listen to each.",
    )
    add = parser.add_argument
    add("checkpoint", help="encoder of pretrain.py, such as checkpoints/segments-tiny.pt")
    add("out", help="file for the page, such as docs/listen.html")
    add("files", nargs="*", help="sound files; default: four prompts of the embedded corpus")
    args = parser.parse_args()
    encoder = OFAEncoder.from_checkpoint(args.checkpoint)
    clips = recordings(args.files) if args.files else chosen_prompts()
    text = page(encoder, clips, checkpoint=args.checkpoint)
    with atomic_write(args.out) as file:
        file.write(text.encode())
    print(f"{args.out}: {len(clips)} utterances, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"listen.py: {error}")
