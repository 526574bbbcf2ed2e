"""The two pictures of README: tokens on the sound of one prompt, and the two rulers of CIF.

python -m extras.pictures       writes docs/segments.png and docs/rulers.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

from cif import cif
from ofa_encoder import OFAEncoder
from parts.data import load
from parts.figures import STYLE, rulers_figure, utterance_figure

PROMPT = "en/call-fwd-unconditional"  # of the embedded corpus, not heard in pre-training


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.pictures",
        description="Draw the two pictures of README.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", default="checkpoints/segments-tiny.pt", help="of pretrain.py")
    add("out", nargs="?", default="docs", help="folder of the pictures")
    add("--root", default="data", help="folder of the embedded corpus")
    args = parser.parse_args()
    encoder = OFAEncoder.from_checkpoint(args.checkpoint)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    speech = load("asterisk", args.root)
    index = next(i for i, u in enumerate(speech.utterances) if u.id == PROMPT)
    lams = [encoder.lam_for(ms) for ms in (25, 50, 90)]
    text = speech.utterances[index].text
    utterance_figure(encoder, speech[index], text, lams, out / "segments.png")

    with matplotlib.rc_context(STYLE):
        alpha = torch.tensor([[0.5, 0.75, 0.5, 0.25, 0.75]])  # README's example
        figure = rulers_figure(alpha, cif(torch.zeros(1, 5, 1), alpha))
        figure.savefig(out / "rulers.png")
    print(f"wrote {out}/segments.png and {out}/rulers.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pictures.py: {error}")
