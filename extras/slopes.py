"""What autograd sees of the slope of λ, and what it does not: the jumps where a token is lost.

As λ grows, an utterance loses tokens, one at a time. Between two such places its loss is
continuous, and autograd is exact there. So over a step from one λ to another

    change of the loss  =  Σ over lost tokens of (loss just after − just before)  +  what is left,

and what is left is what autograd sees. Where tokens are lost is known: an utterance has
⌊Σ α′ + 1/2⌋ of them, and Σ α′ is a straight line over λ up to 1. So nothing is left to sampling.

The same for two other encoders, to see where autograd's slope comes from:

without a tail    What is left after the last whole token is cut off: the running total of α′ stops
                  at ⌊Σ α′⌋. Edges of tokens still slide over the sounds as λ grows, all of them.
number held       α′ · ⌊Σ α′ + 1/2⌋ / Σ α′ in place of α′, so that tokens come out whole. Edges of
                  an utterance hardly move until it loses one.

The head must be at home at every λ (finetune.py --lam any --save-heads), and α predicted itself
(--alpha regression). The utterances are those that the head did not learn from, 300 at most, as far
as they have tokens enough for CTC. Printed are means over them, ± 1.96 standard errors, over the
width of the step: slopes. *scatter*: the standard deviation, over utterances, of autograd's slope
in the middle of the step, and of the loss's slope as printed, a difference of two losses. The noise
of a batch of n utterances is that over √n.

Source: λ learned by its gradient: Chen, Meng and Lee, ICASSP 2023. Counting the jumps is ours.

    python finetune.py --lam any --epochs 150 --save-heads --out runs/slopes
    python -m extras.slopes runs/slopes/ctc-any-seed0.pt results/slopes/ctc.json
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import json
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from extras.firing import table
from extras.predict import load_head
from ofa_encoder import OFAEncoder
from parts.cache import FrameCache
from parts.heads import tell
from parts.runs import machine, save_text
from parts.tasks import load_task

STEPS = [(0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)]  # from one λ to another, below 1
UTTERANCES = 300  # at most
BESIDE = 1e-5  # λ before and after the place where a token is lost


# 1. One utterance.


class WithoutTail(OFAEncoder):
    """An encoder that cuts off what is left after the last whole token."""

    def weigh(self, x, frames, lam, ends=None):
        alpha, predicted, weights = super().weigh(x, frames, lam, ends)
        total = weights.double().cumsum(1)  # (B, S)
        whole = total[:, -1:].detach().floor().clamp(min=1)
        return alpha, predicted, torch.minimum(total, whole).diff(dim=1, prepend=0 * whole)


class NumberHeld(OFAEncoder):
    """An encoder whose tokens come out whole, and whose edges rest until one is lost."""

    def weigh(self, x, frames, lam, ends=None):
        alpha, predicted, weights = super().weigh(x, frames, lam, ends)
        mass = weights.sum(1, keepdim=True)  # (B, 1)
        return alpha, predicted, weights * (mass.detach() + 0.5).floor() / mass


# By name, each with the part of a token from which what is left at the end still is one.
KINDS = {
    "as they are": (OFAEncoder, 0.5),
    "without a tail": (WithoutTail, 1.0),
    "number held": (NumberHeld, 0.5),
}


class Utterance:
    """Its loss over λ, at which the head is at home.

    frames, n: x (1, S, C) and (1,) of a FrameCache; text: symbol numbers; tail: as in KINDS.
    """

    def __init__(self, encoder, head, frames, n, text, tail=0.5):
        self.encoder = encoder
        self.head = head
        self.frames = frames
        self.n = n
        self.text = text
        self.tail = tail
        self.at_one = encoder.alpha_predictor(frames).double().sum().item()  # Σ α′ at λ = 1

    def loss(self, lams):
        """The mean of its losses at K values of λ (K,), and how many tokens it has there (K,)."""
        K = len(lams)
        out = self.encoder.encode(self.frames.expand(K, -1, -1), self.n.expand(K), lams[:, None])
        states = tell(torch.stack(out.hidden_states, 1), out.durations())
        return self.head.loss(states, out.lengths, [self.text] * K), out.lengths

    def where_tokens_are_lost(self, low, high):
        """Each λ from low to high at which Σ α′ = S − λ (S − at_one) falls below n + tail for a
        whole n, so that n tokens are left."""
        S = self.n.item()
        most = math.floor(S - low * (S - self.at_one) - self.tail) + 1
        fewest = math.floor(S - high * (S - self.at_one) - self.tail) + 1
        masses = torch.arange(fewest, most, dtype=torch.float64) + self.tail
        return (S - masses) / (S - self.at_one)

    @torch.no_grad()
    def change(self, low, high) -> tuple[float, float]:
        """How much its loss changes from λ = low to high, and how much of that is jumps."""
        first, _ = self.loss(torch.tensor([low]))
        last, _ = self.loss(torch.tensor([high]))
        lost = self.where_tokens_are_lost(low, high)
        jumps = 0.0
        if len(lost):
            before, _ = self.loss((lost - BESIDE).float())
            after, _ = self.loss((lost + BESIDE).float())
            jumps = len(lost) * (after - before).item()
        return (last - first).item(), jumps

    def autograd(self, lam) -> float:
        """The slope that autograd returns at λ = lam."""
        lams = torch.tensor([lam], requires_grad=True)
        loss, _ = self.loss(lams)
        (slope,) = torch.autograd.grad(loss, lams)
        return slope.item()

    def is_long_enough(self, lam) -> bool:
        """Whether CTC could emit its text at λ = lam."""
        _, tokens = self.loss(torch.tensor([lam]))
        return self.head.infeasible(tokens, [self.text]) == 0


# 2. Means over utterances.


def slopes_over(utterances, low, high) -> dict:
    """Slopes over a step of λ: means and 1.96 standard errors, and how they scatter."""
    found = []
    for utterance in tqdm(utterances, desc=f"λ = {low:g} to {high:g}", leave=False):
        change, jumps = utterance.change(low, high)
        at_middle = utterance.autograd((low + high) / 2) * (high - low)
        found.append([change - jumps, jumps, change, at_middle])
    found = np.array(found) / (high - low)  # (utterances, 4)
    scatter = found.std(0, ddof=1)
    means = np.stack([found.mean(0), 1.96 * scatter / len(found) ** 0.5], 1).tolist()
    return {
        "from": low,
        "to": high,
        "utterances": len(found),
        **dict(zip(("autograd", "jumps", "loss"), means)),
        "scatter": {"autograd": scatter[3], "difference": scatter[2]},
    }


def slopes(path, root="data") -> list[dict]:
    """A row for each encoder of KINDS and each step. path: of a head by --save-heads, of the
    embedded corpus under root. Raises ValueError if it is none, or not at home at every λ."""
    encoder, head, how = load_head(path)
    if encoder.config.alpha != "regression":
        raise ValueError(f"{path} has an encoder of segments, whose lock autograd does not see")
    if how["lam"] != "any":
        raise ValueError(f"{path} serves λ = {how['lam']:g} alone: train one by --lam any")
    head.requires_grad_(False)
    task = load_task(how["kind"], root=root)
    if set(task.symbols) != set(how["symbols"]):
        raise ValueError(f"{path} answers in other symbols than the embedded corpus has")
    number = {symbol: k for k, symbol in enumerate(how["symbols"])}
    held_out = task.indices("valid") + task.indices("test")
    some = held_out[:: -(-len(held_out) // UTTERANCES)]

    rows = []
    for name, (kind, tail) in KINDS.items():
        encoder = kind.from_checkpoint(path).requires_grad_(False)
        frames = FrameCache(task.speech, encoder, "cpu", keep=False)
        utterances = []
        for i in some:
            target = task.targets[i]
            symbols = [target] if isinstance(target, str) else target
            text = [number[symbol] for symbol in symbols if symbol in number]
            utterances.append(Utterance(encoder, head, *frames([i]), text, tail))
        for low, high in STEPS:
            used = utterances
            if task.kind == "ctc":
                used = [utterance for utterance in utterances if utterance.is_long_enough(high)]
            rows.append({"tokens": name, **slopes_over(used, low, high)})
    return rows


def slopes_table(rows) -> str:
    """The rows of `slopes` as Markdown."""
    header = ["tokens", "λ", "utterances", "slope of the loss", "= seen by autograd", "+ jumps"]
    header += ["scatter of autograd", "of the loss"]
    cells = []
    for row in rows:
        line = [row["tokens"], f"{row['from']:g} to {row['to']:g}", row["utterances"]]
        line += ["{:+.2f} ± {:.2f}".format(*row[name]) for name in ("loss", "autograd", "jumps")]
        line += [f"{row['scatter'][name]:.1f}" for name in ("autograd", "difference")]
        cells.append(line)
    return table(header, cells)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.slopes",
        description="What autograd sees of the slope of λ, and what it does not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("head", help="a .pt of finetune.py --lam any --save-heads")
    parser.add_argument("out", nargs="?", default="runs/slopes.json", help="file for the table")
    parser.add_argument("--root", default="data", help="folder of the embedded corpus")
    args = parser.parse_args()
    rows = slopes(args.head, args.root)
    content = {"machine": machine("cpu"), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    save_text(json.dumps(content, indent=1, ensure_ascii=False), args.out)
    print(slopes_table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"slopes.py: {error}")
