"""Points, as differences.py, claims.py, results.py and curves.py read them.

    results/MODEL/*.json    a point each (see parts/runs.py): one task, and one λ or forty rates,
                            and one seed of the head
    MODEL-seed1, -seed2     the same, on encoders that were pre-trained with these seeds

Points that differ in their seeds alone are one *setting*, and are summed up together. A head for
all rates is read as a curve; so are the heads of one seed at several λ.
"""

import json
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from parts.runs import HIGHER_IS_BETTER, differing, read_point

TASKS = {
    "ctc": "characters (CTC)",
    "seq2seq": "translation (seq2seq)",
    "pool": "concepts (pooling)",
}
PEERS = {
    "none": "no compression",
    "lam0.51": "CIF at λ = 0.51",
    "average2": "average of 2",
    "lam0.78": "CIF at λ = 0.78",
    "average4": "average of 4",
    "lam1.04": "CIF at λ = 1.04",
}
LONGER_PEER = {"none-150": "no compression, 150 epochs"}
METRIC_OF = {"ctc": "CER", "seq2seq": "WER", "pool": "mAP"}
ENCODERS = {
    "ofa": "once-for-all",
    "segments": "once-for-all, segments",
}
KS = {"k1": "K = 1", "k2": "K = 2", "k3": "K = 3"}  # pre-trained with so many λ a step
BASELINES = {"logmel": "log-mel", "random": "untrained encoder", "deaf": "deaf"}
# λ learned with a head, by folder: by which slope, and how its lines are drawn.
LEARNED = {
    "learned-autograd": ("autograd", ":"),
    "learned-differences": ("differences", "-"),
}


# 1. Points at one λ.


class Setting(NamedTuple):
    """What points that differ only in their seeds have in common."""

    model: str  # the folder
    task: str
    features: str
    lam: float  # where λ is learned: its start
    price: float  # of a token per frame, where λ is learned


def load_points(folder) -> dict[Setting, list[dict]]:
    """The points under folder, a list of seeds for each setting, without heads for any rate.

    Raises ValueError where there are none, or where points of one setting differ in more than the
    seeds of the head and of pre-training.
    """
    points = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name in ("pretraining", "firing", "slopes"):
            continue
        point = read_point(path)
        config = point["config"]
        if config.get("lam") == "any":
            continue
        model = re.sub(r"-seed\d+$", "", path.parent.name)
        setting = Setting(
            model=model,
            task=config["task"],
            features=config["features"],
            lam=config.get("lam", config.get("start")),
            price=config.get("price", 0.0),
        )
        beside = points.setdefault(setting, [])
        beside.append(point)
        check_alike(path, point, beside[0])
    if not points:
        raise ValueError(
            f"no points at one λ under {folder}: `make sweep RESULTS={folder}` computes them"
        )
    return points


def check_alike(path, point, first):
    """Refuse a point that differs from the first of its kind in more than seeds, by ValueError."""
    seeds = {"seed"}
    if re.search(r"-seed\d+$", path.parent.name):
        seeds.add("checkpoint_sha1")
    differ = set(differing(point["config"], first["config"])) - seeds
    if point.get("bf16") != first.get("bf16"):  # --precision auto is the device's choice
        differ.add("bf16")
    if differ:
        raise ValueError(
            f"{path} is of another configuration than the points with other seeds beside it "
            f"({', '.join(sorted(differ))} differ)"
        )


class Summary:
    """Means over the seeds of one setting, and the standard deviation of the metric."""

    def __init__(self, points):
        encoders = [point["config"].get("checkpoint_sha1") for point in points]

        def mean_sd(name):
            mean, sd = mean_and_sd([point[name] for point in points], encoders)
            return float(mean), float(sd)

        def mean(name):
            return mean_sd(name)[0]

        self.encoders = len(set(encoders) - {None})
        self.heads = len(points)
        self.test, self.sd = mean_sd("test")
        self.valid = mean("valid")
        self.period = mean("frame_period_ms")
        self.gflops = mean("transformer_gflops_per_s")
        self.epochs = mean("epochs")
        self.infeasible = 100 * mean("infeasible_test") / mean("test_utterances")  # %

    def __str__(self):
        return plus_minus(self.test, self.sd, 1)


def mean_and_sd(values, encoders):
    """The mean of scores and their standard deviation: over encoders, each with the mean of its
    heads, or over heads, where all are on one encoder.

    values (H,) or (H, R): a score, or several, of each head; encoders: a name for each head.
    """
    of_encoder = defaultdict(list)
    for encoder, value in zip(encoders, values):
        of_encoder[encoder].append(value)
    means = [np.mean(of_one, 0) for of_one in of_encoder.values()]
    varying = means if len(means) > 1 else values
    mean = np.mean(means, 0)
    if len(varying) == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, np.std(varying, 0, ddof=1)


def plus_minus(mean, sd, digits) -> str:
    """The mean ± the standard deviation, or the mean alone where there is no deviation."""
    if np.isnan(sd):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def select(points, model, task, features="encoder") -> dict[float, Summary]:
    """{λ, or where a learned λ started: Summary} in order, without those that paid a price."""
    wanted = (model, task, features)
    found = {}
    for setting in sorted(points):
        if setting[:3] == wanted and setting.price == 0:
            found[setting.lam] = Summary(points[setting])
    return found


def learned_settings(points, task) -> list[Setting]:
    """Those in which λ was learned: by price, then by slope, then by start."""
    learned = [s for s in points if s.model in LEARNED and s.task == task]
    return sorted(learned, key=lambda setting: (setting.price, setting.model, setting.lam))


def gain(task, ours, theirs) -> float:
    """How much better ours is, in points of the task's metric."""
    return ours - theirs if METRIC_OF[task] in HIGHER_IS_BETTER else theirs - ours


# 2. Curves over the rate.


class Head(NamedTuple):
    """One head on one encoder, or heads of one seed at several λ: its scores over the rate."""

    encoder: str  # the hash of its checkpoint
    lams: np.ndarray  # (R,)
    periods: np.ndarray  # (R,) in ms, ascending
    gflops: np.ndarray  # (R,) of positions and Transformer, per second of speech
    test: np.ndarray  # (R,)
    valid: np.ndarray  # (R,)
    draws: np.ndarray  # (R, 200) on resampled test splits
    epochs: int  # for which it learned


# What of a point is in the fields of Head from lams to draws.
HEAD_COLUMNS = ("lam", "frame_period_ms", "transformer_gflops_per_s", "test", "valid", "bootstrap")


def load_heads(folder, model, task, which="own", features="encoder") -> list[Head]:
    """The heads of a model and those of its other pre-training seeds.

    which: "any", one head for all rates; or "own", a head at each λ, which are gathered by seed.
    """
    gathered = defaultdict(list)  # {(encoder, seed): rows}
    epochs_of = {}
    first = None  # the first head for all rates
    folders = [folder / model, *sorted(folder.glob(f"{model}-seed*"))]
    for path in [path for place in folders for path in sorted(place.glob(f"{task}-*.json"))]:
        point = read_point(path)
        config = point["config"]
        is_any = config.get("lam") == "any"
        if config["features"] != features or "way" in config or is_any != (which == "any"):
            continue
        rows = [{**point, "lam": config["lam"]}]
        if is_any:
            first = first or point
            check_alike(path, point, first)
            rows = point["rows"]
        gathered[config["checkpoint_sha1"], config["seed"]] += rows
        epochs_of[config["checkpoint_sha1"], config["seed"]] = point["epochs"]
    heads = []
    for (encoder, seed), rows in gathered.items():
        rows.sort(key=lambda row: row["frame_period_ms"])
        columns = [[row[name] for row in rows] for name in HEAD_COLUMNS]
        heads.append(Head(encoder, *map(np.array, columns), epochs_of[encoder, seed]))
    return heads


def score_at(heads, periods, split="test") -> np.ndarray:
    """Scores of each head at a frame period in ms (H,), or at several (H, R); split: or valid."""
    return np.array([np.interp(periods, head.periods, getattr(head, split)) for head in heads])


def draws_at(heads, period) -> np.ndarray:
    """Scores (H, 200) of each head on the resampled test splits, at a frame period in ms."""
    draws = [[np.interp(period, head.periods, column) for column in head.draws.T] for head in heads]
    return np.array(draws)


# 3. What other scripts have measured.


def read_measured(path, script, name="rows") -> dict:
    """What a script has written: rows, under a name, and more. Raises ValueError without them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content[name]  # a KeyError, if there are none
        return content
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no table of {script}, or it is damaged: make it anew with `make results` "
            "or `make sweep`"
        ) from None
