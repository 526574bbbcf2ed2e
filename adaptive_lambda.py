"""λ as a parameter of the task: learned by gradient with the head, instead of searched for on a grid.

    λ = 1.99 σ(r)      r is the parameter, so that 0 < λ < 2 whatever the optimiser does
    loss = head's loss at λ + jitter · u,  u uniform in [-1, 1] at each step
         + price · mean α′
         + missing

The encoder is frozen, yet λ's gradient passes through it: loss → hidden states → tokens → widths of CIF's pieces → α′ → λ.
Where α′ moves a token's end, frames change hands between neighbours, and the loss says whether that was for the better.

**missing**, for CTC. An utterance with fewer tokens than its text needs has an infinite loss, which is usually replaced by 0
(zero_infinity): as λ grows, the hardest utterances fall silent, the loss falls, and λ has no reason to come back. In its place
each missing token is charged what guessing its symbol would cost; Σ α′ stands for the number of tokens:

    missing = mean over utterances of  ln(symbols + 1) · relu(n - Σ α′) / n,   n = what CTC must emit

**price.** Mean α′ is tokens per frame: at λ = 0, where it is 1, the price is added to the loss, at λ = 1 about 0.23 of it.

**jitter.** A head that has only heard one λ is at its best there, which might hold λ back. With --jitter each step is taken at a λ drawn
around the learned one, as in pre-training; validation and test are at λ itself. In the one comparison made so far (README, “What we
found”) λ did as well without, so it is off.

**freeze.** For the first steps λ stays where it starts: a head that knows nothing yet, above all CTC's that emits only blanks,
gives it a gradient of noise. λ has its own learning rate, which falls to a tenth at the most, and no weight decay.

After --lam-epochs λ is settled. The head that came along was disturbed by λ's way, so a new one is trained at the
learned λ as finetune.py does it, and scored: the same protocol as for every point of the grid.

Source: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models", ICASSP 2023, learn λ with the
task; jitter, missing and price are ours. Tasks, heads, stopping and points are finetune.py's.

    python adaptive_lambda.py                                                characters, from three starting points: a quarter of an hour
    python adaptive_lambda.py --checkpoint runs/demo/encoder.pt --task pool --lam 0.1 1.2 --seeds 3 --out runs/adaptive
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

from finetune import build_parser, check, prepare, save_head, train
from ofa_encoder import FRAME_MS
from parts.cache import FrameCache, HiddenStateCache, TrainableSource
from parts.heads import emissions
from parts.runs import already_done, check_numbers, command, cost_of, save_point

LIMIT = 1.99  # at 2, α′ is 0 and nothing fires


class LearnedLam(TrainableSource):
    """λ, and what is heard at it. freeze: steps for which λ rests; jitter: how far a step's λ may lie from it;
    needed: tokens that each utterance needs, where that matters; guess: the cost of one that is missing."""

    keep_last = True

    def __init__(
        self,
        start,
        encoder,
        frames: FrameCache,
        lr=0.02,
        freeze=0,
        jitter=0.0,
        price=0.0,
        needed=None,
        guess=0.0,
    ):
        super().__init__()
        self.price, self.guess, self.jitter, self.left = price, guess, jitter, freeze
        self.needed = None if needed is None else torch.tensor(needed, device=frames.device)
        self.raw = nn.Parameter(torch.logit(torch.tensor(start / LIMIT, device=frames.device)))
        self.groups = [{"params": [self.raw], "lr": lr, "min_lr": lr / 10, "weight_decay": 0.0}]
        self.encode = lambda indices, lam: encoder.encode(
            *frames(indices), lam
        )  # not a submodule: the encoder stays as it is
        self.frames, self.tokens = 0, 0

    @property
    def lam(self):
        return LIMIT * self.raw.sigmoid()

    def forward(self, indices):
        lam = self.lam
        if self.training and self.left > 0:
            self.left, lam = self.left - 1, lam.detach()
        if self.training:
            lam = (lam + self.jitter * (2 * torch.rand((), device=lam.device) - 1)).clamp(0, LIMIT)
        out = self.encode(indices, lam)
        mass = out.fired.alpha.sum(1)  # (B,) Σ α′: CIF's α is our α′
        self.cost = self.price * mass.sum() / out.frames.sum()
        if self.needed is not None:
            needed = self.needed[list(indices)]
            self.cost = self.cost + self.guess * (torch.relu(needed - mass) / needed).mean()
        if self.training:
            self.frames, self.tokens = (
                self.frames + out.frames.sum().item(),
                self.tokens + out.lengths.sum().item(),
            )
        return torch.stack(out.hidden_states, 1), out.lengths

    def watch(self) -> dict:
        """λ at the end of the epoch, and the mean frame period in ms over its training batches."""
        period, self.frames, self.tokens = FRAME_MS * self.frames / self.tokens, 0, 0
        return {"lam": self.lam.item(), "period_ms": period}


def main():
    parser = build_parser("Learn λ with a head, on the frozen encoder.", lam="each λ to start from")
    parser.set_defaults(lam=[0.1, 0.6, 1.2])
    parser.add_argument(
        "--lam-epochs",
        type=int,
        default=25,
        help="epochs for which λ is learned, with a head that is then thrown away",
    )
    parser.add_argument(
        "--lam-lr", type=float, default=0.02, help="learning rate of r, where λ = 1.99 σ(r)"
    )
    parser.add_argument(
        "--freeze", type=int, default=200, help="steps for which λ rests where it starts"
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        help="largest distance of a step's λ from the learned one; 0: none",
    )
    parser.add_argument(
        "--price", type=float, default=0.0, help="added to the loss, times tokens per frame"
    )
    parser.add_argument(
        "--hide-missing",
        action="store_true",
        help="do not charge CTC's missing tokens: utterances that are too short cost nothing",
    )
    args = parser.parse_args()
    if args.features != "encoder" or args.unfreeze:
        raise ValueError(
            "λ is learned on a frozen, pre-trained encoder: --features and --unfreeze are for finetune.py"
        )
    check(args)
    if not all(0 < lam < LIMIT for lam in args.lam):
        raise ValueError(
            f"--lam {' '.join(f'{lam:g}' for lam in args.lam)}: λ = {LIMIT} σ(r) can't start from an end of the scale; try 0.05, say"
        )
    check_numbers(args, "lam_epochs")
    check_numbers(args, "lam_lr", "freeze", "jitter", "price", zero=True)
    encoder, task, config = prepare(args)
    steps = args.lam_epochs * -(-len(task.indices("train")) // args.batch)
    if args.freeze >= steps:
        raise ValueError(
            f"--freeze {args.freeze}: λ would rest for all of the {steps} steps in {args.lam_epochs} epochs; try --freeze {steps // 5}"
        )
    if encoder.config.compression != "cif":
        raise ValueError(
            f"{args.checkpoint} has one fixed rate ({encoder.config.compression}): there is no λ to learn"
        )
    needed = (
        None
        if args.hide_missing or task.kind != "ctc"
        else [emissions(t) / args.symbols_per_token for t in task.targets]
    )
    frames, name = (
        None,
        f"{args.task}-price{args.price:g}-jitter{args.jitter:g}" + "-hidden" * args.hide_missing,
    )
    for start in args.lam:
        for seed in range(args.seed, args.seed + args.seeds):
            path = Path(args.out) / f"{name}-from{start:g}-seed{seed}.json"
            if (
                already_done(path, {**config, "start": start, "seed": seed})
                and path.with_suffix(".pt").exists() >= args.save_heads
            ):
                continue
            frames = frames or FrameCache(task.speech, encoder, args.device, args.keep == "memory")
            began = time.time()
            learner = LearnedLam(
                start,
                encoder,
                frames,
                args.lam_lr,
                args.freeze,
                args.jitter,
                args.price,
                needed,
                math.log(len(task.symbols) + 1),
            )
            search, _ = train(
                argparse.Namespace(
                    **{**vars(args), "epochs": args.lam_epochs, "patience": args.lam_epochs}
                ),
                task,
                learner,
                seed,
            )
            searched, lam = time.time() - began, learner.lam.item()
            heard = HiddenStateCache(
                task.speech, args.features, encoder, lam, args.device, frames, args.keep == "memory"
            )
            point, head = train(args, task, heard, seed)
            if args.save_heads:
                save_head(path.with_suffix(".pt"), head, encoder, lam, task)
            took = time.time() - began
            save_point(
                path,
                {
                    "config": {**config, "start": start, "seed": seed},
                    "command": command("adaptive_lambda.py", parser, args, start, seed),
                    "metric": task.metric,
                    "lam": lam,
                    **point,
                    "search": search["history"],
                    "search_s": searched,
                    **cost_of(heard, frames),
                    "train_s": took,
                },
            )
            print(
                f"λ = {start:g} -> {lam:.3f} ({heard.period_ms:.1f} ms), seed {seed}: test {task.metric} {point['test']:.1f} % "
                f"after {point['epochs']} epochs, {took:.0f} s in all"
            )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"adaptive_lambda.py: {error}")
    except KeyboardInterrupt:
        sys.exit(
            "adaptive_lambda.py: stopped; the same command goes on from the last finished point"
        )
