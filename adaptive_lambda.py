"""λ chosen for a task by what it costs there, not picked from a grid of heads.

    cost(λ) = a head's error or loss at λ + price · tokens per frame

The encoder is frozen. How λ is found (--way):

search       One head is trained for all λ (finetune.py --lam any). Its errors on validation speech
             are a curve over forty rates, and λ is where the smoothed curve is lowest. That costs
             no training beyond the head's, which is also the head that is used afterwards; and
             every price, in points of the metric, is answered by the same curve. With --by loss the
             curve is that of the loss, which is what the other ways follow: it is less ragged, but
             where it is lowest the metric is not best (docs/findings.md, 7).

differences  λ is a parameter, learned with a head. Its slope at each step is measured on a batch of
             validation speech, which is encoded twice:

                 slope = (loss(λ + δ) - loss(λ - δ)) / 2δ

             The head's own steps are taken at any λ, drawn anew for each. When they were taken near
             the λ that is learned, runs from several starts did not meet (docs/findings.md, 8).

autograd     The paper's way: λ is a parameter, learned with a head, and its gradient passes through
             the frozen encoder:

                 loss → hidden states → tokens → widths of CIF's pieces → α′ → λ

Why not autograd alone? As λ grows, the edges of all tokens slide over the sounds, and an
utterance's loss goes in waves, about one for each token that it loses; where it loses one, the loss
jumps. Between two jumps autograd is exact. But what it returns is the slope of a wave, many times
as steep as the trend, now up and now down. And where edges are kept at rest, autograd sees nothing
of the trend, since all of it is in the jumps (notebook 4 shows both; extras/slopes.py). Differences
over a step wider than a wave see the trend.

In both of the last two λ = 1.99 σ(r), and r is the parameter: 0 < λ < 2 whatever the optimiser
does. λ rests for the first steps (--freeze): a head that knows nothing yet, above all one under
CTC that emits only blanks, gives it a slope of noise. λ has its own learning rate, which rises and
falls with that of the head, and no weight decay. Then the head is thrown away, having seen λ
change all the way, and a new one is trained at the learned λ, as finetune.py would.

**too short**, added to the loss under CTC. An utterance with fewer tokens than its text needs
has an infinite loss, which is usually replaced by 0 (zero_infinity). So as λ grows, the hardest
utterances no longer count, the loss falls, and λ has no reason to come back. In place of the 0 goes
the loss of an answer in which all symbols and the blank are equally likely, ln(symbols + 1).
(The head's loss, too, is per symbol of the text, and averaged over utterances.) A count has no
gradient, so under autograd each missing token is charged instead, with Σ α′ for the number of
tokens, and n for how many CTC needs (fewer with --symbols-per-token):

    too short = ln(symbols + 1) · share of the utterances that are too short
    autograd:   ln(symbols + 1) · mean over utterances of relu(n - Σ α′) / n

(The CTC part of seq2seq's loss is not charged: its texts are words, far fewer than tokens.)

**price.** There is a token per frame at λ = 0, where all of the price is paid, and about 0.22 at
λ = 1. The higher the price, the longer the best tokens.

Source: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech
models", ICASSP 2023: λ learned with the task. What is too short, price, freeze and the other
ways are ours.

    python adaptive_lambda.py --price 0 5 10     characters: one head, and the best λ at each price
    python adaptive_lambda.py --way autograd --task pool --lam 0.1 1.2 --out runs/adaptive
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import math
import sys
import time
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch
from torch import nn

import finetune
from ofa_encoder import FRAME_MS
from parts.cache import FrameCache, HiddenStateCache, TrainableSource
from parts.heads import emissions
from parts.runs import (
    HIGHER_IS_BETTER,
    check_distinct,
    check_numbers,
    check_unused,
    command,
    cost_of,
    read_point,
    save_point,
    warning,
    write_point,
)

STARTS = (0.1, 0.6, 1.2)  # of λ, where it is learned
LIMIT = 1.99  # of λ: at 2, α′ is 0 and nothing fires
LEAST_DELTA = 0.001  # below it, differences of float32 losses are noise
SMOOTH = 3  # rates on each side over which the curve is smoothed

# Flags that finetune.py does not have, and those of them that a way has no use for.
OWN = {"way", "by", "price", "lam_epochs", "lam_lr", "freeze", "delta"}
UNUSED = {
    "search": ("lam_epochs", "lam_lr", "freeze", "delta"),
    "differences": ("by",),
    "autograd": ("by", "delta"),
}


# 1. The command line: that of finetune.py, and what learning λ needs.


def build_parser():
    parser = finetune.build_parser(
        "Find the λ of a task, on the frozen encoder.",
        lam="each λ to start from; not for --way search, which needs no start",
    )
    parser.set_defaults(lam=list(STARTS))
    add = parser.add_argument
    ways = ("search", "differences", "autograd")
    add("--way", choices=ways, default="search", help="how λ is found: see the top of this file")
    by = "what a search compares on validation; the other ways learn λ by the head's loss"
    add("--by", choices=("metric", "loss"), default="metric", help=by)
    price = "each price of a token for every frame, as λ = 0 has it: in points of the metric for a "
    price += "search by the metric, elsewhere added to the loss"
    add("--price", type=float, nargs="+", default=[0.0], help=price)
    add = parser.add_argument_group("for --way differences and autograd").add_argument
    add("--lam-epochs", type=int, default=25, help="epochs for which λ is learned")
    add("--lam-lr", type=float, default=0.02, help="learning rate of r, where λ = 1.99 σ(r)")
    add("--freeze", type=int, default=200, help="steps for which λ rests where it starts")
    add("--delta", type=float, default=0.1, help="δ, half the step of --way differences")
    return parser


def check(args):
    """Refuse flags that can't be met, by ValueError; settle the others as finetune.check does."""
    if args.features != "encoder" or args.unfreeze:
        raise ValueError(
            "λ is found on a frozen, pre-trained encoder: "
            "--features and --unfreeze are for finetune.py"
        )
    if args.way == "search":
        if args.lam not in (["any"], list(STARTS)):
            raise ValueError("--lam is where λ starts, and --way search has no start: leave it out")
        args.lam = ["any"]
    elif "any" in args.lam:
        raise ValueError(f"--lam any is no λ to start from: for --way {args.way} name some")
    check_unused(args, build_parser(), UNUSED[args.way], f"is of no use to --way {args.way}")
    finetune.check(args)
    if args.way != "search" and not all(0 < lam < LIMIT for lam in args.lam):
        starts = " ".join(f"{lam:g}" for lam in args.lam)
        raise ValueError(
            f"--lam {starts}: λ = {LIMIT} σ(r) can't start from an end of the scale; "
            f"try 0.05 to {LIMIT - 0.05:g}"
        )
    if args.way == "differences" and max(args.lam) > finetune.LAM_MAX:
        raise ValueError(
            f"--lam {max(args.lam):g}: under --way differences the head learns up to λ = "
            f"{finetune.LAM_MAX}, so start there at most"
        )
    check_numbers(args, "lam_epochs", "lam_lr")
    check_numbers(args, "freeze", zero=True)
    if not LEAST_DELTA <= args.delta < LIMIT:
        raise ValueError(
            f"--delta is {args.delta}, expected a number from {LEAST_DELTA} to below {LIMIT}"
        )
    for price in args.price:
        if not 0 <= price < math.inf:
            raise ValueError(f"--price is {price}, expected a number from 0")
    check_distinct(args, "price")


# 2. Search: the lowest point of a curve.


def best_rate(rows, values, price) -> dict:
    """The row where its value, and the price of its tokens, are lowest, once the curve is smooth;
    of several that are, as where nothing is wrong at any rate, the one with the longest tokens.

    rows: of finetune.test_at_all_rates, in the order of their λ; values: what is to be low, for
    each; price: of a token per frame, in the unit of the values.
    """
    priced = []
    for row, value in zip(rows, values):
        tokens_per_frame = FRAME_MS / row["frame_period_ms"]
        priced.append(value + price * tokens_per_frame)
    curve = smooth(priced)
    lowest = np.flatnonzero(curve < curve.min() + 1e-9)
    return rows[lowest[-1]]


def losses_of(rows, task) -> list[float]:
    """Losses on validation, with what is too short under CTC."""
    return [row["valid_loss"] + uniform_loss(task) * row["infeasible_valid"] for row in rows]


def errors_of(rows, metric) -> list[float]:
    """The metric on validation; lower is better."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return [sign * row["valid"] for row in rows]


def smooth(values) -> np.ndarray:
    """At each place the parabola that fits the values up to SMOOTH places away best."""
    values = np.asarray(values)
    result = np.empty(len(values))
    for k in range(len(values)):
        near = np.arange(max(0, k - SMOOTH), min(len(values), k + SMOOTH + 1))
        parabola = np.polyfit(near - k, values[near], 2)
        result[k] = parabola[-1]
    return result


def search(args, encoder, task, config):
    """A head for all λ for each seed, and a point for each price.

    The head is that of `finetune.py --lam any`, with its flags: if it is there it is used.
    """
    # Its point must not differ from finetune.py's: without the flags that only this file has.
    of_head = {name: value for name, value in vars(args).items() if name not in OWN}
    config = {name: value for name, value in config.items() if name not in OWN}
    parser = finetune.build_parser()
    finetune.points_of_any_lam(parser, argparse.Namespace(**of_head), encoder, task, config)

    for seed in range(args.seed, args.seed + args.seeds):
        path = Path(args.out) / f"{args.task}-any-seed{seed}.json"
        head = read_point(path)
        if args.by == "metric":
            values = errors_of(head["rows"], task.metric)
        else:
            values = losses_of(head["rows"], task)
        for price in args.price:
            row = best_rate(head["rows"], values, price)
            found = {"way": "search", "by": args.by, "price": price}
            point = {**head, **row, "config": {**head["config"], **found}}
            # The head's point says these of λ = 0, not of the λ that was found.
            of_lam_0 = ["rows", "tokens", "encode_s", "infeasible_train", "examples"]
            for name in [*of_lam_0, f"test {task.second}"]:
                point.pop(name, None)
            point["command"] = command_of(args, "any", price, seed)
            stem = f"{args.task}-search-{args.by}-price{price:g}-seed{seed}"
            # Nothing was computed anew: commit, machine and date stay those of the head.
            write_point(path.with_name(f"{stem}.json"), point)
            print(
                f"price {price:g}, seed {seed}: λ = {row['lam']:.3f} "
                f"({row['frame_period_ms']:.1f} ms), test {task.metric} {row['test']:.1f} %"
                f"{warning(point)}"
            )


def uniform_loss(task) -> float:
    """The loss of a symbol under CTC where all symbols and the blank are equally likely."""
    return math.log(len(task.symbols) + 1)


def command_of(args, lam, price, seed) -> str:
    """The command that computes the point of this λ, price and seed again."""
    one_price = argparse.Namespace(**{**vars(args), "price": [price]})
    return command("adaptive_lambda.py", build_parser(), one_price, lam, seed)


# 3. λ as a parameter, and the hidden states that depend on it.


class LearnedLam(TrainableSource):
    """λ as a parameter, and the hidden states at it; for finetune.train. Its slope: autograd's.

    args: flags, of which it reads lam_lr, freeze, delta and symbols_per_token
    task: for how many tokens each text needs
    frames: the CNN's, of the frozen encoder
    start: λ to begin with, inside (0, LIMIT)
    price: added to the loss, times tokens per frame
    """

    def __init__(self, args, task, frames: FrameCache, start, price=0.0):
        super().__init__()
        # The method alone: were the encoder a submodule, model.train() would turn on its dropout.
        self.encode = frames.encoder.encode
        self.frames = frames
        self.raw = nn.Parameter(torch.logit(torch.tensor(start / LIMIT, device=frames.device)))
        self.groups = [{"params": [self.raw], "lr": args.lam_lr, "weight_decay": 0.0}]
        self.steps_to_rest = args.freeze
        self.delta = args.delta
        self.price = price
        self.uniform = uniform_loss(task)
        self.needed = None
        if task.kind == "ctc":
            needed = [emissions(text) / args.symbols_per_token for text in task.targets]
            self.needed = torch.tensor(needed, device=frames.device)

    @property
    def lam(self):
        return LIMIT * self.raw.sigmoid()

    def forward(self, indices):
        """Hidden states (B, L + 1, T, D) and lengths (B,); sets self.cost."""
        lam = self.lam
        if self.training and self.count_step():
            lam = lam.detach()
        out, self.cost = self.encode_at(indices, lam)
        return torch.stack(out.hidden_states, 1), out.lengths

    def count_step(self) -> bool:
        """Count a step; returns whether λ still rests at it."""
        self.steps_to_rest -= 1
        return self.steps_to_rest >= 0

    def encode_at(self, indices, lam):
        """The utterances encoded at λ, and what is added to the head's loss there."""
        x, frames = self.frames(indices)
        out = self.encode(x, frames, lam, self.frames.marks(indices))
        # Σ α′ of an utterance is its number of tokens before rounding, and has a gradient.
        mass = out.fired.alpha.sum(1)  # (B,)
        cost = self.price * mass.sum() / out.frames.sum()
        if self.needed is not None:
            needed = self.needed[list(indices)]
            cost = cost + self.uniform * (torch.relu(needed - mass) / needed).mean()
        return out, cost

    def watch(self) -> dict:
        """λ at the end of an epoch."""
        return {"lam": self.lam.item()}


class MeasuredLam(LearnedLam):
    """The same, but the slope of λ is a difference of losses on validation speech.

    Its head is trained at one λ a step, drawn from 0 to finetune.LAM_MAX, and is not told how long
    tokens are.
    """

    def begin(self, lesson):
        self.lesson = lesson
        self.batches = cycle(lesson.batches("valid"))

    def encode_at(self, indices, lam):
        """As in LearnedLam, but tokens, and utterances that are too short, are counted."""
        x, frames = self.frames(indices)
        out = self.encode(x, frames, lam, self.frames.marks(indices))
        cost = self.price * out.lengths.sum() / out.frames.sum()
        if self.needed is not None:
            too_short = self.needed[list(indices)] > out.lengths
            cost = cost + self.uniform * too_short.float().mean()
        return out, cost

    def forward(self, indices):
        lam = self.lam
        if not self.training:
            return super().forward(indices)

        # The head's own step is taken anywhere.
        with torch.no_grad():
            out, _ = self.encode_at(indices, finetune.LAM_MAX * torch.rand(()).item())

        # A stand-in for λ's loss: its value is 0, and its gradient is the slope that was measured.
        self.cost = 0.0
        if not self.count_step():
            self.cost = self.slope(lam.detach()) * (lam - lam.detach())
        return torch.stack(out.hidden_states, 1), out.lengths

    @torch.no_grad()
    def slope(self, lam) -> float:
        """(loss(λ + δ) - loss(λ - δ)) / 2δ on the next validation batch. Where λ ± δ leaves the
        scale it is cut off there, and the divisor is the distance that is left."""
        batch = next(self.batches)
        head = self.lesson.head
        wanted = [[s for s in self.lesson.targets[i] if s >= 0] for i in batch]
        below = (lam - self.delta).clamp(min=0)
        above = (lam + self.delta).clamp(max=LIMIT)
        head.eval()
        losses = []
        for side in (below, above):
            out, cost = self.encode_at(batch, side)
            states = torch.stack(out.hidden_states, 1)
            losses.append((head.loss(states, out.lengths, wanted) + cost).item())
        head.train()
        return (losses[1] - losses[0]) / (above - below).item()


# 4. A point for each start, price and seed: λ is learned, then a head is trained at it.


def main():
    parser = build_parser()
    args = parser.parse_args()
    check(args)
    encoder, task, config = finetune.prepare(args)
    if args.way == "search":
        search(args, encoder, task, config)
        return
    del config["by"]  # a search's alone
    check_freeze(args, task)
    # All points are looked for before any work is done, since one of them might be another's.
    todo_of = {}
    for start, price in product(args.lam, args.price):
        from_start = {**config, "start": start, "price": price}
        stem = f"{args.task}-{args.way}-price{price:g}-from{start:g}"
        todo_of[start, price] = finetune.unfinished(args, from_start, stem)

    in_memory = args.keep == "memory"
    frames = None
    for (start, price), todo in todo_of.items():
        for seed, path in todo.items():
            if not frames:
                frames = FrameCache(task.speech, encoder, args.device, in_memory, task.ends)
            began = time.time()
            lam, history = learn_lam(args, task, frames, start, price, seed)
            search_s = time.time() - began
            states = HiddenStateCache(
                task.speech, args.features, encoder, lam, args.device, frames, in_memory
            )
            lesson, of_head = finetune.train(args, task, [states], seed)
            if args.save_heads:
                finetune.save_head(path.with_suffix(".pt"), lesson.head, encoder, lam, task)
            point = {
                "config": {**config, "start": start, "price": price, "seed": seed},
                "command": command_of(args, start, price, seed),
                "lam": lam,
                **finetune.final_test(args, lesson, states, of_head),
                "search": history,
                "search_s": search_s,
                **cost_of(states, frames),
                "train_s": time.time() - began,
            }
            save_point(path, point, args.device)
            print(
                f"λ = {start:g} -> {lam:.3f} ({states.period_ms:.1f} ms), seed {seed}: "
                f"test {task.metric} {point['test']:.1f} % after {point['epochs']} epochs, "
                f"{point['train_s']:.0f} s in all{warning(point)}"
            )


def check_freeze(args, task):
    """Refuse a --freeze in which λ would never move."""
    batches = math.ceil(len(task.indices("train")) / finetune.BATCH)
    steps = args.lam_epochs * batches
    if args.freeze >= steps:
        raise ValueError(
            f"--freeze {args.freeze}: λ would rest for all of the {steps} steps in "
            f"{args.lam_epochs} epochs; try --freeze {steps // 5}"
        )


def learn_lam(args, task, frames, start, price, seed):
    """λ after --lam-epochs with a head that is not kept; and the history of these epochs."""
    kind = LearnedLam if args.way == "autograd" else MeasuredLam
    source = kind(args, task, frames, start, price)
    searching = argparse.Namespace(**{**vars(args), "epochs": args.lam_epochs})
    _, history = finetune.train(searching, task, [source], seed)
    return source.lam.item(), history


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"adaptive_lambda.py: {error}")
    except KeyboardInterrupt:
        sys.exit(
            "adaptive_lambda.py: stopped; the same command goes on from the last finished point"
        )
