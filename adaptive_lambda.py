"""λ as a parameter of the task: learned by gradient with the head, instead of searched for on a grid.

    λ = 2 σ(r)      r is the parameter, so that 0 < λ < 2 whatever the optimiser does
    loss(head, λ) + price · mean α′

The encoder is frozen, yet λ's gradient passes through it: loss → hidden states → tokens → widths of CIF's pieces → α′ → λ.
Where α′ moves a token's end, frames change hands between neighbours, and the loss says whether that was for the better. Two
things the gradient does not see: the *number* of tokens, which changes by jumps, and how the head would fare had it been
trained at another λ from the start. mean α′ is tokens per frame: at λ = 0, where it is 1, `price` is added to the loss,
at λ = 1 about 0.23 of it. So a price says how much loss a saved token is worth.

λ has its own learning rate and no weight decay, and stays where it starts for the first steps (--freeze): a head that knows
nothing yet, CTC's that emits only blanks above all, gives it a gradient of noise.

Source: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models", ICASSP 2023, adaptive
compressing rate learning. Tasks, heads, stopping and points are finetune.py's.

    python adaptive_lambda.py --checkpoint checkpoints/ofa-tiny.pt --task ctc --lam 0.1 0.6 1.2 --seeds 3 --out runs/adaptive
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from finetune import arguments, check, command, cost_of, is_there, prepare, save_point, train
from heard import Frames, Heard
from ofa_encoder import FRAME_MS


class LearnedLam(nn.Module):
    """As Heard, but at a λ that is learned. frames: what the CNN made of each utterance; freeze: steps for which λ rests."""

    def __init__(self, start, encoder, frames: Frames, freeze):
        super().__init__()
        self.raw = nn.Parameter(torch.logit(torch.tensor(start / 2, device=frames.device)))
        self.encode = lambda indices, lam: encoder.encode(*frames(indices), lam)  # not a submodule: the encoder stays as it is
        self.left, self.frames, self.tokens = freeze, 0, 0

    @property
    def lam(self):
        return 2 * self.raw.sigmoid()

    def forward(self, indices):
        lam = self.lam
        if self.training and self.left > 0:
            self.left, lam = self.left - 1, lam.detach()
        out = self.encode(indices, lam)
        self.mean_weight = out.fired.alpha.sum() / out.frames.sum()               # mean α′ of the batch
        self.frames, self.tokens = self.frames + out.frames.sum().item(), self.tokens + out.lengths.sum().item()
        return torch.stack(out.hidden_states, 1), out.lengths

    def watch(self) -> dict:
        """λ, and the mean frame period in ms since it was last asked for."""
        period, self.frames, self.tokens = FRAME_MS * self.frames / self.tokens, 0, 0
        return {"lam": self.lam.item(), "period_ms": period}


def main():
    parser = arguments("Learn λ with a head, on the frozen encoder.", lam="each λ to start from")
    parser.set_defaults(lam=[0.1, 0.6, 1.2])
    parser.add_argument("--lam-lr", type=float, default=0.02, help="learning rate of r, where λ = 2 σ(r)")
    parser.add_argument("--freeze", type=int, default=400, help="steps for which λ rests where it starts")
    parser.add_argument("--price", type=float, default=0.0, help="added to the loss, times tokens per frame")
    args = parser.parse_args()
    check(args)
    if args.features != "encoder" or args.unfreeze:
        raise ValueError("λ is learned on a frozen, pre-trained encoder: --features and --unfreeze are for finetune.py")
    if 0 in args.lam:
        raise ValueError("--lam 0 is the end of the scale, from where λ = 2 σ(r) can't move: start from 0.05, say")
    for name in ("lam_lr", "freeze", "price"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more")
    encoder, task, config = prepare(args)
    if encoder.config.compression != "cif":
        raise ValueError(f"{args.checkpoint} has one fixed rate ({encoder.config.compression}): there is no λ to learn")
    frames = None
    for start in args.lam:
        for seed in range(args.seed, args.seed + args.seeds):
            path = Path(args.out) / f"{args.task}-price{args.price:g}-from{start:g}-seed{seed}.json"
            if is_there(path, {**config, "start": start, "seed": seed}):
                continue
            frames = frames or Frames(task.speech, encoder, args.device, args.keep == "memory")
            began, learner = time.time(), LearnedLam(start, encoder, frames, args.freeze)
            point = train(args, task, learner, seed, [{"params": [learner.raw], "lr": args.lam_lr, "weight_decay": 0.0}],
                          lambda: args.price * learner.mean_weight, learner.watch)
            took, lam = time.time() - began, learner.lam.item()
            heard = Heard(task.speech, args.features, encoder, lam, args.device, frames, args.keep == "memory")
            save_point(path, {"config": {**config, "start": start, "seed": seed},
                              "command": command("adaptive_lambda.py", parser, args, start, seed), "metric": task.metric, "lam": lam,
                              **point, **cost_of(heard, frames), "train_s": took})
            print(f"λ = {start:g} -> {lam:.3f} ({heard.period_ms:.1f} ms), seed {seed}: test {task.metric} {point['test']:.1f} % "
                  f"after {point['epochs']} epochs, {took:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"adaptive_lambda.py: {error}")
    except KeyboardInterrupt:
        sys.exit("adaptive_lambda.py: stopped; the same command goes on from the last finished point")
