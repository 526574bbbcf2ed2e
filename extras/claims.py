"""What may be claimed: comparisons with their intervals, and a verdict on each.

    results/MODEL/*.json           points (see points.py)
    results/benchmark-heads.json   what finding a rate takes, beside a grid of heads (benchmark.py)
    results/claims.json            a list of claims: each with its numbers, the command that makes
                                   the points, and a verdict

Differences and their 95 % intervals are those of differences.py.

    python -m extras.claims results
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from extras.differences import Difference, compare, compare_at, encoders_of
from extras.firing import table
from extras.points import (
    HEAD_COLUMNS,
    LONGER_PEER,
    METRIC_OF,
    PEERS,
    TASKS,
    Head,
    gain,
    load_heads,
    mean_and_sd,
    plus_minus,
    read_measured,
    score_at,
)
from parts.runs import read_point, save_text

WITHIN = 1.0  # points of the metric in which two models count as equally good


# 1. Claims.


def verdict_within(differences) -> str:
    """Whether ours is as good as theirs everywhere, to within a point."""
    if not differences:
        return "not measured"
    worse = [d for d in differences if d.better < -WITHIN]
    surely = [d for d in worse if d.high < 0]
    if surely:
        return "no"
    return "not shown" if worse else "yes"


def verdict_better(differences) -> str:
    """Whether ours is surely better everywhere."""
    if not differences:
        return "not measured"
    surely = [d for d in differences if d.low > 0]
    if not surely:
        return "no"
    return "yes" if surely == differences else "not everywhere"


def claim(text, command, differences, verdict) -> dict:
    """A claim that rests on differences, with those in which ours does worst, one for each task."""
    shown = []
    for task, metric in METRIC_OF.items():
        of_task = [d for d in differences if d.task == task]
        if of_task:
            d = min(of_task, key=lambda difference: difference.better)
            shown.append(f"{metric} {d} at {d.period:.0f} ms")
    numbers = [d._asdict() for d in differences]
    return {
        "claim": text,
        "command": command,
        "verdict": verdict,
        "encoders": sorted({d.encoders for d in differences}),
        "shown": "; ".join(shown),
        "numbers": numbers,
    }


def against_peers(folder, model="any") -> dict:
    """One encoder and one head for all rates against encoders and heads of one rate.

    model: the encoder, by the folder of its points.
    """
    # Heads of once-for-all for characters learn for longer. One peer has heads that do so, too.
    peers = {**PEERS, **LONGER_PEER} if model == "any" else PEERS
    differences = []
    for task in METRIC_OF:
        ours = load_heads(folder, model, task, "any")
        for peer, name in peers.items():
            theirs = load_heads(folder, peer, task)
            if ours and theirs:
                period = float(np.mean([head.periods[0] for head in theirs]))
                differences.append(compare(task, name, ours, theirs, period))
    return claim(
        "one encoder with one head is as good at six rates as a pair made for each",
        "make points-any points-peers",
        differences,
        verdict_within(differences),
    )


def only_at(head, lam) -> Head:
    """A head at one of its rates."""
    columns = [column[head.lams == lam] for column in head[1:-1]]
    return Head(head.encoder, *columns, head.epochs)


def against_own_heads(folder) -> dict:
    """One head for all rates against heads of their own, on the same encoders."""
    differences = []
    for task in METRIC_OF:
        ours = load_heads(folder, "any", task, "any")
        theirs = load_heads(folder, "ofa", task)
        encoders = {head.encoder for head in theirs}
        ours = [head for head in ours if head.encoder in encoders]
        if not ours:
            continue
        # At each λ, since the two kinds measure periods on other utterances.
        for lam in sorted({lam for head in theirs for lam in head.lams}):
            here = np.mean([np.interp(lam, head.lams, head.periods) for head in ours])
            own = [only_at(head, lam) for head in theirs if lam in head.lams]
            differences.append(compare(task, "a head of its own", ours, own, here))
    return claim(
        "one head serves every rate as well as a head made for it",
        "make points-any points-ofa",
        differences,
        verdict_within(differences),
    )


def against_regression(folder) -> dict:
    """Tokens that end where segments end against α by regression, after as many steps (k3)."""
    differences = []
    for task in METRIC_OF:
        ours = load_heads(folder, "segments", task, "any")
        theirs = load_heads(folder, "k3", task, "any")
        periods = (33, 50, 90, 180)
        differences += compare_at(periods, task, "regression", ours, theirs)
    return claim(
        "tokens of segments serve tasks as well as those of regression",
        "make points-segments",
        differences,
        verdict_within(differences),
    )


def against_rivals(folder) -> dict:
    """Pre-training with compression, for as many steps as the rivals' encoder had (k3), against
    frames that are merged without any training."""
    differences = []
    for task in METRIC_OF:
        ours = load_heads(folder, "k3", task, "any")
        for by, name in {"average": "averaged frames", "merge": "merged frames"}.items():
            theirs = load_heads(folder, "rivals", task, "any", by)
            differences += compare_at((50, 90), task, name, ours, theirs)
    return claim(
        "at 50 and 90 ms, compression in pre-training beats averaging or merging frames after it",
        "make points-segments points-rivals",
        differences,
        verdict_better(differences),
    )


def against_log_mels(folder) -> dict:
    """The encoder against log-mels, which have one rate, 20 ms."""
    differences = []
    for task in METRIC_OF:
        ours = load_heads(folder, "any", task, "any")
        theirs = load_heads(folder, "baselines", task, features="logmel")
        periods = (20, 33, 50, 90)
        differences += compare_at(periods, task, "log-mels", ours, theirs, 20)
    return claim(
        "up to 90 ms, the encoder is better than log-mels of 20 ms",
        "make points-any points-baselines",
        differences,
        verdict_better(differences),
    )


def lam_is_found(folder) -> dict:
    """λ found on the curve of a head for all rates."""
    return one_lam(
        folder,
        "λ found on one head's curve is as good as the best, sooner than by a grid of heads",
        "any*/{task}-search-metric-price0-*.json",
        "search",
        "make points-any times",
        within=math.inf,  # on a flat curve many rates are best
        starts=1,  # a search has none to choose
    )


def lam_is_learned(folder) -> dict:
    """λ learned beside a head, from several starts, with a slope by differences."""
    return one_lam(
        folder,
        "λ learned is one rate from three starts, as good as the best, each sooner than a grid",
        "learned-differences/{task}-differences-price0-*.json",
        "differences",
        "make points-any points-learned times",
        within=0.1,
        starts=3,
    )


def one_lam(folder, text, pattern, way, command, within, starts) -> dict:
    """Runs that each end with one λ: do they agree, is it good, is it cheap?

    pattern: of the files of these runs, where {task} stands for the task; way: how λ was found;
    within: the share of the median frame period by which a run may be off it; starts: from how many
    λ a task's runs must have started to be counted.
    """
    # Points were computed on several machines, so times are those of one run of the benchmark.
    times = folder / "benchmark-heads.json"
    timed = read_measured(times, "benchmark.py", "heads")["heads"] if times.exists() else []
    of_grid = {row["task"]: row["of_grid"][way] for row in timed}
    numbers = []
    for task in METRIC_OF:
        chosen = []
        for path in sorted(folder.glob(pattern.format(task=task))):
            chosen.append(read_point(path))
        best = compare_with_best(folder, task, chosen)
        if not best or len({point["config"].get("start") for point in chosen}) < starts:
            continue
        encoders = [point["config"]["checkpoint_sha1"] for point in chosen]
        periods = np.array([point["frame_period_ms"] for point in chosen])
        middle = float(np.median(periods))
        period, apart_by = mean_and_sd(periods, encoders)
        numbers.append(
            {
                "task": task,
                "encoders": len(set(encoders)),
                "heads": len(chosen),
                "period_ms": float(period),
                "sd_ms": None if np.isnan(apart_by) else float(apart_by),
                "apart": float(np.max(np.abs(periods / middle - 1))),
                "best": best._asdict(),
                "time_of_grid": of_grid.get(task),
            }
        )
    shown = "; ".join(
        f"{METRIC_OF[n['task']]} {Difference(**n['best'])} at "
        f"{plus_minus(n['period_ms'], n['sd_ms'] or math.nan, 0)} ms"
        + (f", {n['time_of_grid']:.1f} × the time" if n["time_of_grid"] else "")
        for n in numbers
    )
    verdict = "not measured"
    if numbers and all(n["time_of_grid"] for n in numbers):
        good = [
            n["apart"] <= within
            and verdict_within([Difference(**n["best"])]) == "yes"
            and n["time_of_grid"] < 1
            for n in numbers
        ]
        verdict = "yes" if all(good) else "not everywhere" if any(good) else "no"
    return {
        "claim": text,
        "command": command,
        "verdict": verdict,
        "encoders": sorted({n["encoders"] for n in numbers}),
        "shown": shown,
        "numbers": numbers,
    }


def compare_with_best(folder, task, chosen) -> Difference | None:
    """What the chosen λ reach, beside the best of forty rates: of heads for all rates, on the same
    encoders, where the mean of their curves on the test split is best. None without such heads.

    chosen: a point for each λ.
    """
    ours = []
    for point in chosen:
        columns = [np.array([point[name]]) for name in HEAD_COLUMNS]
        ours.append(Head(point["config"]["checkpoint_sha1"], *columns, point["epochs"]))
    encoders = encoders_of(ours)
    heads = [head for head in load_heads(folder, "any", task, "any") if head.encoder in encoders]
    if not heads:
        return None
    periods = heads[0].periods
    mean, _ = mean_and_sd(score_at(heads, periods), [head.encoder for head in heads])
    best = np.argmax(gain(task, mean, 0))
    return compare(task, "the best of forty rates", ours, heads, periods[best])


def tokens_end_with_sounds(folder) -> dict:
    """How well the tokens of segments agree with pseudo-boundaries, near λ = 1."""
    path = folder / "firing/segments.json"
    numbers = []
    if path.exists():
        rows = read_measured(path, "firing.py")["rows"]
        numbers = [row for row in rows if row["lam"] in (0.95, 1.0)]
    scores = {(row["lam"], row["what"]): row["r_value"] for row in numbers}
    shown = "; ".join(
        f"R {scores[lam, 'tokens']:.2f} at λ = {lam:g}, equal spacing "
        f"{scores[lam, 'equal spacing']:.2f}"
        for lam in sorted({lam for lam, _ in scores})
    )
    verdict = "not measured"
    if numbers:
        reached = all(score >= 0.75 for (_, what), score in scores.items() if what == "tokens")
        verdict = "yes" if reached else "no"
    return {
        "claim": "near λ = 1, tokens of segments end at pseudo-boundaries (R-value ≥ 0.75)",
        "command": "make results",
        "verdict": verdict,
        "encoders": [1] if numbers else [],
        "shown": shown,
        "numbers": numbers,
    }


def all_claims(folder) -> list[dict]:
    makers = (
        against_peers,
        against_own_heads,
        lam_is_found,
        lam_is_learned,
        tokens_end_with_sounds,
        against_regression,
        against_rivals,
        against_log_mels,
    )
    return [make(folder) for make in makers]


# 2. The page.


def claims_table(claims) -> str:
    """A row for each claim that was measured: its verdict, on how many encoders it rests, and the
    numbers that say most."""
    rows = []
    for entry in claims:
        if not entry["numbers"]:
            continue
        fewest, most = min(entry["encoders"]), max(entry["encoders"])
        encoders = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        rows.append([entry["claim"], entry["verdict"], encoders, entry["shown"]])
    return table(["claim", "holds here?", "encoders", "at worst"], rows)


def numbers_table(entry) -> str:
    """Every comparison of a claim: a row for each rate and rival, a column for each task.

    A claim that does not rest on comparisons has no such table.
    """
    if not entry["numbers"] or "beside" not in entry["numbers"][0]:
        return ""
    # Tasks have other utterances, so that the same rate may differ by some ms.
    rows = []  # of (rival, {task: difference})
    for number in entry["numbers"]:
        d = Difference(**number)
        for beside, found in rows:
            alike = all(abs(other.period / d.period - 1) < 0.1 for other in found.values())
            if beside == d.beside and d.task not in found and alike:
                found[d.task] = d
                break
        else:
            rows.append((d.beside, {d.task: d}))
    lines = []
    for beside, found in rows:
        periods = sorted({round(d.period) for d in found.values()})
        at = " to ".join(str(period) for period in sorted({periods[0], periods[-1]}))
        lines.append([beside, f"{at} ms", *(str(found.get(task, "")) for task in TASKS)])
    return table(["beside", "at", *(f"{TASKS[t]}, {METRIC_OF[t]}" for t in TASKS)], lines)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.claims",
        description="Make claims.json, and print it as tables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", default="results", help="where the points are")
    folder = Path(parser.parse_args().folder)
    if not any(folder.glob("*/*.json")):
        raise ValueError(f"no points under {folder}: `make sweep RESULTS={folder}` computes them")
    claims = all_claims(folder)
    text = json.dumps(claims, indent=1, ensure_ascii=False)
    save_text(text + "\n", folder / "claims.json")
    print(claims_table(claims))
    for entry in claims:
        if numbers_table(entry):
            print(f"\n{entry['claim']}: {entry['verdict']}\n\n{numbers_table(entry)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"claims.py: {error}")
