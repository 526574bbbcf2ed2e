"""Once-for-all pre-training: distil a teacher at several λ, drawn anew at every step.

The student turns a batch into frames once, and encodes them at K values of λ, each of which
shortens the sequence differently. `expand` spreads the last hidden states back over the frames,
and one linear head for each distilled layer predicts the teacher's vectors h there:

    waveforms ─── CNN ─── frames ──┬── encode at λ_1 ── (B, T_1, D) ── expand ──┐
    (B, samples)         (B, S, C) ├── encode at λ_2 ── (B, T_2, D) ── expand ──┼── heads
                                   └── …                                        ┘

    loss = mean over λ of Σ_layers mean over frames of  |ĥ - h|₁ / D_h - log σ(cos(ĥ, h))
         + 0.5  · mean over frames of    |α_s - pseudo-α_s|            guidance by frames
         + 0.05 · mean over segments of  |α_1 + … + α_e(i) - i|        segment i ends at frame e(i)
         + q    · mean over utterances of |mean α - 20 ms / segment|   quantity, optional

The first line is DistilHuBERT's loss (ĥ is what a head predicts, D_h the size of the teacher's
vectors), the next two are once-for-all's. Guidance acts on α *before* λ changes it: one unit of
mass for each segment is what λ then scales, whatever λ was drawn.

With --alpha segments the predictor learns where segments end, and while it learns, pseudo-α is used
in place of α. Guidance then is the cross entropy of its probability that a segment ends with a
frame. How probable an end must be to count is set on held-out speech, so that its segments last
--segment-ms.

The CNN and the teacher do not depend on λ and are most of the work, so K = 3 values of λ cost less
than twice what one costs, not three times (docs/speed.md). λ = 0 is always among them: few steps
would come near it by chance, and then its loss ends above that of λ = 0.26, where it should be the
lowest (0.801 beside 0.766 with K = 1 in results/results.md). The paper takes one λ for each batch,
and accumulates many batches before it updates the weights.

One loop serves a CPU, a GPU, and many (torchrun). Whatever is random at a step, λ and the order of
data included, is a function of (seed, step); dropout also of the process. So a run that was stopped
goes on as if it had not been (--resume), and all processes draw the same λ. A batch is dealt out
among processes and accumulated parts, and losses are divided by the counts of the whole batch: but
for dropout and rounding it makes no difference how it was dealt.

Sources: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models",
ICASSP 2023, section 3; Chang, Yang and Lee, "DistilHuBERT", ICASSP 2022, section 2. Several λ on
one batch: after the sandwich rule of Yu and Huang, "Universally slimmable networks", ICCV 2019.

    python pretrain.py --out runs/demo                 two CPU cores, the embedded corpus
    torchrun --nproc-per-node 8 pretrain.py --preset base --teacher hubert_base --data librispeech:…
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import hashlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy, cosine_similarity, logsigmoid
from tqdm import tqdm

from cif import expand
from ofa_encoder import (
    ALPHAS,
    COMPRESSIONS,
    CONSTANT_ALPHA,
    FRAME_MS,
    PRESETS,
    SAMPLE_RATE,
    Encoded,
    OFAEncoder,
    check_lam,
    frames_of,
    lam_from_period,
    load_checkpoint,
    peaks,
    period_from_lam,
    transformer_gflops,
)
from parts import boundaries
from parts.data import Speech, batches, by_length, load, loader
from parts.figures import utterance_figure
from parts.runs import (
    check_numbers,
    check_unused,
    machine,
    pick_device,
    save,
    save_text,
    use_bf16,
)
from parts.targets import MODES, KeptTargets, cache_path, targets_of
from parts.teachers import fingerprint, initialise, load_teacher

PERIODS_MS = (20, 25, 33, 50, 90, 180)  # of the final table: asked in ms, answered by λ
MAX_GRADIENT_NORM = 5.0
LEARNED = 0.95  # a loss above this share of the constant answer's means that nothing was learned

# Flags that may change when a run is resumed: they say where it runs, not what it computes (but for
# --precision auto, which follows the device).
MAY_CHANGE = {"resume", "device", "workers", "accumulate", "save_every", "root", "out"}


# 1. The command line.


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Pre-train a once-for-all encoder, or a fixed-rate peer of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="asterisk", help="asterisk, librispeech:SUBSET[+SUBSET], or a folder")
    add("--root", default="data", help="folder for what is downloaded and cached")
    add(
        "--teacher",
        default="mfcc",
        help="mfcc, hubert_base, a FILE, a FOLDER, or a name on the hub: see parts/teachers.py",
    )
    add("--teacher-layers", type=int, nargs="+", help="None: at a third, two thirds, the end")
    add(
        "--keep-targets",
        choices=MODES,
        default="auto",
        help="ask the teacher once and keep what it says under --root; auto: if that is there, or "
        "the teacher has weights and it takes up to 2 GB and a tenth of the free disk",
    )
    add("--boundaries", help="file of segment boundaries; None: found from the teacher")
    add(
        "--segment-ms",
        type=float,
        default=boundaries.SEGMENT_MS,
        help="mean length of the segments found, or of those in --boundaries",
    )
    add("--preset", choices=PRESETS, default="tiny", help="sizes of the encoder")
    add("--layers", type=int, default=2, help="its Transformer layers")
    add("--compression", choices=COMPRESSIONS, default="cif", help="cif follows λ; others: peers")
    add("--alpha", choices=ALPHAS, default="regression", help="where α comes from: ofa_encoder.py")
    add("--lam", type=float, help="train at this λ alone; None: draw λ at each step")
    add("--lams-per-step", type=int, default=3, help="K, how many λ a step encodes its batch at")
    add(
        "--lam-distribution",
        choices=("uniform", "uniform-period"),
        default="uniform",
        help="what is uniform when λ is drawn: λ itself, or the frame period",
    )
    add("--lam-max", type=float, default=1.6, help="largest λ drawn, at most 2")
    add("--quantity", type=float, default=0.0, help="weight q of the loss on mean α")
    add("--out", default="runs/pretrain", help="folder for checkpoint, table and figure")
    add("--steps", type=int, default=1200, help="optimiser steps")
    add("--batch-seconds", type=float, default=32.0, help="audio in a step, over all processes")
    add("--accumulate", type=int, default=1, help="parts in which a process takes its share")
    add("--lr", type=float, default=1e-3, help="peak learning rate; it falls linearly to 0")
    add("--warmup", type=int, default=60, help="steps over which it rises")
    add("--seed", type=int, default=0, help="of weights, data order and λ")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best")
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: bf16 autocast on CUDA, fp32 elsewhere",
    )
    add("--workers", type=int, default=0, help="processes that read sound ahead of time")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    args = parser.parse_args(argv)

    if args.lam is not None:
        check_lam(args.lam)
    if not 0 < args.lam_max <= 2:
        raise ValueError(f"--lam-max is {args.lam_max}, expected a number over 0, at most 2")
    if args.compression != "cif":
        if args.lam or args.quantity:
            raise ValueError(
                f"--lam and --quantity are for --compression cif; {args.compression} has one rate"
            )
        args.lam = 0.0
    if args.lam is not None:
        drawn = ("lams_per_step", "lam_distribution", "lam_max")
        check_unused(args, parser, drawn, "is for a λ that is drawn, and here it is one")
    check_numbers(args, "steps", "layers", "accumulate", "batch_seconds", "lr", "warmup")
    check_numbers(args, "lams_per_step", "save_every")
    check_numbers(args, "quantity", "seed", "workers", zero=True)
    if args.alpha == "segments" and (args.compression != "cif" or args.quantity):
        raise ValueError(
            "--alpha segments is for --compression cif, and goes without --quantity: "
            "the number of segments has no gradient"
        )
    longest = FRAME_MS * boundaries.LONGEST / 2  # twice that is the most that a segment can last
    if not FRAME_MS <= args.segment_ms <= longest:
        raise ValueError(f"--segment-ms is {args.segment_ms}, expected {FRAME_MS} to {longest:g}")
    return args


# 2. The model that is trained, and its losses.


def distillation_loss(predicted, target):
    """DistilHuBERT's loss of each frame, |ĥ - h|₁ / D_h - log σ(cos(ĥ, h)).

    predicted, target (B, S, D_h) -> (B, S).
    """
    distance = (predicted - target).abs().mean(2)
    return distance - logsigmoid(cosine_similarity(predicted, target, dim=2))


class Distiller(nn.Module):
    """The student: the encoder, and a linear head for each distilled layer of the teacher."""

    def __init__(self, encoder: OFAEncoder, teacher_dims: list[int]):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.dim, dim) for dim in teacher_dims)

    def forward(self, waveforms, lengths, targets, lams, ends=None):
        """What `distil` returns, for each λ, on one pass of the CNN.

        waveforms (B, samples) at 16 kHz, lengths (B,) in samples; targets: the teacher's vectors,
        (B, S, D_teacher) for each layer; ends (B, S) bool: where segments end, if it is known.
        """
        x, frames = self.encoder.features(waveforms, lengths)  # (B, S, C), (B,)
        return [self.distil(self.encoder.encode(x, frames, lam, ends), targets) for lam in lams]

    def distil(self, encoded: Encoded, targets):
        """The encoder's output; the loss of each layer and frame, (layers, B, S); and `covered`
        (B, S), how much of each frame belongs to some token: 0 in the padding and in a dropped
        tail, of which nothing can be predicted.

        `covered` weighs the loss, so it must not have a gradient: α could lower the loss by
        dropping the tail instead of by predicting it.
        """
        hidden = encoded.hidden_states[-1].float()  # (B, T, D)
        frames = expand(hidden, encoded.fired)  # (B, S, D)
        covered = expand(torch.ones_like(hidden[:, :, :1]), encoded.fired)[:, :, 0].detach()
        losses = [
            distillation_loss(head(frames).float(), target)
            for head, target in zip(self.heads, targets)
        ]
        return encoded, torch.stack(losses), covered


def guidance(alpha, pseudo, number):
    """Summed frame and segment losses of α (B, S), before λ.

    pseudo, number (B, S): pseudo-α and segment numbers, as boundaries.pseudo_alpha returns them;
    pseudo-α is zero in the padding, and the number is zero except at a segment's last frame.
    """
    in_utterance = pseudo > 0
    at_end = number > 0
    frame_loss = ((alpha - pseudo).abs() * in_utterance).sum()
    segment_loss = ((alpha.cumsum(1) - number).abs() * at_end).sum()
    return frame_loss, segment_loss


def draw_lams(args, step, mean_alpha) -> list[float]:
    """The λ of a step: the same on every machine, before and after a stop.

    With K > 1 the first is 0, and the others come one from each of K - 1 equal parts of the range.
    """
    if args.lam is not None:
        return [args.lam]
    random = np.random.default_rng([args.seed, step])
    if args.lams_per_step == 1:
        shares = [random.uniform()]  # of the range, 0 to 1
    else:
        rest = args.lams_per_step - 1
        shares = [0.0, *((part + random.uniform()) / rest for part in range(rest))]
    lam_max = min(args.lam_max, 1.99)  # at 2, α′ is 0 and nothing fires
    if args.lam_distribution == "uniform":
        return [share * lam_max for share in shares]
    longest = period_from_lam(lam_max, mean_alpha)
    periods = [FRAME_MS + share * (longest - FRAME_MS) for share in shares]
    return [lam_from_period(period, mean_alpha) for period in periods]


# 3. One run, from start to end.


@dataclass
class Place:
    """Where a run takes place: its device, and which of how many processes this is."""

    device: torch.device
    rank: int  # of this process, 0 to world - 1; rank 0 prints and writes
    world: int


@dataclass
class Lesson:
    """What is taught: the teacher, speech to learn from and to check on, and segment ends."""

    teacher: nn.Module | None  # whose weights the student starts from; None after that
    targets: nn.Module | KeptTargets  # the teacher, or what is kept of it: for targets_of
    train: Speech
    held_out: Speech
    ends: list[np.ndarray]  # of the segments of each training utterance, in frames


def main():
    args = parse_arguments()
    place = start_processes(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise ValueError(
            f"{checkpoint} is the checkpoint of an earlier run: go on with it by --resume, "
            "or choose another --out"
        )
    if checkpoint.exists():
        read_checkpoint(checkpoint, args)  # refuses that of another run, before any work
    lesson, test = prepare(args, place)

    # The student starts from the teacher's weights wherever the shapes agree.
    torch.manual_seed(args.seed)
    config = replace(
        PRESETS[args.preset],
        layers=args.layers,
        compression=args.compression,
        alpha=args.alpha,
    )
    encoder = OFAEncoder(config)
    copied = initialise(encoder, lesson.teacher)
    lesson.teacher = None  # where its targets are kept, this frees its memory
    model = Distiller(encoder, lesson.targets.dims).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    first_step = 0
    if checkpoint.exists():
        first_step = resume(checkpoint, model, optimizer, lesson, args)

    if place.rank == 0:
        for partial in out.glob("checkpoint.pt.*.partial"):  # of a run killed while it wrote
            partial.unlink()
        size = sum(p.numel() for p in encoder.parameters())
        print(
            f"{args.preset} encoder, {size / 1e6:.2f} M parameters ({copied / 1e6:.2f} M from the "
            f"teacher); {len(lesson.train)} utterances, {lesson.train.seconds / 3600:.2f} h; "
            f"{place.world} x {place.device}, {'bf16' if use_bf16(args, place.device) else 'fp32'}"
            f"; steps {first_step} to {args.steps}"
        )
    train_loop(args, place, lesson, model, optimizer, first_step, checkpoint)
    problem = report(args, place, model, lesson.targets, test) if place.rank == 0 else ""
    if place.world > 1:
        dist.destroy_process_group()
    if problem:
        raise ValueError(problem)


def start_processes(args) -> Place:
    """torchrun says by environment variables which of how many processes this is."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    device = pick_device(args.device)
    use_bf16(args, device)  # refuses what the device can't do, before any work
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        if device.type == "mps":
            raise ValueError("several processes can't share MPS: --device cpu, or one process")
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Hours, since the other processes wait while rank 0 downloads and finds boundaries.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return Place(device, rank, world)


def prepare(args, place) -> tuple[Lesson, Speech]:
    """The lesson, and test speech. Rank 0 goes first and leaves its files to the others."""
    if place.rank > 0:
        dist.barrier()
    teacher = load_teacher(args.teacher, args.teacher_layers)
    teacher_id = fingerprint(teacher)  # on the CPU, so that all processes agree
    teacher = teacher.to(place.device)
    speech = load(args.data, args.root)
    train = speech.part("train")
    if args.boundaries:  # what may be wrong comes before what may take hours
        ends = boundaries.read_boundaries(args.boundaries, train)
    targets = keep_targets(args, place, speech, teacher, teacher_id)
    if not args.boundaries:
        ends = boundaries.found_boundaries(
            train, targets, teacher_id, args.segment_ms, args.root, place.device
        )
    if place.world > 1 and place.rank == 0:
        dist.barrier()
    held_out = speech.part("valid").subset(200)
    return Lesson(teacher, targets, train, held_out, ends), speech.part("test")


def keep_targets(args, place, speech, teacher, teacher_id):
    """What targets_of shall read or ask: kept targets of all speech, or the teacher. Sets
    args.keep_targets to what was decided."""
    kept = KeptTargets(cache_path(speech, teacher_id, args.root), speech, teacher, place.device)
    if place.rank == 0 and kept.wanted(args.keep_targets, teacher):
        kept.write(teacher)
    # The other processes take what rank 0 has left.
    found = args.keep_targets != "never" and kept.complete()
    # It is written into the checkpoint. A run that goes on must not decide anew, since float16
    # targets give other weights.
    args.keep_targets = "always" if found else "never"
    return kept if found else teacher


def train_loop(args, place, lesson, model, optimizer, first_step, checkpoint):
    """All steps from first_step on, with a checkpoint now and then, and one at the end."""
    device, train, ends = place.device, lesson.train, lesson.ends
    segments = sum(len(e) for e in ends)
    frames = sum(int(e[-1]) for e in ends)
    mean_pseudo_alpha = segments / frames  # turns periods into λ before α has been learned

    # The plan lists the utterances of every step, for all processes. Each process takes every
    # (world · parts)-th of them for each of its parts, and reads those alone.
    def plan():
        return islice(batches(train, args.batch_seconds, args.seed), first_step, args.steps)

    shares = place.world * args.accumulate
    dealt = (
        batch[place.rank + place.world * part :: shares]
        for batch in plan()
        for part in range(args.accumulate)
    )
    arriving = loader(train, dealt, args.workers)
    parallel = model
    if place.world > 1:
        parallel = nn.parallel.DistributedDataParallel(model)
    bar = tqdm(
        plan(),
        total=args.steps,
        initial=first_step,
        desc="pre-training",
        disable=place.rank > 0,
        smoothing=0.05,
    )
    started = time.time()
    seconds_of_audio = 0.0
    for step, batch in enumerate(bar, first_step):
        # λ depends on the step alone, dropout on the process too: a resumed run draws the same.
        lams = draw_lams(args, step, mean_pseudo_alpha)
        torch.manual_seed(hash((args.seed, step, place.rank)))

        total = 0.0
        for part in range(args.accumulate):
            used, waveforms, lengths = next(arriving)
            waveforms, lengths = waveforms.to(device), lengths.to(device)
            # For no utterance at all the loader gives a frame of silence, which is a segment.
            pseudo, number = boundaries.pseudo_alpha([ends[i] for i in used] or [np.array([1])])
            targets = targets_of(lesson.targets, train, used, waveforms, lengths)
            if place.world > 1:  # gradients are exchanged once, after the last part
                parallel.require_backward_grad_sync = part == args.accumulate - 1
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(args, device)):
                    results = parallel(waveforms, lengths, targets, lams, number.to(device) > 0)
            except ValueError as error:  # cif refuses α that are NaN
                raise non_finite(error, step, lams, batch, train, checkpoint) from None
            loss = step_loss(args, results, pseudo.to(device), number.to(device), batch, ends)
            if not used:  # this process got none of the utterances, or could not read them
                loss = loss * 0
            # DDP takes the mean of the processes' gradients, but the loss is a sum over them.
            (loss * place.world).backward()
            total += loss.item()

        # A gradient that is not finite would spoil the weights: stop before it is used.
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        if not norm.isfinite():
            what = f"loss {total}, gradient {norm.item()}"
            raise non_finite(what, step, lams, batch, train, checkpoint)
        rise = (step + 1) / args.warmup
        fall = (args.steps - step) / max(1, args.steps - args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(rise, fall, 1)
        optimizer.step()
        optimizer.zero_grad()

        seconds_of_audio += sum(train.utterances[i].samples for i in batch) / SAMPLE_RATE
        speed = seconds_of_audio / (time.time() - started)
        shown = " ".join(f"{lam:.2f}" for lam in lams)
        bar.set_postfix_str(f"loss {total * place.world:.3f}, λ {shown}, {speed:.0f} s/s")
        done = step + 1
        if place.rank == 0 and (done % args.save_every == 0 or done == args.steps):
            bar.write(f"step {done}, validation {check_held_out(args, place, model, lesson)}")
            content = {
                **model.encoder.checkpoint(),
                "heads": model.heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "speech": speech_id(train),
                "args": vars(args),
            }
            save(content, checkpoint)


def step_loss(args, results, pseudo, number, batch, ends):
    """The loss at the top of this file, of this process's part of the batch.

    results: of the Distiller; pseudo, number (B, S): guidance. Counts are those of the whole
    batch, wherever its other parts are, so that the parts add up to its mean.
    """
    n_frames = sum(int(ends[i][-1]) for i in batch)
    n_segments = sum(len(ends[i]) for i in batch)
    loss = 0.0
    for _, distillation, covered in results:
        loss = loss + (distillation * covered).sum() / (n_frames * len(results))
    if args.compression == "cif":
        encoded = results[0][0]  # α does not depend on λ: any of the results will do
        if args.alpha == "segments":
            at_end = (number > 0).float()
            in_utterance = (pseudo > 0).float()
            surprise = binary_cross_entropy(
                encoded.predicted, at_end, in_utterance, reduction="sum"
            )
            return loss + surprise / n_frames
        frame_loss, segment_loss = guidance(encoded.alpha, pseudo, number)
        loss = loss + 0.5 * frame_loss / n_frames + 0.05 * segment_loss / n_segments
        if args.quantity:
            mean = (encoded.alpha * (pseudo > 0)).sum(1) / encoded.frames  # (B,)
            off = (mean - FRAME_MS / args.segment_ms).abs().sum()
            loss = loss + args.quantity * off / len(batch)
    return loss


def non_finite(what, step, lams, batch, train, checkpoint) -> FloatingPointError:
    """An error that says where it happened, and what is left."""
    left = "there is no checkpoint yet"
    if checkpoint.exists():
        left = f"the last good checkpoint is {checkpoint}"
    ids = [train.utterances[i].id for i in batch]
    shown = ", ".join(f"{lam:.3f}" for lam in lams)
    return FloatingPointError(f"step {step}, λ = {shown}: {what}, utterances {ids}; {left}")


def read_checkpoint(checkpoint, args) -> dict:
    """The checkpoint of a run with the same flags. Where this run has not decided yet whether to
    keep the teacher's targets, it does as that one did."""
    content = load_checkpoint(checkpoint)
    if "optimizer" not in content:
        raise ValueError(f"{checkpoint} can't be resumed: pretrain.py did not write it")
    try:
        then = dict(content["args"])
        if args.keep_targets == "auto":
            args.keep_targets = then["keep_targets"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(checkpoint, error) from None
    differ = {
        flag: (now, then.get(flag))
        for flag, now in vars(args).items()
        if flag not in MAY_CHANGE and then.get(flag) != now
    }
    if differ:
        raise ValueError(
            f"{checkpoint} is of another run (flag: now, then): {differ}. Choose another --out"
        )
    return content


def resume(checkpoint, model, optimizer, lesson, args) -> int:
    """Load a checkpoint of the same run into model and optimiser; return the step to go on with."""
    content = read_checkpoint(checkpoint, args)
    try:
        same_speech = content["speech"] == speech_id(lesson.train)
        model.encoder.load_state_dict(content["encoder"])
        model.heads.load_state_dict(content["heads"])
        optimizer.load_state_dict(content["optimizer"])
        step = content["step"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(checkpoint, error) from None
    if not same_speech:
        raise ValueError(
            f"{checkpoint} was made with other speech than {args.data} holds now, so its batches "
            "would be others: put back what it held, or choose another --out"
        )
    return step


def damaged(checkpoint, error) -> ValueError:
    return ValueError(
        f"{checkpoint} can't be resumed: it is damaged ({error!r:.200}). Choose another --out"
    )


def speech_id(speech: Speech) -> str:
    """What the plan of batches depends on: which utterances there are, and how long they are."""
    listed = [[u.id, u.samples] for u in speech.utterances]
    return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


# 4. What has been learned, on speech that was held out.


@torch.no_grad()
def constant_loss(teacher, speech: Speech, device) -> list[float]:
    """For each layer, the distillation loss of one constant answer, the mean of the teacher's
    vectors in this speech. An encoder that does no better has learned nothing."""

    def targets():
        """Batches of the teacher's vectors without padding: (frames, D) for each layer."""
        for used, waveforms, lengths in loader(speech, by_length(speech)):
            if used:
                waveforms, lengths = waveforms.to(device), lengths.to(device)
                layers = targets_of(teacher, speech, used, waveforms, lengths)
                frames = [frames_of(n) for n in lengths.tolist()]
                yield [
                    torch.cat([row[:n] for row, n in zip(layer, frames)]).float()
                    for layer in layers
                ]

    sums = [0.0] * len(teacher.dims)
    count = 0
    for layers in targets():
        count += len(layers[0])
        sums = [total + layer.sum(0) for total, layer in zip(sums, layers)]
    means = [total / count for total in sums]  # (D,) for each layer
    losses = np.zeros(len(means))
    for layers in targets():
        for k, (mean, layer) in enumerate(zip(means, layers)):
            losses[k] += distillation_loss(mean.expand_as(layer)[None], layer[None]).sum().item()
    return (losses / count).tolist()


@torch.no_grad()
def evaluate(model: Distiller, teacher, speech: Speech, lams, device):
    """Measure the encoder at each λ: a row (dict) for each, and the mean α of this speech."""
    model.eval()
    rows = [{"lam": lam, "tokens": 0, "loss": 0.0, "covered": 0.0} for lam in lams]
    frames = 0
    mass = 0.0
    for used, waveforms, lengths in loader(speech, by_length(speech)):
        if not used:
            continue
        waveforms, lengths = waveforms.to(device), lengths.to(device)
        targets = targets_of(teacher, speech, used, waveforms, lengths)
        results = model(waveforms, lengths, targets, lams)
        for row, (encoded, losses, covered) in zip(rows, results):
            row["tokens"] += encoded.lengths.sum().item()
            row["loss"] = row["loss"] + (losses * covered).sum((1, 2)).cpu().double()
            row["covered"] += covered.sum().item()
        valid = torch.arange(encoded.alpha.shape[1], device=device) < encoded.frames[:, None]
        frames += encoded.frames.sum().item()
        mass += (encoded.alpha * valid).sum().item()
    mean_alpha = mass / frames

    constant = CONSTANT_ALPHA.get(model.encoder.config.compression)
    for row in rows:
        tokens = row.pop("tokens")
        row["period_ms"] = FRAME_MS * frames / tokens
        row["closed_form_ms"] = (
            FRAME_MS / constant if constant else period_from_lam(row["lam"], mean_alpha)
        )
        row["tokens_per_s"] = 1000 / FRAME_MS * tokens / frames
        row["distillation"] = (row.pop("loss") / row.pop("covered")).tolist()
    model.train()
    return rows, mean_alpha


@torch.no_grad()
def end_threshold(encoder, speech: Speech, segment_ms, device) -> float:
    """How probable the end of a segment must be, for segments of this speech to last segment_ms."""
    found = []  # the probabilities at all peaks
    frames = 0
    for used, waveforms, lengths in loader(speech, by_length(speech)):
        if used:
            x, n = encoder.features(waveforms.to(device), lengths.to(device))
            at_peaks = peaks(encoder.alpha_predictor(x), n)  # (B, S)
            found += at_peaks[at_peaks > 0].tolist()
            frames += n.sum().item()
    # Each utterance has one segment more than ends inside it.
    wanted = round(frames * FRAME_MS / segment_ms) - len(speech)
    found.sort(reverse=True)
    return found[min(wanted, len(found)) - 1] if found and wanted > 0 else 1.0


def count_work(encoder, speech: Speech, rows, device):
    """Add to each row the Transformer's GFLOPs at its λ, counted on some twenty utterances."""
    order = [i for batch in by_length(speech) for i in batch]
    some = order[:: max(1, len(order) // 20)]
    _, waveforms, lengths = next(loader(speech, [some]))
    sample = [waveform[:n] for waveform, n in zip(waveforms, lengths)]
    encoder.eval()  # training is over
    for row in rows:
        row["transformer_gflops_per_s"] = transformer_gflops(encoder, sample, row["lam"], device)


def check_held_out(args, place, model, lesson) -> str:
    """Measure α and the loss on validation speech in the middle of a run, and say so in a line."""
    lams = (0.0, 0.5, 1.0) if args.lam is None else (args.lam,)
    if args.alpha == "segments":
        threshold = end_threshold(model.encoder, lesson.held_out, args.segment_ms, place.device)
        model.encoder.end_threshold.fill_(threshold)
    rows, mean_alpha = evaluate(model, lesson.targets, lesson.held_out, lams, place.device)
    model.encoder.mean_alpha.fill_(mean_alpha)  # lam_for turns milliseconds into λ by it
    losses = [f"{np.mean(row['distillation']):.3f} at λ = {row['lam']:g}" for row in rows]
    return f"loss: {', '.join(losses)}"


def report(args, place, model, teacher, test) -> str:
    """Print the table of the finished run and write table.json, encoder.pt and figure.png.

    Returns what is wrong, if the encoder has learned nothing, and else nothing.
    """
    encoder, out = model.encoder, Path(args.out)
    save(encoder.checkpoint(torch.float16), out / "encoder.pt")
    lams = [args.lam] if args.lam is not None else [encoder.lam_for(ms) for ms in PERIODS_MS]
    rows, mean_alpha = evaluate(model, teacher, test, lams, place.device)
    count_work(encoder, test, rows, place.device)
    constant = constant_loss(teacher, test, place.device)
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in KB
    if sys.platform == "darwin":
        memory_gb /= 1000
    print_table(rows, mean_alpha, teacher.layers, constant)
    print(f"most memory held at once: {memory_gb:.2f} GB")
    if place.device.type == "cuda":
        gpu_gb = torch.cuda.max_memory_allocated() / 1e9
        print(f"most memory held at once on the GPU: {gpu_gb:.2f} GB")
    table = {
        "rows": rows,
        "constant": constant,
        "mean_alpha": mean_alpha,
        "memory_gb": memory_gb,
        "args": vars(args),
        "machine": machine(place.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    save_text(json.dumps(table, indent=1), out / "table.json")

    # An English utterance of about three seconds, if there is one, makes the clearest figure.
    def suits(i):
        utterance = test.utterances[i]
        return utterance.language not in ("en", ""), abs(utterance.samples - 3 * SAMPLE_RATE)

    shown = min(range(len(test)), key=suits)
    shown_lams = lams
    if len(lams) > 1:
        shown_lams = [lams[PERIODS_MS.index(ms)] for ms in (25, 50, 90)]
    model.to("cpu").eval()
    text = test.utterances[shown].text
    utterance_figure(encoder, test[shown], text, shown_lams, out / "figure.png")
    print(f"wrote {out}/encoder.pt (for OFAEncoder.from_checkpoint), table.json and figure.png")

    loss, guess = np.mean(rows[0]["distillation"]), np.mean(constant)
    if loss < LEARNED * guess:
        return ""
    return (
        f"this encoder has learned nothing: its held-out loss at λ = {lams[0]:g} is {loss:.3f}, "
        f"where one constant answer gets {guess:.3f}. Train for more --steps or with another --lr; "
        "if that does not help, the teacher's vectors do not follow from the sound"
    )


def print_table(rows, mean_alpha, layers, constant):
    """layers: the name of each distilled layer; constant: what one constant answer gets there."""
    print(f"test speech, mean α = {mean_alpha:.4f}")
    columns = ["λ", "ms / token", "closed form", "tokens / s"]
    for layer in layers:
        columns += [f"loss {layer}", "constant"]
    columns.append("Transformer GFLOPs / s of speech")
    print("  ".join(f"{column:>11}" for column in columns))
    for row in rows:
        cells = [f"{row['lam']:.3f}", f"{row['period_ms']:.1f}", f"{row['closed_form_ms']:.1f}"]
        cells.append(f"{row['tokens_per_s']:.1f}")
        for loss, guess in zip(row["distillation"], constant):
            cells += [f"{loss:.3f}", f"{guess:.3f}"]
        cells.append(f"{row['transformer_gflops_per_s']:.3f}")
        print("  ".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        sys.exit(
            "pretrain.py: another process has died, see its message; "
            "the same command with --resume goes on from the last checkpoint"
        )
    except KeyboardInterrupt:
        sys.exit(
            "pretrain.py: stopped; the same command with --resume goes on from the last checkpoint"
        )
