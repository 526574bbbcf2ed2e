"""What was found: tables and figures, made from the points of finetune.py and adaptive_lambda.py.

    results/MODEL/*.json   a point each: one task, λ and seed (`make sweep` computes them anew);
                           MODEL-seed1 and MODEL-seed2: the same, pre-trained with these seeds
    results/pretraining/   the tables that pretrain.py printed about the encoders
    results/firing/        what firing.py found

    results/results.md     tables: the trade-off, the claims, the learned λ, …
    results/tradeoff.png   the metric over frame period and over cost, for CTC, seq2seq and pooling;
                           in a task with heads for all rates, beside points of the same rule only
    results/lambda.png     λ over epochs, from each starting point, if it was learned
    results/earlier/       points of earlier encoders and rules, with their tables and figures

Every number is a mean over heads, of all pre-training seeds that there are, ± their standard
deviation.

    python -m extras.results results
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from extras.claims import (
    METRIC_OF,
    PEERS,
    TASKS,
    all_claims,
    claims_table,
    load_heads,
    numbers_table,
    read_at,
)
from extras.firing import TOLERANCE_MS, firing_table, table
from parts.figures import COLOURS, STYLE
from parts.runs import differing, read_point

ENCODERS = {
    "ofa": "once-for-all",
    "segments": "once-for-all, segments",
    "ofa-one-lam": "once-for-all, one λ a step",
}
ONE_HEAD = {  # models of which there are heads for all rates
    "any": "once-for-all, one head",
    "segments": "segments, one head",
    "segments-oracle": "segments, pseudo-boundaries as an oracle, one head",
    "k1": "K = 1, one head",
    "k2": "K = 2, one head",
    "k3": "K = 3, one head",
}
SHOWN_MS = (20, 25, 33, 50, 70, 90, 130, 180)  # of the forty rates
# λ learned with a head, by folder: by which slope, and how its lines are drawn.
LEARNED = {
    "adaptive": ("autograd", "-"),
    "learned-autograd": ("autograd", ":"),
    "learned-differences": ("differences", "-"),
}
BASELINES = {"logmel": "log-mel", "random": "untrained encoder", "deaf": "deaf"}
LEGEND = """\
± is the standard deviation over seeds of the head. *ms / token*: mean frame period of all
utterances. *GFLOPs / s*: of positions and Transformer, per second of speech; attention's part
grows with the length of utterances, so tasks differ. *too short*: test utterances with fewer
tokens than CTC needs. *untrained encoder*: the same network with random weights. *deaf*: a head
without any input from the sound. CER and WER: lower is better; mAP: higher is better."""


# 1. The points.


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
        if path.parent.name in ("pretraining", "firing"):
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
        seeds = {"seed"} if model == path.parent.name else {"seed", "checkpoint_sha1"}
        differ = set(differing(config, beside[0]["config"])) - seeds
        if differ:
            raise ValueError(
                f"{path} is of another configuration than the points with other seeds beside it "
                f"({', '.join(sorted(differ))} differ)"
            )
    if not points:
        raise ValueError(f"no points under {folder}: compute them with `make sweep`")
    return points


class Summary:
    """Means over the seeds of one setting, and the standard deviation of the metric."""

    def __init__(self, points):
        def mean(name):
            return float(np.mean([point[name] for point in points]))

        self.seeds = len(points)
        self.test = mean("test")
        self.sd = standard_deviation([point["test"] for point in points])
        self.valid = mean("valid")
        self.period = mean("frame_period_ms")
        self.gflops = mean("transformer_gflops_per_s")
        self.epochs = mean("epochs")
        self.infeasible = 100 * mean("infeasible_test") / mean("test_utterances")  # %
        # Other work on the machine can only add time, so the fastest seed says most.
        self.minutes = min(point["train_s"] for point in points) / 60

    def __str__(self):
        return plus_minus(self.test, self.sd, 1)


def standard_deviation(values) -> float:
    """Of a sample; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


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
    return ours - theirs if task == "pool" else theirs - ours


# 2. The tables.


def tradeoff_table(points, task) -> str:
    """A row for each model and λ."""
    named = []  # (name, λ to print, Summary)
    for model, name in ENCODERS.items():
        for lam, summary in select(points, model, task).items():
            named.append((name, lam, summary))
    for lam, summary in select(points, "slots", task).items():
        named.append(("once-for-all, 3 symbols a token", lam, summary))
    for peer, name in PEERS.items():
        for summary in select(points, peer, task).values():
            named.append((name, "", summary))
    for features, name in BASELINES.items():
        for lam, summary in select(points, "baselines", task, features).items():
            named.append((name, lam if features == "random" else "", summary))

    rows = []
    for name, lam, summary in named:
        has_encoder = summary.gflops > 0
        period = f"{summary.period:.1f}" if has_encoder else ""
        gflops = f"{summary.gflops:.3f}" if has_encoder else ""
        short = f"{summary.infeasible:.0f} %" if task == "ctc" else ""
        epochs = f"{summary.epochs:.0f}"
        rows.append([name, lam, period, gflops, summary, summary.seeds, epochs, short])
    metric = f"{METRIC_OF[task]} %"
    header = ["model", "λ", "ms / token", "GFLOPs / s", metric, "seeds", "epochs", "too short"]
    return table(header, rows)


def any_table(folder, task) -> str:
    """Heads for all rates: a row for each model, a column for some of the forty frame periods."""
    rows = []
    for model, name in ONE_HEAD.items():
        heads = load_heads(folder, model, task, "any")
        if heads:
            rows.append([name, len(heads), *scores_at(heads)])
    for by in ("average", "merge"):
        heads = load_heads(folder, "rivals", task, "any", by)
        if heads:
            rows.append([f"no compression, {by}, one head", len(heads), *scores_at(heads)])
    return table(["model", "heads", *(f"{period} ms" for period in SHOWN_MS)], rows)


def scores_at(heads) -> list[str]:
    """The mean score ± its standard deviation at each period of SHOWN_MS."""
    tests = [read_at(heads, period)[0] for period in SHOWN_MS]
    return [plus_minus(t.mean(), standard_deviation(t), 1) for t in tests]


def search_table(folder) -> str:
    """The λ that was found on the curve of a head for all rates, at each price."""
    found = {}  # {(task, price): points}
    for path in sorted(folder.glob("any*/*-search-*.json")):
        point = read_point(path)
        key = (point["config"]["task"], point["config"]["price"])
        found.setdefault(key, []).append(point)
    rows = []
    for task, name in TASKS.items():
        heads = load_heads(folder, "any", task, "any")
        for (of_task, price), points in sorted(found.items()):
            if of_task != task:
                continue
            summary = Summary(points)
            best = [gain(task, head.test, 0).max() for head in heads]
            lams = [point["lam"] for point in points]
            periods = [point["frame_period_ms"] for point in points]
            rows.append(
                [
                    name,
                    f"{price:g}",
                    len(points),
                    plus_minus(np.mean(lams), standard_deviation(lams), 2),
                    plus_minus(np.mean(periods), standard_deviation(periods), 0),
                    summary,
                    f"{abs(np.mean(best)):.1f}",
                    f"{summary.minutes + min(p['test_s'] for p in points) / 60:.1f}",
                ]
            )
    header = ["task", "price", "heads", "λ found", "ms / token", "metric %"]
    header += ["best of the forty, by test", "minutes, fastest"]
    return table(header, rows)


def learned_table(points) -> str:
    """A row for each task, start and price of a learned λ, beside the best λ of the grid."""
    rows = []
    for task, name in TASKS.items():
        grid = grid_of_learned(points, task)
        if not grid:
            continue
        # Chosen by validation, as a user would: the test split is not for choosing.
        best = max(grid, key=lambda lam: gain(task, grid[lam].valid, 0))
        minutes_of_grid = sum(summary.minutes for summary in grid.values())
        for setting in learned_settings(points, task):
            summary = Summary(points[setting])
            lams = [point["lam"] for point in points[setting]]
            rows.append(
                [
                    name,
                    LEARNED[setting.model][0],
                    setting.lam,
                    f"{setting.price:g}",
                    summary.seeds,
                    plus_minus(np.mean(lams), standard_deviation(lams), 2),
                    f"{summary.period:.0f}",
                    summary,
                    f"{grid[best]} at {best:g}",
                    f"{gain(task, summary.test, grid[best].test):+.1f}",
                    f"{summary.minutes:.1f}",
                    f"{minutes_of_grid:.1f}",
                ]
            )
    header = ["task", "slope by", "λ starts at", "price", "seeds", "λ learned", "ms / token"]
    header += ["metric %", "best of the grid (by validation)", "better by"]
    header += ["minutes, fastest seed", "minutes of the grid"]
    return table(header, rows)


def grid_of_learned(points, task) -> dict:
    """The grid on the encoder on which λ was learned, known by the hash of its checkpoint."""
    hashes = {points[s][0]["config"].get("checkpoint_sha1") for s in learned_settings(points, task)}
    for model in ENCODERS:
        grid = select(points, model, task)
        of_grid = {
            runs[0]["config"].get("checkpoint_sha1")
            for setting, runs in points.items()
            if setting.model == model and setting.task == task
        }
        if grid and of_grid == hashes:
            return grid
    return {}


def read_rows(path, script) -> list[dict]:
    """The rows of a table that a script has written. Raises ValueError if it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no table of {script}, or it is damaged: make it anew with `make results` "
            "or `make sweep`"
        ) from None


def pretraining_table(folder) -> str:
    """What pretrain.py measured of each encoder."""
    cells = []
    for model, name in {**ENCODERS, **PEERS}.items():
        path = folder / f"{model}.json"
        if not path.exists():
            continue
        for row in read_rows(path, "pretrain.py"):
            line = [name, f"{row['lam']:.2f}", f"{row['period_ms']:.1f}"]
            line += [f"{row['closed_form_ms']:.1f}", f"{np.mean(row['distillation']):.3f}"]
            cells.append(line)
    return table(["model", "λ", "ms / token", "closed form", "distillation loss"], cells)


# 3. The figures.


def tradeoff_figure(points, folder, path):
    """The metric over the frame period (above) and over the cost (below), a column for each task.

    Both rows run from expensive to cheap, so that they can be compared at a glance.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(TASKS), figsize=(13, 8), layout="constrained", sharey="col"
        )
        for task, (above, below) in zip(TASKS, axes.T):
            draw_tradeoff(above, points, folder, task, "period")
            draw_tradeoff(below, points, folder, task, "gflops")
        add_legend(figure, axes, ncols=3)
        figure.savefig(path)
        plt.close(figure)


def draw_tradeoff(axis, points, folder, task, x):
    """One panel. x: what is drawn to the right, "period" or "gflops", attributes of Summary."""
    points = comparable(points, folder, task)
    draw_any(axis, folder, task, x)
    draw_own(axis, points, task, x)
    draw_peers(axis, points, task, x)
    draw_learned(axis, points, task, x)
    labels = ("log-mel, same head", "untrained encoder, λ = 0", "deaf head (no input)")
    for features, label in zip(BASELINES, labels):
        summaries = list(select(points, "baselines", task, features).values())
        if summaries:
            color = COLOURS[features]
            axis.axhline(summaries[0].test, color=color, linestyle="--", label=label)

    # As high as characters need, so that a point looks alike in all tasks.
    low, high = axis.get_ylim()
    room = max(0, 60 - (high - low)) / 2
    axis.set(ylim=(low - room, high + room), ylabel=f"test {METRIC_OF[task]} (%)")

    axis.set(title=f"{TASKS[task]}, {better_is(task)}")
    if x == "period":
        axis.set(xlabel="frame period in ms per token (cheaper →)", xscale="log")
        axis.set(xticks=[20, 33, 50, 90, 180], xticklabels=[20, 33, 50, 90, 180])
        axis.minorticks_off()
    else:
        axis.set(title="", xlabel="Transformer GFLOPs per second\nof speech (cheaper →)")
        axis.xaxis.set_inverted(True)


def comparable(points, folder, task) -> dict[Setting, list[dict]]:
    """The points that may stand in one panel with the heads for all rates: all, if there are none.

    Points without a bootstrap are older: their heads were trained by another rule, and most of
    their encoders are others.
    """
    if not load_heads(folder, "any", task, "any"):
        return points
    return {
        setting: runs for setting, runs in points.items() if all("bootstrap" in run for run in runs)
    }


def draw_any(axis, folder, task, x):
    """The curves of heads for all rates: their mean, and a band of a standard deviation."""
    drawn = [("any", "encoder", COLOURS["ofa"], "-", "once-for-all, one head for all rates")]
    drawn += [("rivals", "average", COLOURS["peer"], ":", "no compression, frames averaged")]
    drawn += [("rivals", "merge", COLOURS["peer"], "-.", "no compression, alike frames merged")]
    for model, features, colour, style, label in drawn:
        heads = load_heads(folder, model, task, "any", features)
        if not heads:
            continue
        periods = heads[0].periods
        tests = np.array([np.interp(periods, head.periods, head.test) for head in heads])
        mean = tests.mean(0)
        xs = periods if x == "period" else cost_at(periods, folder / model, task, features)
        axis.plot(xs, mean, style, color=colour, linewidth=2.5, label=label)
        if len(heads) > 1:
            sd = tests.std(0, ddof=1)
            axis.fill_between(xs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def cost_at(periods, folder, task, features) -> np.ndarray:
    """GFLOPs per second of speech at these frame periods, of the first head for all rates."""
    for path in sorted(folder.glob(f"{task}-*any-seed*.json")):
        point = read_point(path)
        if point["config"]["features"] == features:
            break
    known = [row["frame_period_ms"] for row in point["rows"]]
    return np.interp(periods, known, [row["transformer_gflops_per_s"] for row in point["rows"]])


def draw_own(axis, points, task, x):
    """Heads of their own at single rates, on the once-for-all encoder, and on an earlier one."""
    curve = list(select(points, "ofa", task).values())
    xs = np.array([getattr(summary, x) for summary in curve])
    tests = np.array([summary.test for summary in curve])
    sds = np.array([summary.sd for summary in curve])
    green = COLOURS["ofa"]
    if curve:
        label = "once-for-all, a head for each rate"
        axis.plot(xs, tests, "o-", color=green, linewidth=1.2, label=label)
        axis.fill_between(xs, tests - sds, tests + sds, color=green, alpha=0.2, linewidth=0)

    before = select(points, "ofa-one-lam", task).values()
    if before:
        axis.plot(
            [getattr(summary, x) for summary in before],
            [summary.test for summary in before],
            "--",
            color=green,
            label=ENCODERS["ofa-one-lam"],
        )


def draw_peers(axis, points, task, x):
    """A mark for each peer, with a bar of a standard deviation."""
    black = COLOURS["peer"]
    for peer in PEERS:
        marker, label = peer_mark(peer)
        for summary in select(points, peer, task).values():
            at = getattr(summary, x)
            axis.plot(at, summary.test, marker, markersize=8, color=black, label=label)
            if summary.seeds > 1:
                axis.errorbar(at, summary.test, summary.sd, color=black)


def draw_learned(axis, points, task, x):
    """A star for each run in which λ was learned, since it ends elsewhere with each seed."""
    stars = []
    for setting in learned_settings(points, task):
        if setting.price == 0:
            stars += [Summary([point]) for point in points[setting]]
    if stars:
        axis.plot(
            [getattr(star, x) for star in stars],
            [star.test for star in stars],
            "*",
            markersize=11,
            color=COLOURS["learned"],
            label="λ learned (one λ a step), each run",
            zorder=5,
        )


def better_is(task) -> str:
    """Which way the task's metric is better."""
    return f"{METRIC_OF[task]}: {'higher' if task == 'pool' else 'lower'} is better"


def peer_mark(peer) -> tuple[str, str]:
    """Marker and label of a peer."""
    if peer == "none":
        return "s", "no compression"
    if peer.startswith("average"):
        return {"average2": "^", "average4": "v"}[peer], PEERS[peer]
    return "X", "CIF trained at one λ"


def lambda_figure(points, path):
    """λ (above) and the validation metric (below) over epochs, without a price."""
    tasks = []
    for task in TASKS:
        if any(setting.price == 0 for setting in learned_settings(points, task)):
            tasks.append(task)
    if not tasks:
        return
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2,
            len(tasks),
            figsize=(1 + 4.2 * len(tasks), 7.5),
            layout="constrained",
            sharex="col",
            squeeze=False,
        )
        for task, (above, below) in zip(tasks, axes.T):
            draw_search(above, below, points, task)
        add_legend(figure, axes, ncols=4)
        figure.savefig(path)
        plt.close(figure)


def draw_search(above, below, points, task):
    """One task's λ on the axis above, its validation metric on the one below; a line for a run."""
    colours = COLOURS["starts"]
    settings = [s for s in learned_settings(points, task) if s.price == 0]
    starts = sorted({setting.lam for setting in settings})
    for setting in settings:
        colour = colours[starts.index(setting.lam) % len(colours)]
        slope, style = LEARNED[setting.model]
        for point in points[setting]:
            search = point["search"]
            epochs = np.arange(len(search) + 1)
            lams = [setting.lam, *(epoch["lam"] for epoch in search)]
            label = f"from λ = {setting.lam:g}, by {slope}"
            above.plot(epochs, lams, style, color=colour, label=label)
            above.plot(epochs[-1], point["lam"], "*", markersize=12, color=colour)
            below.plot(epochs[1:], [epoch["valid"] for epoch in search], style, color=colour)
    above.plot([], [], "*", markersize=12, color="black", label="the λ that was learned")
    above.set(title=TASKS[task], ylabel="λ", ylim=(0, None))
    # A head that repeats itself has a WER of several hundred: such lines leave the figure.
    below.set(title=better_is(task), ylabel=f"validation {METRIC_OF[task]} (%)", ylim=(0, 105))
    highest = max(epoch["valid"] for s in settings for p in points[s] for epoch in p["search"])
    below.set(xlabel="epochs" if highest <= 105 else "epochs (values over 105 % are cut off)")


def add_legend(figure, axes, ncols):
    """One legend below all panels, with each label once. axes: an array of one or two rows."""
    labelled = {}
    for axis in np.atleast_2d(axes)[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=ncols)


# 4. The page.


def page(points, folder) -> str:
    """All tables as one Markdown text."""
    runs = [point for seeds in points.values() for point in seeds]
    machines = sorted({f"{point['machine']} ({point['date']})" for point in runs})
    text = [
        "# What was found",
        "Made by `python -m extras.results` from the points beside it; computed on "
        f"{'; '.join(machines)}.",
        LEGEND,
    ]
    for task, name in TASKS.items():
        text += [f"## {name[0].upper()}{name[1:]}", tradeoff_table(points, task)]
        if load_heads(folder, "any", task, "any"):
            text += ["One head for all rates:", any_table(folder, task)]
    claims = [entry for entry in all_claims(folder) if entry["numbers"]]
    if claims:
        text += [
            "## Claims",
            "Differences are in points of the metric, + where the first is better, with the "
            "interval in which 95 % of them lie (extras/claims.py).",
            claims_table(claims),
        ]
        for entry in claims:
            if numbers_table(entry):
                text += [f"*{entry['claim']}*: {entry['verdict']}", numbers_table(entry)]
    if any(folder.glob("any*/*-search-*.json")):
        text += [
            "## λ found on the curve of one head",
            "*price*: what is added to the loss, times tokens per frame.",
            search_table(folder),
        ]
    if any(learned_settings(points, task) for task in TASKS):
        text += [
            "## The learned λ",
            "*price*: what is added to the loss, times tokens per frame.",
            learned_table(points),
        ]
    if (folder / "pretraining").exists():
        text += [
            "## Pre-training",
            "What pretrain.py printed about each encoder, on the test split.",
            pretraining_table(folder / "pretraining"),
        ]
    if (folder / "firing").exists():
        text += [
            "## Where tokens fire",
            "Agreement with pseudo-boundaries on held-out speech, "
            f"± {TOLERANCE_MS} ms (extras/firing.py).",
        ]
        for path in sorted((folder / "firing").glob("*.json")):
            name = ENCODERS.get(path.stem, path.stem)
            text += [f"### {name}", firing_table(read_rows(path, "firing.py"))]
    return "\n\n".join(text)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.results",
        description="Make the tables and figures of results/ anew.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = "where the points are, and the tables and figures go"
    parser.add_argument("folder", nargs="?", default="results", help=where)
    folder = Path(parser.parse_args().folder)
    points = load_points(folder)
    text = page(points, folder)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    tradeoff_figure(points, folder, folder / "tradeoff.png")
    lambda_figure(points, folder / "lambda.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"results.py: {error}")
