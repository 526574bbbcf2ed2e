"""What a trained head says of recordings.

    python finetune.py --task pool --data my.tsv --lam 0.5 --save-heads --out runs/mine
    python predict.py runs/mine/pool-encoder-lam0.5-seed0.pt new.wav another.flac

The file of the head also holds its encoder and λ, and what its symbols stand for. A text is spelt out; of labels, the most probable one
is given, or of each question's, or all those with a probability over one half. A file that can't be
read is named, the others are done, and the exit status is 1.

`python predict.py` says how to make one.
"""

import argparse
import sys

import torch

from ofa_encoder import OFAEncoder, load_checkpoint
from parts.data import read_sound
from parts.heads import HEADS


def load_head(path):
    """What finetune.py --save-heads left: encoder and head, in eval mode, λ, and a function that spells what the head predicts of an
    utterance. Raises ValueError if path holds something else."""
    content = load_checkpoint(path)
    if "sizes" not in content:
        raise ValueError(
            f"{path} holds no head: give a .pt that finetune.py --save-heads left beside a point"
        )
    encoder = OFAEncoder.from_checkpoint(path)
    try:
        head = HEADS[content["kind"]](**content["sizes"])
        head.load_state_dict(content["head"])
        symbols, lam, between = content["symbols"], content["lam"], content["between"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.200})") from None

    def spell(answer):
        if content["kind"] != "pool":
            return between.join(symbols[s] for s in answer)
        if head.multi_label:
            return (
                ", ".join(
                    f"{s} ({p:.0%})" for s, p in zip(symbols, answer.sigmoid().tolist()) if p > 0.5
                )
                or "nothing"
            )
        parts = answer.split(head.groups)  # scores of each question's labels
        starts = [sum(head.groups[:g]) for g in range(len(parts))]
        return ", ".join(
            f"{symbols[start + part.argmax()]} ({part.softmax(0).max():.0%})"
            for start, part in zip(starts, parts)
        )

    return encoder, head.eval(), lam, spell


def main():
    parser = argparse.ArgumentParser(description="What a trained head says of recordings.")
    parser.add_argument(
        "head", nargs="?", help="a .pt that finetune.py --save-heads left beside a point"
    )
    parser.add_argument("files", nargs="*", help="sound files")
    args = parser.parse_args()
    if not args.files:
        raise ValueError(
            "train a head with `python finetune.py --save-heads`, then `python predict.py HEAD.pt FILE ...`"
        )
    encoder, head, lam, spell = load_head(args.head)
    failed = False
    for file in args.files:
        try:
            waveform = read_sound(file)
        except ValueError as error:  # it names the file
            print(f"predict.py: {error}", file=sys.stderr)
            failed = True
            continue
        with torch.no_grad():
            out = encoder(waveform[None], lam=lam)
            (answer,) = head.predict(torch.stack(out.hidden_states, 1), out.lengths)
        print(f"{file}: {spell(answer)}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")
