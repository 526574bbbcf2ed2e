"""A point: what one head reached at one λ with one seed, as a JSON file.

    config    all that the result depends on: flags, λ, seed, and hashes of the checkpoint and of a TSV
    command   computes it again
    metric, test, valid, history, …     what finetune.train returns
    guessing                            what guessing reaches on test (older points lack it)
    frame_period_ms, tokens, transformer_gflops_per_s, cnn_s, encode_s, train_s     what it cost
    commit, machine, date

A point that is there is not computed again, so that a sweep goes on where it was stopped.

`python points.py [results/ofa]` lists the points in a folder.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from files import whole
from tasks import better

NEEDED = {"config", "metric", "test", "valid", "epochs", "infeasible_test", "test_utterances", "frame_period_ms", "transformer_gflops_per_s",
          "train_s", "machine", "date"}  # what results.py reads


def differing(a: dict, b: dict) -> list[str]:
    """Names of what differs between two configurations. A checkpoint is known by its hash, wherever it lies."""
    return sorted(k for k in {*a, *b} - {"checkpoint"} if a.get(k) != b.get(k))


def is_there(path, config) -> bool:
    """Whether the point has been computed. Raises ValueError if the file holds one of another configuration."""
    if not path.exists():
        return False
    point = read_point(path)
    differ = differing(point["config"], config)
    if differ:
        raise ValueError(f"{path} is of another configuration ({', '.join(differ)} differ): choose another --out")
    print(f"{path} is there: test {point['metric']} {point['test']:.1f} % at "
          f"{point['frame_period_ms']:.1f} ms a token{warning(point)}")
    return True


def warning(point) -> str:
    """What to add to a score that guessing reaches too; nothing if it is better, or not known."""
    guess = point.get("guessing")
    if guess is None or better(point["metric"], point["test"], guess):
        return ""
    return ("; NO BETTER THAN GUESSING (its own answers, shuffled among the utterances, "
            f"reach {guess:.1f} %)")


def read_point(path) -> dict:
    try:
        point = json.loads(path.read_text(encoding="utf-8"))
        whole = NEEDED <= point.keys() and {"task", "features", "seed"} <= point["config"].keys()
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is no point of finetune.py or adaptive_lambda.py, or it is damaged: delete it")
    return point


def save_point(path, point):
    """Write the point, with the commit, machine and date that made it, in one go."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    point = {**point, "commit": git.stdout.strip(), "machine": machine, "date": time.strftime("%Y-%m-%d")}
    with whole(path) as file:
        file.write(json.dumps(point, indent=1, ensure_ascii=False).encode())


def command(script, parser, args, lam, seed) -> str:
    """The command that computes a point again."""
    values = {**vars(args), "lam": [lam], "seed": seed, "seeds": 1, "out": "runs/again"}
    words = [script]
    for name, value in values.items():
        if value != parser.get_default(name) and name != "device":
            words += [f"--{name.replace('_', '-')}", *map(str, [] if value is True else value if isinstance(value, list) else [value])]
    return "python " + shlex.join(words)


def cost_of(heard, frames) -> dict:
    """Of a Heard and its Frames (None: without an encoder)."""
    return {"frame_period_ms": heard.period_ms, "tokens": heard.tokens, "transformer_gflops_per_s": heard.gflops,
            "cnn_s": frames.seconds if frames else 0.0, "encode_s": heard.seconds}


if __name__ == "__main__":
    try:
        for path in sorted(Path(sys.argv[1] if len(sys.argv) > 1 else "results/ofa").glob("*.json")):
            point = read_point(path)
            print(f"{path.stem:<32} {point['frame_period_ms']:6.1f} ms a token, λ = {point.get('lam', point['config'].get('lam')):.2f}   "
                  f"valid {point['valid']:5.1f}, test {point['test']:5.1f} % {point['metric']}   {point['epochs']:>3} epochs")
    except ValueError as error:
        sys.exit(f"points.py: {error}")
