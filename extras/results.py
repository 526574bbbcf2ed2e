"""What was found: the page of results/, made from the points of finetune.py and adaptive_lambda.py.

    results/MODEL/*.json   points (see points.py); `make sweep` computes them anew
    results/pretraining/   the tables that pretrain.py printed about the encoders
    results/firing/        what firing.py found
    results/slopes/        what slopes.py found

    results/results.md     tables: the trade-off, the claims, the learned λ, …
    results/*.png          figures (see curves.py)

A mean is over encoders, each with the mean of its heads.

    python -m extras.results results
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

from extras.claims import (
    against_peers,
    all_claims,
    claims_table,
    compare_with_best,
    numbers_table,
)
from extras.curves import lambda_figure, tradeoff_figure
from extras.differences import compare_at
from extras.firing import TOLERANCE_MS, firing_table, table
from extras.points import (
    BASELINES,
    ENCODERS,
    KS,
    LEARNED,
    LONGER_PEER,
    METRIC_OF,
    PEERS,
    TASKS,
    Summary,
    gain,
    learned_settings,
    load_heads,
    load_points,
    mean_and_sd,
    plus_minus,
    read_measured,
    score_at,
    select,
)
from extras.slopes import slopes_table
from parts.runs import read_point, save_text

OTHER_HEADS = {
    "ofa-150": "once-for-all, 150 epochs",
    **LONGER_PEER,
    "slots": "once-for-all, 3 symbols a token",
}
ONE_HEAD = {  # models of which there are heads for all rates
    "any": "once-for-all, one head",
    "segments": "segments, one head",
    "segments-oracle": "segments, pseudo-boundaries as an oracle, one head",
    **{model: f"{name}, one head" for model, name in KS.items()},
}
SHORT_MS = 60  # nearly all searches by the metric, without a price, end below this
SHOWN_MS = (20, 25, 33, 50, 70, 90, 130, 180)  # of the forty rates
LEGEND = """\
± is the standard deviation over encoders that were pre-trained with other seeds, each with the mean
of its heads; over heads, where there is one encoder. *ms / token*: mean frame period of all
utterances, or of a sample for heads of all rates. *GFLOPs / s*: of positions and Transformer, per
second of speech; attention's part grows with the length of utterances, so tasks differ. *too
short*: test utterances with fewer tokens than CTC needs. CER and WER: lower is better; mAP: higher
is better."""


# 1. The tables.


def tradeoff_table(points, task) -> str:
    """A row for each model and λ."""
    named = []  # (name, λ to print, Summary)
    for model, name in {**ENCODERS, **OTHER_HEADS}.items():
        for lam, summary in select(points, model, task).items():
            named.append((name, lam, summary))
    for peer, name in PEERS.items():
        for summary in select(points, peer, task).values():
            named.append((name, "", summary))
    for features, name in BASELINES.items():
        for lam, summary in select(points, "baselines", task, features).items():
            named.append((name, lam if features == "random" else "", summary))

    rows = []
    for name, lam, summary in named:
        has_encoder = summary.encoders > 0
        period = f"{summary.period:.1f}" if has_encoder else ""
        gflops = f"{summary.gflops:.3f}" if has_encoder else ""
        short = f"{summary.infeasible:.0f} %" if task == "ctc" else ""
        epochs = f"{summary.epochs:.0f}"
        counts = [summary.encoders, summary.heads]
        rows.append([name, lam, period, gflops, summary, *counts, epochs, short])
    metric = f"{METRIC_OF[task]} %"
    header = ["model", "λ", "ms / token", "GFLOPs / s", metric]
    header += ["encoders", "heads", "epochs", "too short"]
    return table(header, rows)


def any_table(folder, task, models=tuple(ONE_HEAD)) -> str:
    """Heads for all rates: a row for each model and each rival, a column for some of the forty
    frame periods."""
    named = {ONE_HEAD[model]: load_heads(folder, model, task, "any") for model in models}
    for by in ("average", "merge"):
        heads = load_heads(folder, "rivals", task, "any", by)
        named[f"no compression, {by}, one head"] = heads
    rows = []
    for name, heads in named.items():
        if heads:
            encoders = [head.encoder for head in heads]
            found = [mean_and_sd(score_at(heads, period), encoders) for period in SHOWN_MS]
            scores = [plus_minus(mean, sd, 1) for mean, sd in found]
            rows.append([name, len(set(encoders)), len(heads), heads[0].epochs, *scores])
    header = ["model", "encoders", "heads", "epochs", *(f"{period} ms" for period in SHOWN_MS)]
    return table(header, rows)


def longer_tokens_table(folder) -> str:
    """What longer tokens cost a head for all rates, beside those of 20 ms, with intervals."""
    numbers = []
    for task in TASKS:
        heads = load_heads(folder, "any", task, "any")
        differences = compare_at(SHOWN_MS[1:], task, "20 ms", heads, heads, their_period=20)
        numbers += [difference._asdict() for difference in differences]
    return numbers_table({"numbers": numbers})


def encoders_table(folder) -> str:
    """What pre-training with another seed changes: a row for each encoder of a model with several,
    with the mean over its heads, ± their standard deviation."""
    models = {"any": "once-for-all, one head, at 20 ms", **PEERS}
    scores = {}  # {(model, task): {encoder: scores of its heads}}
    for model, task in product(models, TASKS):
        of_encoder = scores.setdefault((model, task), {})
        for head in load_heads(folder, model, task, "any" if model == "any" else "own"):
            of_encoder.setdefault(head.encoder, []).append(float(head.test[0]))
    rows = []
    for model, name in models.items():
        encoders = list(dict.fromkeys(e for task in TASKS for e in scores[model, task]))
        for encoder in encoders if len(encoders) > 1 else ():
            found = [scores[model, task].get(encoder, []) for task in TASKS]
            rows.append([name, encoder, *map(mean_of_heads, found)])
    if not rows:
        return ""
    return table(["model", "encoder", *(f"{TASKS[t]}, {METRIC_OF[t]}" for t in TASKS)], rows)


def mean_of_heads(scores) -> str:
    return plus_minus(*mean_and_sd(scores, ["one"] * len(scores)), 1) if scores else ""


def search_table(folder) -> str:
    """The λ that was found on the curve of a head for all rates, at each price."""
    found = {}  # {(task, what was compared, price): points}
    for path in sorted(folder.glob("any*/*-search-*.json")):
        point = read_point(path)
        config = point["config"]
        key = (config["task"], config["by"], config["price"])
        found.setdefault(key, []).append(point)
    rows = []
    for task, name in TASKS.items():
        for (of_task, by, price), points in sorted(found.items()):
            if of_task != task:
                continue
            summary = Summary(points)
            encoders = [point["config"]["checkpoint_sha1"] for point in points]
            lams = mean_and_sd([point["lam"] for point in points], encoders)
            periods = mean_and_sd([point["frame_period_ms"] for point in points], encoders)
            rows.append(
                [
                    name,
                    METRIC_OF[task] if by == "metric" else by,
                    f"{price:g}",
                    len(points),
                    plus_minus(*lams, 2),
                    plus_minus(*periods, 0),
                    summary,
                    compare_with_best(folder, task, points) or "",
                ]
            )
    header = ["task", "by", "price", "heads", "λ found", "ms / token", "metric %"]
    header += ["beside the best of the forty, by test"]
    return table(header, rows)


def splits_table(folder) -> str:
    """How alike heads for all rates do on validation, where a search chooses, and on test."""
    rows = []
    for task, name in TASKS.items():
        heads = load_heads(folder, "any", task, "any")
        if not heads:
            continue
        encoders = [head.encoder for head in heads]
        periods = heads[0].periods
        valid, _ = mean_and_sd(score_at(heads, periods, "valid"), encoders)  # (R,)
        test, _ = mean_and_sd(score_at(heads, periods), encoders)  # (R,)
        row = [name]
        for longest in (periods[-1], SHORT_MS):
            some = periods <= longest
            span = np.ptp(test[some])
            correlation = np.corrcoef(valid[some], test[some])[0, 1]
            row += [f"{span:.1f}", f"{correlation:.2f}"]
        rows.append(row)
    header = ["task", "span on test", "correlation of the splits"]
    header += [f"span up to {SHORT_MS} ms", "correlation there"]
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
        for setting in learned_settings(points, task):
            summary = Summary(points[setting])
            better = gain(task, summary.test, grid[best].test)
            encoders = [point["config"]["checkpoint_sha1"] for point in points[setting]]
            lams = mean_and_sd([point["lam"] for point in points[setting]], encoders)
            rows.append(
                [
                    name,
                    LEARNED[setting.model][0],
                    setting.lam,
                    f"{setting.price:g}",
                    summary.heads,
                    plus_minus(*lams, 2),
                    f"{summary.period:.0f}",
                    f"{summary.epochs:.0f}",
                    summary,
                    f"{grid[best]} at {best:g}",
                    f"{better:+.1f}" if summary.epochs == grid[best].epochs else "",
                ]
            )
    header = ["task", "slope by", "λ starts at", "price", "heads", "λ learned", "ms / token"]
    header += ["epochs", "metric %", "best of the grid (by validation)", "better by"]
    return table(header, rows)


def grid_of_learned(points, task) -> dict:
    """The grid on the encoder on which λ was learned, known by the hash of its checkpoint."""
    learned = [run for setting in learned_settings(points, task) for run in points[setting]]
    encoders = {run["config"].get("checkpoint_sha1") for run in learned}
    on_these = {}
    for setting, runs in points.items():
        same = [run for run in runs if run["config"].get("checkpoint_sha1") in encoders]
        if same:
            on_these[setting] = same
    for model in ENCODERS:
        grid = select(on_these, model, task)
        if grid:
            return grid
    return {}


def pretraining_table(folder) -> str:
    """What pretrain.py measured of each encoder."""
    cells = []
    for model, name in {**ENCODERS, **KS, **PEERS}.items():
        for path in [*folder.glob(f"{model}.json"), *sorted(folder.glob(f"{model}-seed*.json"))]:
            seed = path.stem.partition("-seed")[2] or "0"
            measured = read_measured(path, "pretrain.py")
            steps = measured["args"]["steps"]
            for row in measured["rows"]:
                line = [name, seed, steps, f"{row['lam']:.2f}", f"{row['period_ms']:.1f}"]
                line += [f"{row['closed_form_ms']:.1f}", f"{np.mean(row['distillation']):.3f}"]
                cells.append(line)
    header = ["model", "seed", "steps", "λ", "ms / token", "closed form", "distillation loss"]
    return table(header, cells)


# 2. The page.


def page(points, folder) -> str:
    """All tables as one Markdown text."""
    runs = [point for seeds in points.values() for point in seeds]
    machines = sorted({f"{point['machine']} ({point['date']})" for point in runs})
    text = [
        "# What was found",
        "Made by `python -m extras.results` from the points beside it; those at one λ computed on "
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
            "Differences are in points of the metric, + where the first is better, with 95 % "
            "intervals (extras/differences.py).",
            claims_table(claims),
        ]
        for entry in claims:
            numbers = numbers_table(entry)
            if numbers:
                text += [f"*{entry['claim']}*: {entry['verdict']}", numbers]
    as_many_steps = numbers_table(against_peers(folder, "k3"))
    if as_many_steps:
        text += ["The first of these, after as many steps as one peer had (K = 3):", as_many_steps]
    longer = longer_tokens_table(folder)
    if longer:
        text += [
            "What longer tokens cost one head for all rates, beside its tokens of 20 ms:",
            longer,
        ]
    encoders = encoders_table(folder)
    if encoders:
        text += [
            "## Encoders that differ in their seed alone",
            "*encoder*: by the hash of its checkpoint; the first has seed 0. ± is over heads.",
            encoders,
        ]
    if any(folder.glob("any*/*-search-*.json")):
        text += [
            "## λ found on the curve of one head",
            "*price*: what is added to the loss or the metric, times tokens per frame.",
            search_table(folder),
            "A search chooses on the validation split. How alike the mean curves of the heads are "
            "there and on test, over the forty rates and over the shorter ones; *span*: from the "
            "best to the worst of these rates, in points.",
            splits_table(folder),
        ]
    if any(learned_settings(points, task) for task in TASKS):
        text += [
            "## The learned λ",
            "*price*: what is added to the loss, times tokens per frame. *better by*: where both "
            "learned for as many epochs.",
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
            text += [f"### {name}", firing_table(read_measured(path, "firing.py")["rows"])]
    if (folder / "slopes").exists():
        text += [
            "## What autograd sees of the slope of λ",
            "Slopes of the loss of held-out speech, by one head for all rates of each task "
            "(extras/slopes.py): means over utterances, ± 1.96 standard errors.",
        ]
        for task, name in TASKS.items():
            path = folder / f"slopes/{task}.json"
            if path.exists():
                text += [f"### {name}", slopes_table(read_measured(path, "slopes.py")["rows"])]
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
    save_text(text + "\n", folder / "results.md")
    tradeoff_figure(points, folder, folder / "tradeoff.png")
    lambda_figure(points, folder / "lambda.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"results.py: {error}")
