"""What the scripts share: files that are never left half-written, flags, and points.

A *point* is one trained head and what it reached, as a JSON file: at one λ with one seed; with
--lam any at forty rates with one seed; of a search for λ, at the λ found with one price and seed:

    config    all that the result depends on: flags, λ, seed, hashes of the checkpoint and of a TSV
    command   computes it again
    metric, test, valid, history, …     what finetune.final_test returns
    guessing                            what guessing reaches on test (for any λ: at λ = 0)
    bootstrap                           test on resampled test splits
    rows                                of a head for any λ: the scores at forty rates
    frame_period_ms, tokens, transformer_gflops_per_s, cnn_s, encode_s, train_s     what it cost
    commit, machine, date

A point that exists is not computed again, so a sweep that was stopped goes on where it was.
"""

import io
import json
import os
import platform
import shlex
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

HIGHER_IS_BETTER = ("accuracy", "mAP", "slot-type F1")  # of the metrics of tasks.py and superb.py

# What every point has, and its configuration.
NEEDED = {
    "config",
    "metric",
    "test",
    "bootstrap",
    "valid",
    "epochs",
    "infeasible_test",
    "test_utterances",
    "frame_period_ms",
    "transformer_gflops_per_s",
    "train_s",
    "machine",
    "date",
}
NEEDED_IN_CONFIG = {"task", "features", "seed"}


# 1. Files that are never left half-written.


@contextmanager
def atomic_write(path):
    """A file to write bytes to, which replaces path once all has been written.

    Whatever happens, a kill included, path holds what it held before or all that is new.
    Raises OSError, say if the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); what was there before is intact"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def save(content, path):
    """torch.save to path, by atomic_write. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: torch hides why writing a file failed
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_text(text, path):
    """Text to path, by atomic_write. Raises OSError."""
    with atomic_write(path) as file:
        file.write(text.encode())


# 2. Flags, and the machine.


def check_numbers(args, *names, zero=False):
    """Refuse flags that are NaN, infinite, or not over 0; with zero, 0 is allowed.

    names: as attributes of args. A value of None is a flag that was left out.
    """
    for name in names:
        value = getattr(args, name)
        if value is None or 0 < value < 2**63 or (zero and value == 0):
            continue
        least = "from" if zero else "over"
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} is {value}, expected a number {least} 0")


def check_unused(args, parser, names, why):
    """Refuse flags that have no effect, unless they are at their defaults. why: the reason, to be
    read after the flag."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out")


def check_distinct(args, name):
    """Refuse a flag that has a value twice, to the six digits that names of points have."""
    values = [f"{value:g}" for value in getattr(args, name)]
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} {' '.join(values)}: expected each value once")


def pick_device(name) -> torch.device:
    """The device of that name. "auto" is the best there is: CUDA, then MPS, then the CPU.

    Under torchrun each process takes a GPU of its own. Raises ValueError if the machine has no such
    device, or fewer GPUs than processes.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name]:
        raise ValueError(f"--device {name}: torch finds none here")
    if name != "cuda":
        return torch.device(name)
    own, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= gpus:
        raise ValueError(
            f"there are more processes than GPUs: start torchrun with --nproc-per-node {gpus}, "
            "or pretrain.py with --device cpu"
        )
    return torch.device("cuda", own)


def use_bf16(args, device) -> bool:
    """Whether to train under bf16 autocast: on CUDA alone.

    On a CPU it is no faster, and torch 2.14.1's grouped bf16 conv1d is wrong on processors with
    AMX: the positional convolution of preset tiny is 117 % off, without a word.
    """
    if args.precision == "bf16" and device.type != "cuda":
        raise ValueError(f"--precision bf16 is for CUDA, and this is {device.type}: leave it out")
    return args.precision != "fp32" and device.type == "cuda"


def machine(device) -> str:
    """What computes here, for a figure to name: processor or GPU, threads, device, torch."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():  # on Linux, platform knows the architecture alone
        said = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            said[key.strip()] = value.strip()
        if {"model name", "cpu family", "model"} <= said.keys():
            name = f"{said['model name']}, family {said['cpu family']}, model {said['model']}"
    threads = torch.get_num_threads()
    some = f"{threads} thread{'s' * (threads > 1)}"
    return f"{name}, {some}, {device}, torch {torch.__version__}"


# 3. Points: which of them exist already, what one says, and how it is written and read.


def already_done(path, config, with_head=False) -> bool:
    """Whether the point at path has been computed; if so, print its score.

    with_head: whether the trained head must lie beside it, too. Raises ValueError if the file
    holds a point of another configuration, or none.
    """
    if not path.exists():
        return False
    point = read_point(path)
    differ = differing(point["config"], config)
    if differ:
        raise ValueError(
            f"{path} is of another configuration ({', '.join(differ)} differ): choose another --out"
        )
    if with_head and not path.with_suffix(".pt").exists():
        return False
    print(
        f"{path} is there: test {point['metric']} {point['test']:.1f} % at "
        f"{point['frame_period_ms']:.1f} ms a token{warning(point)}"
    )
    return True


def differing(a: dict, b: dict) -> list[str]:
    """Names of what differs between two configurations.

    A checkpoint is known by its hash, wherever it lies, and so are data that have one.
    """
    names = (a.keys() | b.keys()) - {"checkpoint"}
    if a.get("data_sha1") and b.get("data_sha1"):
        names -= {"data"}
    return sorted(name for name in names if a.get(name) != b.get(name))


def better(metric, a, b) -> bool:
    """Whether score a is better than score b."""
    return a > b if metric in HIGHER_IS_BETTER else a < b


def warning(point) -> str:
    """What to add to a score that guessing reaches too; "" if it is better, or not known."""
    guess = point.get("guessing")
    if guess is None or better(point["metric"], point["test"], guess):
        return ""
    return (
        "; NO BETTER THAN GUESSING (its own answers, shuffled among the utterances, "
        f"reach {guess:.1f} %)"
    )


def read_point(path) -> dict:
    """The point at path. Raises ValueError if it is none, or damaged."""
    try:
        point = json.loads(path.read_text(encoding="utf-8"))
        complete = NEEDED <= point.keys() and NEEDED_IN_CONFIG <= point["config"].keys()
        # A search's points are of one λ, though their configuration is their head's.
        is_head = point["config"].get("lam") == "any" and "way" not in point["config"]
        complete = complete and (not is_head or "rows" in point)
    except (ValueError, AttributeError):  # no JSON, or JSON of something else
        complete = False
    if not complete:
        raise ValueError(
            f"{path} is no point of finetune.py or adaptive_lambda.py, or it is damaged: delete it"
        )
    return point


def save_point(path, point, device):
    """Write the point, with the commit, machine and date that made it. Raises OSError."""
    commit = ""
    with suppress(OSError):  # git may not be there
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        commit = git.stdout.strip()
    point = {
        **point,
        "commit": commit,
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_point(path, point)


def write_point(path, point):
    """Write the point as it is. Raises OSError."""
    save_text(json.dumps(point, indent=1, ensure_ascii=False), path)


def command(script, parser, args, lam, seed) -> str:
    """The command that computes a point again: the flags that are not at their defaults."""
    values = {**vars(args), "lam": [lam], "seed": seed, "seeds": 1, "out": "runs/again"}
    words = [script]
    for name, value in values.items():
        if name == "device" or value == parser.get_default(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:  # a switch has no value
            words.append(str(value))
    return "python " + shlex.join(words)


def cost_of(states, frames) -> dict:
    """What a point says of its cost.

    states: a HiddenStateCache; frames: its FrameCache, None for features without an encoder.
    """
    return {
        "frame_period_ms": states.period_ms,
        "tokens": states.tokens,
        "transformer_gflops_per_s": states.gflops,
        "cnn_s": frames.seconds if frames else 0.0,
        "encode_s": states.seconds,
    }
