"""What a trained head predicts of recordings.

    python finetune.py --task pool --data my.tsv --lam 0.5 --save-heads --out runs/mine
    python -m extras.predict runs/mine/pool-encoder-lam0.5-seed0.pt new.wav another.flac

    python finetune.py --task pool --data my.tsv --lam any --save-heads --out runs/mine
    python -m extras.predict runs/mine/pool-any-seed0.pt --ms 70 new.wav another.flac

The file of the head also holds its encoder and λ, and what its symbols stand for. A head that was
trained for any λ takes one by --lam, or a frame period by --ms; without them, λ = 0.

A text is spelt out. Of labels, the most probable one is given, or that of each question; where
several may apply, all those with a probability over one half.

A file that can't be read is named, the others are done, and the exit status is 1.
"""

import argparse
import sys

import torch

from finetune import LAM_MAX
from ofa_encoder import OFAEncoder, check_lam, load_checkpoint, period_from_lam
from parts.data import read_sound
from parts.heads import HEADS, tell


def load_head(path):
    """What finetune.py --save-heads left: the encoder and the head, in eval mode, and a dict with
    kind, symbols, lam and between (see finetune.save_head).

    Raises ValueError if path holds something else.
    """
    content = load_checkpoint(path)
    if "sizes" not in content:
        raise ValueError(
            f"{path} holds no head: give a .pt that finetune.py --save-heads left beside a point"
        )
    encoder = OFAEncoder.from_checkpoint(path)
    try:
        head = HEADS[content["kind"]](**content["sizes"])
        head.load_state_dict(content["head"])
        how = {name: content[name] for name in ("kind", "symbols", "lam", "between")}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.200})") from None
    return encoder, head.eval(), how


def choose_lam(args, encoder, trained) -> float:
    """The λ to encode at. trained: the λ of the head, or "any".

    Raises ValueError if the head does not serve the one that is asked for.
    """
    if args.lam is not None and args.ms is not None:
        raise ValueError("--lam and --ms say the same: give one of them")
    lam = encoder.lam_for(args.ms) if args.ms is not None else args.lam
    if trained == "any":
        lam = check_lam(lam or 0.0)
        if lam > check_lam(LAM_MAX):  # in float32, as λ is
            longest = int(period_from_lam(LAM_MAX, encoder.mean_alpha.item()))
            raise ValueError(
                f"{args.head} was trained up to λ = {LAM_MAX:g}, that is {longest} ms a token; "
                f"λ = {lam:.2f} is beyond"
            )
        return lam
    if lam is not None:
        raise ValueError(
            f"{args.head} was trained at λ = {trained:g} and serves no other: leave out --lam and "
            "--ms, or train a head by finetune.py --lam any"
        )
    return trained


def spell(answer, head, how) -> str:
    """A prediction in words. answer: symbol numbers of a text, or the scores of all labels."""
    symbols = how["symbols"]
    if how["kind"] != "pool":
        return how["between"].join(symbols[s] for s in answer)
    if head.multi_label:
        probabilities = zip(symbols, answer.sigmoid().tolist())
        likely = [f"{symbol} ({p:.0%})" for symbol, p in probabilities if p > 0.5]
        return ", ".join(likely) or "nothing"

    # Each of several questions has its own group of labels, and one of them is the answer.
    answers = []
    start = 0
    for scores in answer.split(head.groups):
        probability = scores.softmax(0).max()
        answers.append(f"{symbols[start + scores.argmax()]} ({probability:.0%})")
        start += len(scores)
    return ", ".join(answers)


def main():
    parser = argparse.ArgumentParser(description="What a trained head predicts of recordings.")
    parser.add_argument(
        "head", nargs="?", help="a .pt that finetune.py --save-heads left beside a point"
    )
    parser.add_argument("files", nargs="*", help="sound files")
    parser.add_argument("--lam", type=float, help="λ for a head of any rate")
    parser.add_argument("--ms", type=float, help="frame period in ms for a head of any rate")
    args = parser.parse_intermixed_args()  # flags may stand between HEAD and FILE
    if not args.files:
        raise ValueError(
            "train a head with `python finetune.py --save-heads`, "
            "then `python -m extras.predict HEAD.pt FILE ...`"
        )
    encoder, head, how = load_head(args.head)
    lam = choose_lam(args, encoder, how["lam"])
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
            states = torch.stack(out.hidden_states, 1)  # (1, L + 1, T, D)
            if how["lam"] == "any":
                states = tell(states, out.durations())
            (answer,) = head.predict(states, out.lengths)
        print(f"{file}: {spell(answer, head, how)}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")
