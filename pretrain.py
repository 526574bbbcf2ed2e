"""Once-for-all pre-training: distil a teacher at a λ that is drawn anew at every step.

The student encodes a batch at λ, which shortens it; `expand` spreads its last hidden states back over the frames, and one
linear head per taught layer predicts the teacher's vectors h there. α is guided by pseudo-boundaries (boundaries.py):

    loss = Σ_layers mean over frames of  |ĥ - h|₁ / D - log σ(cos(ĥ, h))            distillation (DistilHuBERT)
         + 0.5  · mean over frames of    |α_s - pseudo-α_s|                         frame guidance (OFA)
         + 0.05 · mean over segments of  |α_1 + … + α_e(i) - i|                     segments i = 1, 2, …, ending at frames e(i)
         + q    · mean over utterances of |mean α - target|                         quantity, optional (--quantity q)

The guidance acts on α before λ changes it. Frames of a dropped tail belong to no token: they carry no distillation loss.

One loop serves a CPU, a GPU, and many (torchrun). Everything random at a step, λ and data order included, is a function of
(seed, step), so that a run that was stopped goes on exactly (--resume), and all processes draw the same λ. A step's batch is
dealt out among processes and accumulated parts; losses are divided by the whole batch's counts, so the deal does not matter (but for dropout).

Sources: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models", ICASSP 2023;
Chang, Yang and Lee, "DistilHuBERT", ICASSP 2022.

    python pretrain.py --out runs/demo                                     two CPU cores, the embedded corpus
    torchrun --nproc-per-node 8 pretrain.py --preset base --teacher hubert_base --data librispeech:train-clean-100 ...
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cosine_similarity, logsigmoid
from tqdm import tqdm

import boundaries
from cif import expand
from data import batches, load, loader
from evaluate import PERIODS_MS, evaluate, print_table
from figures import utterance_figure
from files import load_checkpoint, save
from flags import check_numbers, pick_device, use_bf16
from ofa_encoder import COMPRESSIONS, FRAME_MS, PRESETS, SAMPLE_RATE, OFAEncoder, check_lam, lam_from_period, period_from_lam
from teachers import initialise, load_teacher


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Pre-train a once-for-all encoder, or a fixed-rate peer of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="asterisk", help="asterisk, librispeech:SUBSET[+SUBSET], or a folder of sound files")
    add("--root", default="data", help="folder for what is downloaded and cached")
    add("--teacher", default="mfcc", help="mfcc, hubert_base, or a file with the state_dict of a torchaudio HuBERT / wav2vec 2.0")
    add("--teacher-layers", type=int, nargs="+", help="layers to distil; None: at a third, two thirds and the end")
    add("--teacher-heads", type=int, help="attention heads of a teacher from a file; None: its width / 64")
    add("--boundaries", help="file of segment boundaries (see boundaries.py); None: found from the teacher's codes")
    add("--segment-ms", type=float, default=90.0, help="mean length of the segments that are found")
    add("--preset", choices=PRESETS, default="tiny", help="sizes of the encoder")
    add("--layers", type=int, default=2, help="its Transformer layers")
    add("--compression", choices=COMPRESSIONS, default="cif", help="cif follows λ; the others are fixed-rate peers")
    add("--lam", type=float, help="train at this λ alone (a single-rate peer); None: draw λ at each step")
    add("--lam-distribution", choices=("uniform", "uniform-period"), default="uniform", help="draw λ, or the period in ms, uniformly")
    add("--lam-max", type=float, default=1.6, help="largest λ drawn, at most 2")
    add("--quantity", type=float, default=0.0, help="weight of the loss that pulls mean α to 20 / segment-ms")
    add("--out", default="runs/pretrain", help="folder for the checkpoint, table and figure")
    add("--steps", type=int, default=1200, help="optimiser steps")
    add("--batch-seconds", type=float, default=32.0, help="audio in a step's batch, over all processes and accumulated parts")
    add("--accumulate", type=int, default=1, help="parts in which each process takes its share of a batch")
    add("--lr", type=float, default=1e-3, help="peak learning rate; it falls linearly to 0")
    add("--warmup", type=int, default=60, help="steps over which it rises")
    add("--clip", type=float, default=5.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of weights, data order and λ")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best there is")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 autocast on CUDA and on CPUs made for it")
    add("--workers", type=int, default=0, help="processes that read sound ahead of time")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args(argv)
    if args.lam is not None:
        check_lam(args.lam)
    if not 0 < args.lam_max <= 2:
        raise ValueError(f"--lam-max is {args.lam_max}, expected a number over 0, at most 2")
    if args.compression != "cif":
        if args.lam:
            raise ValueError(f"--lam is for --compression cif; {args.compression} has one rate")
        args.lam = 0.0
    check_numbers(args, "steps", "layers", "accumulate", "batch_seconds", "lr", "warmup", "clip", "save_every", "teacher_heads")
    check_numbers(args, "quantity", "seed", "workers", zero=True)
    if not FRAME_MS <= args.segment_ms < 1e9:
        raise ValueError(f"--segment-ms is {args.segment_ms}, expected {FRAME_MS} or more")
    return args


class Distiller(nn.Module):
    """Encoder, and a head for each taught layer."""

    def __init__(self, encoder: OFAEncoder, teacher_dims: list[int]):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.dim, dim) for dim in teacher_dims)

    def forward(self, waveforms, lengths, targets, lam):
        """targets: list of (B, S, D_teacher). Returns the encoder's output, and for each layer the distillation loss of
        each frame, with the part of the frame that some token covers: (layers, B, S), (B, S)."""
        out = self.encoder(waveforms, lengths, lam)
        hidden = out.hidden_states[-1].float()
        frames = expand(hidden, out.fired)                                       # (B, S, D)
        covered = expand(torch.ones_like(hidden[:, :, :1]), out.fired)[:, :, 0]  # (B, S), zero in the padding
        losses = []
        for head, target in zip(self.heads, targets):
            predicted = head(frames).float()
            losses.append((predicted - target).abs().mean(2) - logsigmoid(cosine_similarity(predicted, target, dim=2)))
        return out, torch.stack(losses), covered

    @classmethod
    def from_checkpoint(cls, path):
        """The encoder and heads in a checkpoint.pt of pretrain.py, in eval mode, and the arguments of its run."""
        content = load_checkpoint(path)
        if "heads" not in content:
            raise ValueError(f"{path} holds no heads: give the checkpoint.pt that pretrain.py writes, not encoder.pt")
        encoder = OFAEncoder.from_checkpoint(path)
        try:
            distiller = cls(encoder, [len(v) for k, v in content["heads"].items() if k.endswith("bias")])
            distiller.heads.load_state_dict(content["heads"])
            return distiller.eval(), content["args"]
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error!r:.200})") from None


def guidance(alpha, pseudo, number):
    """Summed frame and segment losses of α (B, S); pseudo-α and segment numbers (B, S) from boundaries.pseudo_alpha."""
    in_utterance, at_end = pseudo > 0, number > 0
    return ((alpha - pseudo).abs() * in_utterance).sum(), ((alpha.cumsum(1) - number).abs() * at_end).sum()


def draw_lam(args, step, mean_alpha) -> float:
    """λ of a step: the same on every machine, before and after a stop."""
    u = np.random.default_rng([args.seed, step]).uniform()
    if args.lam is not None:
        return args.lam
    lam_max = min(args.lam_max, 1.99)  # at 2, α′ is 0 and nothing fires
    if args.lam_distribution == "uniform":
        return u * lam_max
    return lam_from_period(FRAME_MS + u * (period_from_lam(lam_max, mean_alpha) - FRAME_MS), mean_alpha)


# Flags that may differ when a run is resumed: they change where and how fast it runs. (Another device rounds differently.)
FREE = {"resume", "device", "workers", "save_every", "root", "out"}


def main():
    args = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:  # the others wait while rank 0 fetches the corpus and finds boundaries
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} is the checkpoint of an earlier run: go on with it by --resume, or choose another --out")
    if world > 1 and rank > 0:
        dist.barrier()
    speech = load(args.data, args.root)
    teacher = load_teacher(args.teacher, args.teacher_layers, args.teacher_heads).to(device)
    train, valid = speech.part("train"), speech.part("valid")
    path = args.boundaries or boundaries.cache_path(train, args.teacher, teacher.layers[-1], args.segment_ms, args.root)
    if not args.boundaries and not path.exists():
        boundaries.segment(train, teacher, path, args.segment_ms, device=device)
    ends = boundaries.read(path, train)
    if world > 1 and rank == 0:
        dist.barrier()

    torch.manual_seed(args.seed)
    encoder = OFAEncoder(replace(PRESETS[args.preset], layers=args.layers, compression=args.compression))
    copied = initialise(encoder, teacher)
    model = Distiller(encoder, teacher.dims).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    first = resume(checkpoint, model, optimizer, args) if checkpoint.exists() else 0
    if rank == 0:
        for partial in out.glob("checkpoint.pt.*.partial"):  # what a run left that was killed while it wrote
            partial.unlink()
        print(f"{args.preset} encoder, {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters ({copied / 1e6:.2f} M "
              f"from the teacher); {len(train)} utterances, {train.seconds / 3600:.2f} h; {world} x {device}, "
              f"{'bf16' if use_bf16(args, device) else 'fp32'}; steps {first} to {args.steps}")
    train_loop(args, model, optimizer, teacher, train, valid.few(200), ends, first, device, rank, world, checkpoint)
    if rank == 0:
        report(args, model, teacher, speech.part("test"), device, out)
    if world > 1:
        dist.destroy_process_group()


def train_loop(args, model, optimizer, teacher, train, held_out, ends, first, device, rank, world, checkpoint):
    mean_alpha = sum(len(e) for e in ends) / sum(int(e[-1]) for e in ends)                # of the pseudo-α
    parts = args.accumulate
    plan = lambda: islice(batches(train, args.batch_seconds, args.seed), first, args.steps)
    dealt = (batch[rank + world * part :: world * parts] for batch in plan() for part in range(parts))
    arriving = loader(train, dealt, args.workers)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(plan(), total=args.steps, initial=first, desc="pre-training", disable=rank > 0, smoothing=0.05)
    started, heard = time.time(), 0.0
    for step, batch in enumerate(bar, first):
        lam = draw_lam(args, step, mean_alpha)
        torch.manual_seed(hash((args.seed, step, rank)))                                 # dropout
        n_frames, n_segments = sum(int(ends[i][-1]) for i in batch), sum(len(ends[i]) for i in batch)
        non_finite = lambda what: FloatingPointError(
            f"step {step}, λ = {lam:.3f}: {what}, utterances {[train.utterances[i].id for i in batch]}; "
            + (f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"))
        total, period = 0.0, 0.0
        for part in range(parts):
            used, waveforms, lengths = next(arriving)
            waveforms, lengths = waveforms.to(device), lengths.to(device)
            pseudo, number = (t.to(device) for t in boundaries.pseudo_alpha([ends[i] for i in used]))
            targets = teacher(waveforms, lengths)
            if world > 1:
                parallel.require_backward_grad_sync = part == parts - 1                  # gradients are exchanged once a step
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(args, device)):
                    encoded, distillation, covered = parallel(waveforms, lengths, targets, lam)
            except ValueError as error:                                                  # α is NaN
                raise non_finite(error) from None
            loss = (distillation * covered).sum() / n_frames
            if args.compression == "cif":
                frame, segment = guidance(encoded.alpha, pseudo, number)
                loss = loss + 0.5 * frame / n_frames + 0.05 * segment / n_segments
                if args.quantity:
                    mean = (encoded.alpha * (pseudo > 0)).sum(1) / encoded.frames
                    loss = loss + args.quantity * (mean - FRAME_MS / args.segment_ms).abs().sum() / len(batch)
            loss = loss * bool(used)                                                     # nothing to hear: no gradient
            (loss * world).backward()                                                    # DDP averages, the loss is a sum
            total, period = total + loss.item(), encoded.frame_period()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if not norm.isfinite():
            raise non_finite(f"loss {total}, gradient {norm.item()}")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup), 1)
        optimizer.step()
        optimizer.zero_grad()
        heard += sum(train.utterances[i].samples for i in batch) / SAMPLE_RATE
        bar.set_postfix_str(f"loss {total * world:.3f}, λ {lam:.2f}, {period:.0f} ms, {heard / (time.time() - started):.0f} s/s")
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            rows, held_out_alpha = evaluate(model, teacher, held_out, (0.0, 0.5, 1.0) if args.lam is None else (args.lam,), device)
            model.encoder.mean_alpha.fill_(held_out_alpha)
            losses = ", ".join(f"{np.mean(row['distillation']):.3f} at λ = {row['lam']:g}" for row in rows)
            bar.write(f"step {step + 1}, held-out loss: {losses}")
            save({**model.encoder.checkpoint(), "heads": model.heads.state_dict(), "optimizer": optimizer.state_dict(),
                  "step": step + 1, "args": vars(args)}, checkpoint)


def resume(checkpoint, model, optimizer, args) -> int:
    """Load a checkpoint of the same run into model and optimizer; returns the step with which to go on."""
    content = load_checkpoint(checkpoint)
    if "optimizer" not in content:
        raise ValueError(f"{checkpoint} can't be resumed: pretrain.py did not write it")
    try:
        differ = {k: (v, content["args"].get(k)) for k, v in vars(args).items() if k not in FREE and content["args"].get(k) != v}
        if not differ:
            model.encoder.load_state_dict(content["encoder"])
            model.heads.load_state_dict(content["heads"])
            optimizer.load_state_dict(content["optimizer"])
            return content["step"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} can't be resumed: it is damaged ({error!r:.200}). Choose another --out") from None
    raise ValueError(f"{checkpoint} is of another run (flag: now, then): {differ}. Choose another --out")


def report(args, model, teacher, test, device, out):
    """Table, table.json, encoder.pt and figure.png of the finished run."""
    encoder = model.encoder
    save(encoder.checkpoint(torch.float16), out / "encoder.pt")
    lams = [encoder.lam_for(ms) for ms in PERIODS_MS] if args.lam is None else [args.lam]
    rows, mean_alpha = evaluate(model, teacher, test, lams, device)
    print_table(rows, mean_alpha, teacher.layers)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__}"
    table = {"rows": rows, "mean_alpha": mean_alpha, "args": vars(args), "machine": machine, "date": time.strftime("%Y-%m-%d")}
    (out / "table.json").write_text(json.dumps(table, indent=1))
    # An English utterance of three seconds or so, if there is one, shows most.
    shown = min(range(len(test)), key=lambda i: (test.utterances[i].language not in ("en", ""), abs(test.utterances[i].samples - 48_000)))
    shown_lams = [lams[PERIODS_MS.index(ms)] for ms in (25, 50, 90)] if len(lams) > 1 else lams
    model.to("cpu").eval()
    utterance_figure(encoder, test[shown], test.utterances[shown].text, shown_lams, out / "figure.png")
    print(f"wrote {out}/encoder.pt (load it with OFAEncoder.from_checkpoint), table.json and figure.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        sys.exit("pretrain.py: another process has died, see its message; the same command with --resume goes on from the last checkpoint")
    except KeyboardInterrupt:
        sys.exit("pretrain.py: stopped; the same command with --resume goes on from the last checkpoint")
