"""What every run has in common: flags, files that are never left half-written, and points.

A *point* is what one head reached at one λ with one seed, as a JSON file:

    config    all that the result depends on: flags, λ, seed, and hashes of the checkpoint and of a TSV
    command   computes it again
    metric, test, valid, history, …     what finetune.train returns
    guessing                            what guessing reaches on test (older points lack it)
    frame_period_ms, tokens, transformer_gflops_per_s, cnn_s, encode_s, train_s     what it cost
    commit, machine, date

A point that exists is not computed again, so that a sweep goes on where it was stopped.
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

HIGHER_IS_BETTER = ("accuracy", "mAP", "slot-type F1")  # of the metrics, here and in superb.py
NEEDED = {
    "config",
    "metric",
    "test",
    "valid",
    "epochs",
    "infeasible_test",
    "test_utterances",
    "frame_period_ms",
    "transformer_gflops_per_s",
    "train_s",
    "machine",
    "date",
}  # what results.py reads


def differing(a: dict, b: dict) -> list[str]:
    """Names of what differs between two configurations. A checkpoint is known by its hash, wherever it lies."""
    return sorted(k for k in {*a, *b} - {"checkpoint"} if a.get(k) != b.get(k))


def already_done(path, config) -> bool:
    """Whether the point has been computed. Raises ValueError if the file holds one of another configuration."""
    if not path.exists():
        return False
    point = read_point(path)
    differ = differing(point["config"], config)
    if differ:
        raise ValueError(
            f"{path} is of another configuration ({', '.join(differ)} differ): choose another --out"
        )
    print(
        f"{path} is there: test {point['metric']} {point['test']:.1f} % at "
        f"{point['frame_period_ms']:.1f} ms a token{warning(point)}"
    )
    return True


def warning(point) -> str:
    """What to add to a score that guessing reaches too; nothing if it is better, or not known."""
    guess = point.get("guessing")
    if guess is None or better(point["metric"], point["test"], guess):
        return ""
    return (
        "; NO BETTER THAN GUESSING (its own answers, shuffled among the utterances, "
        f"reach {guess:.1f} %)"
    )


def read_point(path) -> dict:
    try:
        point = json.loads(path.read_text(encoding="utf-8"))
        whole = NEEDED <= point.keys() and {"task", "features", "seed"} <= point["config"].keys()
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is no point of finetune.py or adaptive_lambda.py, or it is damaged: delete it"
        )
    return point


def save_point(path, point):
    """Write the point, with the commit, machine and date that made it, in one go."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    point = {
        **point,
        "commit": git.stdout.strip(),
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(point, indent=1, ensure_ascii=False).encode())


def command(script, parser, args, lam, seed) -> str:
    """The command that computes a point again."""
    values = {**vars(args), "lam": [lam], "seed": seed, "seeds": 1, "out": "runs/again"}
    words = [script]
    for name, value in values.items():
        if value != parser.get_default(name) and name != "device":
            words += [
                f"--{name.replace('_', '-')}",
                *map(str, [] if value is True else value if isinstance(value, list) else [value]),
            ]
    return "python " + shlex.join(words)


def cost_of(heard, frames) -> dict:
    """Of a HiddenStateCache and its FrameCache (None: without an encoder)."""
    return {
        "frame_period_ms": heard.period_ms,
        "tokens": heard.tokens,
        "transformer_gflops_per_s": heard.gflops,
        "cnn_s": frames.seconds if frames else 0.0,
        "encode_s": heard.seconds,
    }


def better(metric, a, b) -> bool:
    """Whether score a is better than score b."""
    return a > b if metric in HIGHER_IS_BETTER else a < b


def check_numbers(args, *names, zero=False):
    """Refuse NaN, infinity, and numbers that are not over 0; with zero, 0 is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (0 < value < 2**63 or zero and value == 0):
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, expected a number {'from' if zero else 'over'} 0"
            )


def pick_device(name):
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if (
        name == "cuda"
        and not torch.cuda.is_available()
        or name == "mps"
        and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"--device {name}: torch finds none here")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def use_bf16(args, device) -> bool:
    """Whether to train under bf16 autocast: on CUDA alone.

    On a CPU it is no faster, and torch 2.14.1's grouped bf16 conv1d is wrong on processors with
    AMX: the positional convolution of preset tiny is 117 % off, without a word.
    """
    if args.precision == "bf16" and device.type != "cuda":
        raise ValueError(f"--precision bf16 is for CUDA, and this is {device.type}: leave it out")
    return args.precision != "fp32" and device.type == "cuda"


def save(content, path):
    """torch.save to path, whole or not at all. Raises OSError, say if the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: writing a file, torch hides why it failed
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def atomic_write(path):
    """A file to write bytes to. Whatever happens, path is left with either what it held or all that is written now."""
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
