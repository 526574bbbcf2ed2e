"""λ as a parameter of the task, learned by gradient with the head, not searched for on a grid.

    λ = 1.99 σ(r)      r is the parameter, so that 0 < λ < 2 whatever the optimiser does
    loss = head's loss at λ + price · mean α′ + missing

The encoder is frozen, yet λ's gradient passes through it:

    loss → hidden states → tokens → widths of CIF's pieces → α′ → λ

Where α′ moves a token's end, frames change hands between neighbours, and the loss says whether that
was for the better. The number of tokens has no gradient: λ's slope arrives through the widths
alone, and autograd does not see the jumps where an utterance gains or loses a token.

**missing**, for CTC. An utterance with fewer tokens than its text needs has an infinite loss, which
is usually replaced by 0 (zero_infinity). So as λ grows, the hardest utterances no longer count, the
loss falls, and λ has no reason to come back. In its place each missing token is charged what
guessing its symbol would cost; Σ α′ stands for the number of tokens:

    missing = mean over utterances of  ln(symbols + 1) · relu(n - Σ α′) / n

where n is how many tokens CTC needs. Without this charge λ never left 1.2 when it started there.

**price.** Mean α′ is tokens per frame: 1 at λ = 0, where the price is added to the loss in full,
and about 0.23 at λ = 1.

**freeze.** For the first steps λ stays where it starts: a head that knows nothing yet, above all
one under CTC that emits only blanks, gives it a gradient of noise. λ has its own learning rate,
which falls to a tenth of its first value at most, and no weight decay.

A head that has only seen one λ is at its best there, which might hold λ back. But in the one
comparison that was made, training with λ jittered by ±0.15 around the learned one made no
difference, so every step is taken at the learned λ itself.

After --lam-epochs λ is settled. The head that learned with it saw λ change all the way, so it is
thrown away: a new one is trained at the learned λ by finetune.py, and scored like every point of
the grid.

Source: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models",
ICASSP 2023: λ learned with the task. Missing tokens, price and freeze are ours.

    python adaptive_lambda.py             characters, from three λ: a quarter of an hour
    python adaptive_lambda.py --task pool --lam 0.1 1.2 --seeds 3 --out runs/adaptive
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import math
import sys
import time

import torch
from torch import nn

import finetune
from ofa_encoder import FRAME_MS
from parts.cache import FrameCache, HiddenStateCache, TrainableSource
from parts.heads import emissions
from parts.runs import check_numbers, command, cost_of, save_point, warning

LIMIT = 1.99  # of λ: at 2, α′ is 0 and nothing fires


# 1. The command line: that of finetune.py, and what learning λ needs.


def build_parser():
    parser = finetune.build_parser(
        "Learn λ with a head, on the frozen encoder.", lam="each λ to start from"
    )
    parser.set_defaults(lam=[0.1, 0.6, 1.2])
    add = parser.add_argument
    add("--lam-epochs", type=int, default=25, help="epochs for which λ is learned")
    add("--lam-lr", type=float, default=0.02, help="learning rate of r, where λ = 1.99 σ(r)")
    add("--freeze", type=int, default=200, help="steps for which λ rests where it starts")
    add("--price", type=float, default=0.0, help="added to the loss, times tokens per frame")
    return parser


def check(args):
    """Refuse flags that can't be met, by ValueError; settle the others as finetune.check does."""
    if args.features != "encoder" or args.unfreeze:
        raise ValueError(
            "λ is learned on a frozen, pre-trained encoder: "
            "--features and --unfreeze are for finetune.py"
        )
    finetune.check(args)
    if not all(0 < lam < LIMIT for lam in args.lam):
        starts = " ".join(f"{lam:g}" for lam in args.lam)
        raise ValueError(
            f"--lam {starts}: λ = {LIMIT} σ(r) can't start from an end of the scale; try 0.05, say"
        )
    check_numbers(args, "lam_epochs")
    check_numbers(args, "lam_lr", "freeze", "price", zero=True)


# 2. λ, and the hidden states that depend on it.


class LearnedLam(TrainableSource):
    """λ as a parameter, and the hidden states at it; for finetune.train.

    start: λ to begin with, inside (0, LIMIT)
    encoder, frames: the frozen encoder, and its CNN's frames
    lr: learning rate of r
    freeze: steps for which λ rests
    price: added to the loss, times tokens per frame
    needed: tokens that each utterance needs, one number for each; None: no charge for missing ones
    guess: what a missing token costs
    """

    keep_last = True  # λ is where it settles, not where validation was best by chance

    def __init__(
        self,
        start,
        encoder,
        frames: FrameCache,
        lr=0.02,
        freeze=0,
        price=0.0,
        needed=None,
        guess=0.0,
    ):
        super().__init__()
        # The method alone: were the encoder a submodule, model.train() would turn on its dropout.
        self.encode = encoder.encode
        self.frames = frames
        self.raw = nn.Parameter(torch.logit(torch.tensor(start / LIMIT, device=frames.device)))
        self.groups = [{"params": [self.raw], "lr": lr, "min_lr": lr / 10, "weight_decay": 0.0}]
        self.steps_to_rest = freeze
        self.price = price
        self.needed = None if needed is None else torch.tensor(needed, device=frames.device)
        self.guess = guess
        self.frames_seen = 0  # in the training batches of this epoch
        self.tokens_seen = 0

    @property
    def lam(self):
        return LIMIT * self.raw.sigmoid()

    def forward(self, indices):
        """Hidden states (B, L + 1, T, D) and lengths (B,); sets self.cost."""
        lam = self.lam
        if self.training and self.steps_to_rest > 0:
            self.steps_to_rest -= 1
            lam = lam.detach()
        x, frames = self.frames(indices)
        out = self.encode(x, frames, lam)

        # Σ α′ of an utterance is its number of tokens before rounding, and has a gradient.
        mass = out.fired.alpha.sum(1)  # (B,)
        self.cost = self.price * mass.sum() / out.frames.sum()
        if self.needed is not None:
            needed = self.needed[list(indices)]
            missing = torch.relu(needed - mass) / needed
            self.cost = self.cost + self.guess * missing.mean()

        if self.training:
            self.frames_seen += out.frames.sum().item()
            self.tokens_seen += out.lengths.sum().item()
        return torch.stack(out.hidden_states, 1), out.lengths

    def watch(self) -> dict:
        """λ at the end of the epoch, and the mean frame period in ms over its training batches."""
        period = FRAME_MS * self.frames_seen / self.tokens_seen
        self.frames_seen = 0
        self.tokens_seen = 0
        return {"lam": self.lam.item(), "period_ms": period}


# 3. A point for each start and seed: λ is learned, then a head is trained at it.


def main():
    parser = build_parser()
    args = parser.parse_args()
    check(args)
    encoder, task, config = finetune.prepare(args)
    if encoder.config.compression != "cif":
        raise ValueError(
            f"{args.checkpoint} has one fixed rate ({encoder.config.compression}): "
            "there is no λ to learn"
        )
    check_freeze(args, task)
    frames = None
    for start in args.lam:
        from_start = {**config, "start": start}
        stem = f"{args.task}-price{args.price:g}-from{start:g}"
        for seed, path in finetune.unfinished(args, from_start, stem).items():
            if not frames:
                frames = FrameCache(task.speech, encoder, args.device, args.keep == "memory")
            began = time.time()
            lam, search = learn_lam(args, task, frames, start, seed)
            search_s = time.time() - began
            states = HiddenStateCache(
                task.speech, args.features, encoder, lam, args.device, frames, args.keep == "memory"
            )
            result, head = finetune.train(args, task, states, seed)
            if args.save_heads:
                finetune.save_head(path.with_suffix(".pt"), head, encoder, lam, task)
            point = {
                "config": {**from_start, "seed": seed},
                "command": command("adaptive_lambda.py", parser, args, start, seed),
                "lam": lam,
                **result,
                "search": search,
                "search_s": search_s,
                **cost_of(states, frames),
                "train_s": time.time() - began,
            }
            save_point(path, point)
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


def learn_lam(args, task, frames, start, seed):
    """λ after --lam-epochs with a head that is not kept; and the history of these epochs."""
    needed = None
    if task.kind == "ctc":
        needed = [emissions(text) / args.symbols_per_token for text in task.targets]
    source = LearnedLam(
        start,
        frames.encoder,
        frames,
        lr=args.lam_lr,
        freeze=args.freeze,
        price=args.price,
        needed=needed,
        guess=math.log(len(task.symbols) + 1),
    )
    # λ is to settle: it gets all its epochs, whatever the validation split says meanwhile.
    searching = argparse.Namespace(**vars(args))
    searching.epochs = args.lam_epochs
    searching.patience = args.lam_epochs
    result, _ = finetune.train(searching, task, source, seed)
    return source.lam.item(), result["history"]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"adaptive_lambda.py: {error}")
    except KeyboardInterrupt:
        sys.exit(
            "adaptive_lambda.py: stopped; the same command goes on from the last finished point"
        )
