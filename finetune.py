"""Downstream tasks at any rate: a small head on the frozen encoder, at each λ and seed asked for.

    hidden states of an utterance at λ ─ head ─ symbols of a text, or labels
    (parts/cache.py)                     (parts/heads.py)  (parts/tasks.py, parts/superb.py)

The encoder runs once at each λ, and its hidden states are kept. A head is trained on them for
--epochs, while the learning rate rises and falls once, and is tested as it is at the end. So every
rate gets a head of its own, and the curve over λ compares rates, not hours of training.

Such a head serves no rate far from its own. With --lam any, one head is trained for all of them.
Hidden states are kept at twelve λ, from 0 to 1.6. Each step takes two of these, and its loss is
their mean: one λ of the six next to 0, where tasks do best and a step costs most, and, by the toss
of a coin, 0 or one of the five beyond. The head is told how long each token is (heads.tell). Then
it is tested at forty rates, from 20 ms to some 230; most of them it was not trained at.

Baselines get the same head, and other features in the encoder's place (--features). With
--boundaries pseudo the segments of an encoder that detects them end at pseudo-boundaries instead:
an oracle, which shows what a better detector could be worth.

An utterance that λ makes too short for its text under CTC can't be transcribed in full: such
utterances are counted (infeasible_test), and scored like any other. A score that is no better than
guessing is printed with a warning.

A trained head makes a *point*: a JSON file in --out with configuration, scores and cost, at one λ,
or at forty rates with --lam any (see parts/runs.py). A point that exists is not computed again, so
a sweep goes on where it was stopped; a file of another configuration is refused.

Sources: the protocol: Yang et al., "SUPERB: Speech processing universal performance benchmark",
Interspeech 2021. The curve over λ: Chen, Meng and Lee, "Once-for-all sequence compression for
self-supervised speech models", ICASSP 2023.

    python finetune.py                          characters at λ = 0, by checkpoints/ofa-tiny.pt
    python finetune.py --task ctc --lam 0 0.5 1 --seeds 3 --out runs/ctc
    python finetune.py --task pool --data my.tsv --save-heads --out runs/mine
    python -m extras.predict runs/mine/pool-encoder-lam0-seed0.pt new.wav
    python finetune.py --task pool --data my.tsv --lam any --save-heads --out runs/mine
    python -m extras.predict runs/mine/pool-any-seed0.pt new.wav --ms 70
    python finetune.py --checkpoint runs/base/encoder.pt --task asr --head superb --data my/corpora
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import copy
import hashlib
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ofa_encoder import FRAME_MS, OFAEncoder, check_lam, period_from_lam
from parts.boundaries import SEGMENT_MS, found_boundaries, read_boundaries
from parts.cache import (
    FEATURES,
    NO_ENCODER,
    FrameCache,
    HiddenStateCache,
    TrainableSource,
    UnfrozenEncoder,
)
from parts.data import SPLITS
from parts.heads import CTC_SHAPES, HEADS
from parts.rivals import RIVALS, Rival
from parts.runs import (
    already_done,
    check_distinct,
    check_numbers,
    check_unused,
    command,
    cost_of,
    pick_device,
    save,
    save_point,
    use_bf16,
    warning,
)
from parts.scores import bootstrap, guessing, score
from parts.superb import SUPERB, load_superb
from parts.tasks import KINDS, Task, data_sha1, load_task
from parts.teachers import fingerprint, load_teacher

BATCH = 16  # utterances in a step
MAX_GRADIENT_NORM = 5.0
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # fraction of the steps over which the learning rate rises
CHECKS = 10  # times, about, that the validation split is measured in training

# A head for any rate (--lam any):
LAM_MAX = 1.6  # the largest λ it is trained at, as in pre-training
LAMS_KEPT = 12  # values of λ whose hidden states are kept, and drawn in training
RATES = 40  # it is tested at

# Flags that tasks of one kind alone have a use for.
OF_KIND = {"head": "ctc", "symbols_per_token": "ctc", "ctc_weight": "seq2seq", "beam": "seq2seq"}

# Flags that are left out when a point's configuration is made. λ and the seed come in for each
# point, and boundaries by what is in the file. The others don't change what is computed (--keep
# does by rounding alone).
NOT_IN_CONFIG = {"lam", "seeds", "seed", "boundaries"}
NOT_IN_CONFIG |= {"out", "root", "device", "keep", "save_heads"}


# 1. The command line.


def build_parser(
    description="Train a head on the encoder at each λ and seed.",
    lam="each λ to train a head at; any: one head for all λ",
):
    """The parser of the flags; adaptive_lambda.py adds its own. lam: help for --lam."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default="checkpoints/ofa-tiny.pt",
        help="encoder.pt or checkpoint.pt of pretrain.py; not read if --features is logmel or deaf",
    )
    add(
        "--task",
        choices=[*KINDS, *SUPERB],
        default="ctc",
        help="what to predict: see parts/tasks.py and parts/superb.py",
    )
    add(
        "--data",
        help="asterisk, a TSV with columns path, text or label, and optionally split, or a folder "
        "with metadata.csv or a folder for each label; for SUPERB's tasks a folder with the data "
        "set; left out: asterisk, or for SUPERB's tasks the folder --root",
    )
    add("--root", default="data", help="folder of the embedded corpus")
    add("--fold", type=int, choices=range(1, 6), default=1, help="IEMOCAP's test session, for er")
    add(
        "--boundaries",
        help="where segments end, in place of what an encoder of segments detects: a file in the "
        "format of pretrain.py --boundaries, or pseudo: pseudo-boundaries",
    )
    add("--lam", type=lam_or_any, nargs="+", default=[0.0], help=lam)
    add("--seeds", type=int, default=1, help="heads (in adaptive_lambda.py, runs) for each setting")
    add("--seed", type=int, default=0, help="the first seed; further ones count up")
    add(
        "--keep",
        choices=("memory", "nothing"),
        default="memory",
        help="memory: hidden states are computed once; nothing: they are computed for every batch",
    )
    add(
        "--head",
        choices=CTC_SHAPES,
        default="blstm",
        help="network under CTC: see parts/heads.py",
    )
    add("--symbols-per-token", type=int, default=1, help="symbols that a token may emit under CTC")
    add(
        "--ctc-weight",
        type=float,
        default=0.3,
        help="part of a joint CTC loss in seq2seq, from 0 to below 1",
    )
    add("--beam", type=int, default=1, help="hypotheses of seq2seq; 1: greedy")
    add("--epochs", type=int, default=90, help="passes over the training split")
    lr = "the head's learning rate at its peak, from which it falls linearly to 0"
    add("--lr", type=float, default=3e-3, help=lr)
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="in which heads are trained; auto: bf16 autocast on CUDA, fp32 elsewhere",
    )
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best")
    add("--out", default="runs/finetune", help="folder for the points")
    add(
        "--save-heads",
        action="store_true",
        help="keep each head, with its encoder, as a .pt beside its point, for extras.predict",
    )
    title = "in place of the frozen encoder (finetune.py only)"
    add = parser.add_argument_group(title).add_argument
    add(
        "--features",
        choices=FEATURES,
        default="encoder",
        help="the head's input. encoder: its hidden states; average, merge: frames of an encoder "
        "that was pre-trained with --compression none, merged; the others are baselines: see "
        "parts/cache.py",
    )
    add("--unfreeze", action="store_true", help="train the encoder too (slow: nothing is kept)")
    add("--encoder-lr", type=float, default=1e-4, help="the encoder's, with --unfreeze")
    return parser


def lam_or_any(text):
    """A value of --lam."""
    try:
        return text if text == "any" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor any") from None


def check(args):
    """Refuse flags that can't be met, by ValueError, before any work.

    Settles the data, whose default depends on the task, and the device.
    """
    any_rate = "any" in args.lam
    if args.features in NO_ENCODER and (args.lam != [0.0] or args.save_heads or args.unfreeze):
        raise ValueError(
            f"--features {args.features} has no encoder: "
            "it goes without --lam, --save-heads and --unfreeze"
        )
    if any_rate and (len(args.lam) > 1 or args.unfreeze):
        raise ValueError(
            "--lam any trains one head for all λ of a frozen encoder: "
            "it goes without further λ and --unfreeze"
        )
    if args.features in RIVALS and (args.save_heads or args.unfreeze):
        raise ValueError(f"--features {args.features} goes without --save-heads and --unfreeze")
    if args.boundaries and (args.features != "encoder" or args.unfreeze or args.save_heads):
        raise ValueError(
            "--boundaries is for --features encoder, frozen, and goes without --save-heads: "
            "in use, the encoder must detect where segments end"
        )
    if not args.data:
        args.data = args.root if args.task in SUPERB else "asterisk"
    device = pick_device(args.device)
    use_bf16(args, device)  # refuses what the device can't do
    args.device = device.type

    if not any_rate:
        for lam in args.lam:
            check_lam(lam)
        check_distinct(args, "lam")
    if args.task != "er":
        check_unused(args, build_parser(), ["fold"], "is for --task er")
    if not args.unfreeze:
        check_unused(args, build_parser(), ["encoder_lr"], "is for --unfreeze")
    check_numbers(args, "seeds", "symbols_per_token", "beam", "epochs")
    check_numbers(args, "lr", "encoder_lr")
    check_numbers(args, "seed", zero=True)
    if not 0 <= args.ctc_weight < 1:
        raise ValueError(f"--ctc-weight is {args.ctc_weight}, expected 0 <= weight < 1")


# 2. A head in training.


@dataclass
class Lesson:
    """One head in training: what it learns, from which hidden states, and what learns."""

    task: Task
    targets: list[list[int]]  # symbol numbers of each utterance; -1: not one of task.symbols
    order: dict[str, list[int]]  # the utterances of each split, by length
    sources: list  # of hidden states: one, or for a head of any rate one for each λ, from 0 on
    trainable: TrainableSource  # the source, or an empty one if nothing in it is trained
    head: nn.Module
    model: nn.Module  # all that is trained: head and trainable

    def batches(self, split) -> list[list[int]]:
        """Utterances of similar length, BATCH at a time."""
        order = self.order[split]
        return [order[k : k + BATCH] for k in range(0, len(order), BATCH)]

    def draw(self, random) -> list:
        """The sources of a step: the one that there is; or one from the lower half of those above
        λ = 0, and, by the toss of a coin, λ = 0 or one from the upper half."""
        if len(self.sources) == 1:
            return self.sources
        lower, upper = np.array_split(np.arange(1, len(self.sources)), 2)
        other = random.choice(upper) if random.random() < 0.5 else 0
        return [self.sources[random.choice(lower)], self.sources[other]]


class Measured(NamedTuple):
    """How a head does on one split."""

    loss: float
    score: float
    infeasible: int  # utterances that are too short for their text under CTC
    predicted: list  # of each utterance, in the order of Lesson.order


def train(args, task: Task, sources: list, seed):
    """Train a head for --epochs on the hidden states of its sources.

    sources: one HiddenStateCache; for a head of any rate several, of rising λ from 0 on; or one
    TrainableSource, which is trained with the head.

    Returns the lesson, whose head is trained, and the history: losses of each epoch, and now and
    then how the first source's validation split does. Raises FloatingPointError if a gradient is
    not finite.
    """
    torch.manual_seed(seed)
    lesson = make_lesson(args, task, sources)
    lesson.trainable.begin(lesson)
    optimizer, schedule = make_optimizer(args, lesson)
    random = np.random.default_rng(seed)  # of the order of batches, and of λ
    history = []
    bar = tqdm(range(1, args.epochs + 1), desc=f"seed {seed}", unit=" epochs", leave=False)
    for epoch in bar:
        try:
            train_loss = train_epoch(args, lesson, optimizer, schedule, random)
        except FloatingPointError as error:
            raise FloatingPointError(f"seed {seed}, epoch {epoch}: {error}") from None
        history.append({"train_loss": train_loss, **lesson.trainable.watch()})
        if epoch % max(1, args.epochs // CHECKS) == 0 or epoch == args.epochs:
            valid = measure(lesson, "valid", sources[0])
            history[-1] |= {"valid_loss": valid.loss, "valid": valid.score}
            bar.set_postfix_str(
                f"loss {train_loss:.3f}, valid {valid.loss:.3f}, {task.metric} {valid.score:.1f} %"
            )
    return lesson, history


def make_lesson(args, task, sources) -> Lesson:
    """A new head, and all that it is trained with."""
    number = {symbol: k for k, symbol in enumerate(task.symbols)}
    targets = []
    for target in task.targets:
        symbols = [target] if isinstance(target, str) else target  # one label, or several symbols
        targets.append([number.get(symbol, -1) for symbol in symbols])

    # Utterances of similar length share a batch, so that little of it is padding.
    def samples(i):
        return task.speech.utterances[i].samples

    order = {split: sorted(task.indices(split), key=samples) for split in SPLITS}

    # Some dimensions of an encoder hardly move around a large mean. The head starts with mean 0 and
    # variance 1 in each, over the tokens of this encoder at this λ, or at all of them.
    source = sources[0]
    trainable = source if isinstance(source, TrainableSource) else TrainableSource()
    trainable.eval()
    sample = torch.cat([sample_states(task, source) for source in sources], 1)
    layers, _, dim = sample.shape
    if source.told:  # how long tokens are: one more number in their hidden states
        dim -= 1
    head = build_head(args, task, layers, dim, source.told).to(args.device)
    head.mix.standardise(sample)
    model = nn.ModuleList([head, trainable])
    return Lesson(task, targets, order, sources, trainable, head, model)


@torch.no_grad()
def sample_states(task, source):
    """Hidden states of all tokens of some 200 training utterances: (L + 1, tokens, D)."""
    train = task.indices("train")
    some = train[:: max(1, len(train) // 200)]
    rows = []
    for k in range(0, len(some), BATCH):
        states, lengths = source(some[k : k + BATCH])
        rows += [row[:, :n] for row, n in zip(states, lengths)]  # (L + 1, T, D), without padding
    return torch.cat(rows, 1)


def build_head(args, task, layers, dim, told=False):
    """A new head for the task. layers (L + 1), dim (D): of the hidden states; told: whether they
    carry the durations of tokens."""
    sizes = {"layers": layers, "dim": dim, "symbols": len(task.symbols), "told": told}
    if task.kind == "ctc":
        sizes |= {"shape": args.head, "symbols_per_token": args.symbols_per_token}
    elif task.kind == "seq2seq":
        longest = max(len(task.targets[i]) for i in task.indices("train"))
        sizes |= {"ctc_weight": args.ctc_weight, "beam": args.beam, "max_symbols": longest}
    else:
        sizes |= {"multi_label": task.metric == "mAP", "groups": list(task.groups)}
    head = HEADS[task.kind](**sizes)
    head.sizes = sizes  # extras/predict.py builds it anew from these
    return head


def make_optimizer(args, lesson):
    """AdamW over all that is trained, and the rule by which learning rates rise and fall."""
    groups = [{"params": lesson.head.parameters()}, *lesson.trainable.groups]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * len(lesson.batches("train"))
    rise = max(1, WARMUP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise), 1)
    )
    return optimizer, schedule


def train_epoch(args, lesson, optimizer, schedule, random) -> float:
    """One pass over the training split; returns its mean loss."""
    bf16 = use_bf16(args, torch.device(args.device))
    lesson.model.train()
    batches = lesson.batches("train")
    mean_loss = 0.0
    for k in random.permutation(len(batches)):
        batch = batches[k]
        wanted = [lesson.targets[i] for i in batch]
        sources = lesson.draw(random)
        loss = 0.0
        for source in sources:
            # A frozen encoder runs as it does in a test. One that is trained may run under bf16.
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16 and args.unfreeze):
                states, lengths = source(batch)
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                loss = loss + lesson.head.loss(states, lengths, wanted) / len(sources)
        loss = loss + lesson.trainable.cost  # if λ is learned: see adaptive_lambda.py
        optimizer.zero_grad()
        loss.backward()

        # A gradient that is not finite would spoil the weights: stop before it is used.
        norm = nn.utils.clip_grad_norm_(lesson.model.parameters(), MAX_GRADIENT_NORM)
        if not norm.isfinite():
            ids = [lesson.task.speech.utterances[i].id for i in batch]
            raise FloatingPointError(
                f"loss {loss.item()}, gradient {norm.item()}, utterances {ids}; try a smaller --lr"
            )
        optimizer.step()
        schedule.step()
        mean_loss += loss.item() / len(batches)
    return mean_loss


# 3. A head that is tested.


@torch.no_grad()
def measure(lesson, split, source) -> Measured:
    """Loss, score and predictions on a split, as the head is now, on the source's hidden states."""
    lesson.model.eval()
    loss = 0.0
    infeasible = 0
    predicted = []
    targets = []
    for batch in lesson.batches(split):
        states, lengths = source(batch)
        wanted = [lesson.targets[i] for i in batch]

        # The head has no output for symbols that train lacks: its loss is over the others, but in
        # the score they count as errors.
        known = [[s for s in target if s >= 0] for target in wanted]
        batch_loss = lesson.head.loss(states, lengths, known).item() + float(lesson.trainable.cost)
        loss += batch_loss * len(batch) / len(lesson.order[split])
        if lesson.task.kind == "ctc":
            infeasible += lesson.head.infeasible(lengths, known)
        predicted += lesson.head.predict(states, lengths)
        targets += wanted
    return Measured(loss, score(lesson.task, predicted, targets), infeasible, predicted)


@torch.no_grad()
def final_test(args, lesson, source, history) -> dict:
    """The part of a point that says how the head was trained, and how it does on the test split."""
    task = lesson.task
    measured = measure(lesson, "test", source)
    targets = [lesson.targets[i] for i in lesson.order["test"]]
    point = {
        "metric": task.metric,
        "test": measured.score,
        "valid": history[-1]["valid"],
        "epochs": args.epochs,
        "bf16": use_bf16(args, torch.device(args.device)),
        "history": history,
    }
    if task.second:
        point[f"test {task.second}"] = score(task, measured.predicted, targets, task.second)
    point["guessing"] = guessing(task, measured.predicted, targets)
    point["bootstrap"] = rounded(bootstrap(task, measured.predicted, targets, lesson.order["test"]))

    # Under CTC, an utterance with fewer tokens than its text needs could not be learned from.
    infeasible_train = 0
    if task.kind == "ctc":
        for batch in lesson.batches("train"):
            _, lengths = source(batch)
            infeasible_train += lesson.head.infeasible(lengths, [lesson.targets[i] for i in batch])
    point["infeasible_test"] = measured.infeasible
    point["infeasible_train"] = infeasible_train
    point["test_utterances"] = len(targets)

    # Texts to look at: one in forty, from the shortest utterance on.
    point["examples"] = []
    if task.kind != "pool":
        between = separator(task)
        for i, numbers in zip(lesson.order["test"][::40], measured.predicted[::40]):
            wanted = between.join(task.targets[i])
            predicted = between.join(task.symbols[s] for s in numbers)
            point["examples"].append({"wanted": wanted, "predicted": predicted})
    return point


def test_at_all_rates(lesson, sources) -> list[dict]:
    """How the trained head does at each source's rate: a row for each."""
    rows = []
    for source in tqdm(sources, desc="rates", leave=False):
        valid = measure(lesson, "valid", source)
        test = measure(lesson, "test", source)
        targets = [lesson.targets[i] for i in lesson.order["test"]]
        draws = bootstrap(lesson.task, test.predicted, targets, lesson.order["test"])
        rows.append(
            {
                "lam": source.lam,
                "frame_period_ms": source.period_ms,
                "transformer_gflops_per_s": source.gflops,
                "valid_loss": valid.loss,
                "infeasible_valid": valid.infeasible / len(lesson.order["valid"]),  # a share
                "valid": valid.score,
                "test": test.score,
                "infeasible_test": test.infeasible,
                "bootstrap": rounded(draws),
            }
        )
    return rows


def rounded(values) -> list[float]:
    return [round(value, 2) for value in values]


def separator(task) -> str:
    """What stands between the symbols of a text: nothing between letters, else a space."""
    return "" if task.kind == "ctc" and task.metric != "PER" else " "


# 4. The sweep: a point for each λ and seed.


def prepare(args):
    """The encoder (None for logmel and deaf), the task, and the configuration of the points.

    Raises ValueError or OSError if one of them can't be had.
    """
    encoder = None
    if args.features not in NO_ENCODER:
        encoder = OFAEncoder.from_checkpoint(args.checkpoint).to(args.device)
    if args.task in SUPERB:
        task = load_superb(args.task, args.data, args.fold)
    else:
        task = load_task(args.task, args.data, args.root)
    for name, kind in OF_KIND.items():
        if task.kind != kind:
            why = f"is for {kind}, and --task {args.task} is {task.kind}"
            check_unused(args, build_parser(), [name], why)

    # A point is known by its checkpoint, and by what a table of data says, not by their names.
    # (Whether a sound file has changed is not looked into.)
    config = {name: value for name, value in vars(args).items() if name not in NOT_IN_CONFIG}
    config["checkpoint_sha1"] = short_sha1(args.checkpoint) if encoder else None
    config["data_sha1"] = data_sha1(args.task, args.data)

    if encoder:
        if args.features in RIVALS:
            encoder = Rival(encoder, args.features).to(args.device).eval()
        if encoder.config.compression != "cif" and any(args.lam):  # a λ over 0, or "any"
            raise ValueError(
                f"{args.checkpoint} has one fixed rate ({encoder.config.compression}) and no λ: "
                "finetune.py takes it with --lam 0"
            )
        if args.features == "random":
            torch.manual_seed(0)
            encoder = OFAEncoder(encoder.config).to(args.device).eval()
        encoder.requires_grad_(args.unfreeze)
    if args.boundaries:
        if encoder.config.alpha != "segments":
            raise ValueError(
                f"{args.checkpoint} has no segments: --boundaries is for an encoder of "
                "pretrain.py --alpha segments"
            )
        task = replace(task, ends=known_ends(args, task))
        from_file = args.boundaries != "pseudo"
        config["boundaries"] = short_sha1(args.boundaries) if from_file else "pseudo"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return encoder, task, config


def known_ends(args, task) -> list:
    """Where segments end in each utterance of the task, in frames, as --boundaries has it."""
    if args.boundaries != "pseudo":
        return read_boundaries(args.boundaries, task.speech)
    teacher = load_teacher("mfcc")
    return found_boundaries(task.speech, teacher, fingerprint(teacher), SEGMENT_MS, args.root)


def short_sha1(path) -> str:
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()[:12]


def save_head(path, head, encoder, lam, task):
    """All that extras/predict.py needs: the head, its encoder and λ, and how to spell an answer."""
    content = {
        **encoder.checkpoint(),
        "lam": lam,
        "head": head.state_dict(),
        "sizes": head.sizes,
        "kind": task.kind,
        "symbols": task.symbols,
        "between": separator(task),
    }
    save(content, path)


def unfinished(args, config, stem) -> dict:
    """The points of a configuration that have not been computed: {seed: path}."""
    todo = {}
    for seed in range(args.seed, args.seed + args.seeds):
        path = Path(args.out) / f"{stem}-seed{seed}.json"
        if not already_done(path, {**config, "seed": seed}, args.save_heads):
            todo[seed] = path
    return todo


def points_of_each_lam(parser, args, encoder, task, config):
    """A head for each λ and seed."""
    # All points are looked for before any work is done, since one of them might be another's.
    todo_of = {}
    for lam in args.lam:
        stem = f"{args.task}-{args.features}-lam{lam:g}"
        todo_of[lam] = unfinished(args, {**config, "lam": lam}, stem)

    in_memory = args.keep == "memory"
    frames = None
    for lam, todo in todo_of.items():
        if not todo:
            continue

        # A frozen encoder runs once: its CNN for all λ, the rest for all seeds. source gives the
        # head its hidden states, and states says what they cost.
        if not args.unfreeze:
            if encoder and not frames:
                frames = FrameCache(task.speech, encoder, args.device, in_memory, task.ends)
            source = states = HiddenStateCache(
                task.speech, args.features, encoder, lam, args.device, frames, in_memory
            )

        for seed, path in todo.items():
            started = time.time()
            if args.unfreeze:
                own = copy.deepcopy(encoder)  # each head begins with the encoder as it was
                source = UnfrozenEncoder(task.speech, own, lam, args.device, args.encoder_lr)
            lesson, history = train(args, task, [source], seed)
            result = final_test(args, lesson, source, history)
            if args.save_heads:
                save_head(path.with_suffix(".pt"), lesson.head, source.encoder, lam, task)
            if args.unfreeze:  # it costs what it costs now: training has moved α, too
                frames = FrameCache(task.speech, own, args.device, keep=False)
                states = HiddenStateCache(
                    task.speech, args.features, own, lam, args.device, frames, keep=False
                )
            point = {
                "config": {**config, "lam": lam, "seed": seed},
                "command": command("finetune.py", parser, args, lam, seed),
                **result,
                **cost_of(states, frames),
                "train_s": time.time() - started,
            }
            save_point(path, point, args.device)
            too_short = ""
            if task.kind == "ctc":
                count = f"{point['infeasible_test']} of {point['test_utterances']}"
                too_short = f", {count} too short for CTC"
            print(
                f"λ = {lam:g} ({states.period_ms:.1f} ms), seed {seed}: "
                f"test {task.metric} {point['test']:.1f} %, {time.time() - started:.0f} s"
                f"{too_short}{warning(point)}"
            )


def lams_to_learn() -> np.ndarray:
    """The λ at which a head for any rate is trained, equally far apart."""
    return np.linspace(0, LAM_MAX, LAMS_KEPT)


def lams_to_test(encoder) -> list[float]:
    """The λ at which it is tested; their frame periods rise by equal factors."""
    longest = period_from_lam(LAM_MAX, encoder.mean_alpha.item())
    return [encoder.lam_for(period) for period in np.geomspace(FRAME_MS, longest, RATES)]


def points_of_any_lam(parser, args, encoder, task, config):
    """A head for all λ, for each seed that has no point yet."""
    rival = "" if args.features == "encoder" else f"-{args.features}"
    todo = unfinished(args, {**config, "lam": "any"}, f"{args.task}{rival}-any")
    if not todo:
        return
    began = time.time()
    in_memory = args.keep == "memory"
    frames = FrameCache(task.speech, encoder, args.device, in_memory, task.ends)

    def states_at(lam, keep):
        return HiddenStateCache(
            task.speech, args.features, encoder, lam, args.device, frames, keep, told=True
        )

    learned = [states_at(lam, in_memory) for lam in lams_to_learn()]
    prepare_s = time.time() - began
    tested = [states_at(lam, False) for lam in lams_to_test(encoder)]
    for seed, path in todo.items():
        started = time.time()
        lesson, history = train(args, task, learned, seed)
        train_s = prepare_s + time.time() - started
        if args.save_heads:
            save_head(path.with_suffix(".pt"), lesson.head, encoder, "any", task)
        started = time.time()
        rows = test_at_all_rates(lesson, tested)
        test_s = time.time() - started
        point = {
            "config": {**config, "lam": "any", "seed": seed},
            "command": command("finetune.py", parser, args, "any", seed),
            **final_test(args, lesson, tested[0], history),  # at λ = 0; all rates are in the rows
            "rows": rows,
            **cost_of(tested[0], frames),
            "train_s": train_s,
            "test_s": test_s,
        }
        save_point(path, point, args.device)
        shown = [min(rows, key=lambda row: abs(row["frame_period_ms"] - ms)) for ms in (20, 50, 90)]
        scores = [
            f"{row['test']:.1f} % at {row['frame_period_ms']:.0f} ms{warning({**point, **row})}"
            for row in shown
        ]
        print(
            f"any λ, seed {seed}, {train_s:.0f} s of training: "
            f"test {task.metric} {', '.join(scores)}"
        )


def main():
    parser = build_parser()
    args = parser.parse_args()
    check(args)
    encoder, task, config = prepare(args)
    if "any" in args.lam:
        points_of_any_lam(parser, args, encoder, task, config)
    else:
        points_of_each_lam(parser, args, encoder, task, config)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped; the same command goes on from the last finished point")
