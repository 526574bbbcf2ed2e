"""How long finding a rate takes: heads at five λ, one head for all rates, λ learned with a head.

A section of benchmark.py. Whole trainings would take hours. So an epoch of each way is timed, on
one utterance in SHARE, in turn with those of the others, and the seconds are put together:

    grid          frames + for each of five λ: hidden states + epochs · epoch
    any           frames + hidden states at all λ that are kept + epochs · epoch
    search        any + forty rates
    learned       frames + epochs in which λ is learned, from one start · epoch
                  + hidden states + epochs · epoch, at one of the five λ

frames: the CNN's of all speech; hidden states: of all speech at a λ; forty rates: the head on
validation speech at each, one rate in SHARE, timed once. Left out: validation now and then in
training, and tests.

    python -m extras.benchmark heads --repeats 3
"""

import numpy as np
import torch
from torch.utils.benchmark import timer

import adaptive_lambda
import finetune
from extras.clock import interleaved, show
from ofa_encoder import OFAEncoder
from parts.cache import FrameCache, HiddenStateCache
from parts.tasks import load_task

GRID = [0, 0.51, 0.78, 1.04, 1.53]  # λ of the heads beside which finding a rate is timed
AT = 0.51  # λ of the head that is trained once λ has been learned
HEADS = {"ctc": [], "seq2seq": ["--epochs", "40"], "pool": []}  # flags of adaptive_lambda.py
LONGER = {"ctc": 150}  # epochs of a head for all rates, and of one where λ has been measured
SHARE = 4  # one utterance of so many is in a timed epoch, one rate of so many in a timed test
SECONDS = 5  # that epochs are repeated in each round: a head for all rates must meet most of them


def heads_section(device, repeats) -> list:
    rows = []
    for task, flags in HEADS.items():
        flags = ["--task", task, *flags, "--device", device.type]
        args = adaptive_lambda.build_parser().parse_args(flags)
        finetune.check(args)
        rows.append({"task": task, **measure_heads(args, repeats)})
    show(
        "Finding a rate: minutes for heads at five λ, and what other ways take beside them; in "
        "brackets the search's forty rates included, goal: ≤ 1",
        ["task", "five heads", "one head for all rates ×", "by differences ×", "by autograd ×"],
        [head_cells(row) for row in rows],
    )
    return rows


def measure_heads(args, repeats) -> dict:
    """Seconds of each way, put together from epochs that are timed in turn."""
    task = load_task(args.task, args.data, args.root)
    encoder = OFAEncoder.from_checkpoint(args.checkpoint).to(args.device)
    encoder.requires_grad_(False)
    frames = FrameCache(task.speech, encoder, args.device)

    def states_at(lam, keep=True, told=False):
        return HiddenStateCache(
            task.speech, "encoder", encoder, lam, args.device, frames, keep, told
        )

    grid = {lam: states_at(lam) for lam in GRID}
    any_rate = [states_at(lam, told=True) for lam in finetune.lams_to_learn()]

    # λ does not rest, so that every epoch of learning it costs what most of them do.
    args.freeze = 0
    learned = {
        "differences": adaptive_lambda.MeasuredLam(args, task, frames, AT),
        "autograd": adaptive_lambda.LearnedLam(args, task, frames, AT),
    }
    sources = {"any": any_rate}
    sources |= {lam: [states] for lam, states in grid.items()}
    sources |= {way: [states] for way, states in learned.items()}
    lessons = {name: finetune.make_lesson(args, task, each) for name, each in sources.items()}
    epochs = {name: one_epoch(args, lesson) for name, lesson in lessons.items()}
    timed = interleaved(epochs, repeats, at_least=SECONDS)
    epoch_s = {name: SHARE * s for name, s in timed.items()}

    started = timer()
    curve = [states_at(lam, False, True) for lam in finetune.lams_to_test(encoder)[::SHARE]]
    for states in curve:
        finetune.measure(lessons["any"], "valid", states)
    rates_s = SHARE * (timer() - started)

    encode_s = {lam: states.seconds for lam, states in grid.items()}
    longer = LONGER.get(args.task, args.epochs)
    seconds = {
        "grid": frames.seconds + sum(encode_s[lam] + args.epochs * epoch_s[lam] for lam in GRID),
        "any": frames.seconds
        + sum(states.seconds for states in any_rate)
        + longer * epoch_s["any"],
    }
    for way, at_it in {"differences": longer, "autograd": args.epochs}.items():
        learning = args.lam_epochs * epoch_s[way]
        seconds[way] = frames.seconds + learning + encode_s[AT] + at_it * epoch_s[AT]
    seconds["search"] = seconds["any"] + rates_s
    return {
        "seconds": seconds,
        "of_grid": {way: s / seconds["grid"] for way, s in seconds.items()},
        "epoch_s": epoch_s,
        "rates_s": rates_s,
    }


def one_epoch(args, lesson):
    """A function that trains the lesson's head for an epoch of one utterance in SHARE."""
    lesson.order["train"] = lesson.order["train"][::SHARE]
    lesson.trainable.begin(lesson)
    optimizer, _ = finetune.make_optimizer(args, lesson)
    # With a learning rate of 0 the last round takes the same steps as the first.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    random = np.random.default_rng(0)
    return lambda: finetune.train_epoch(args, lesson, optimizer, schedule, random)


def head_cells(row) -> list[str]:
    of_grid = row["of_grid"]
    return [
        row["task"],
        f"{row['seconds']['grid'] / 60:.1f}",
        f"{of_grid['any']:.2f} ({of_grid['search']:.2f})",
        f"{of_grid['differences']:.2f}",
        f"{of_grid['autograd']:.2f}",
    ]
