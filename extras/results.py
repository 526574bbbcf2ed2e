"""What was found: tables and figures, made from the points that finetune.py and adaptive_lambda.py leave.

    results/MODEL/*.json   a point each: one task, λ and seed (`make sweep` computes them anew)
    results/pretraining/   the tables that pretrain.py printed about the encoders
    results/results.md     tables: the trade-off, once-for-all against its peers, the learned λ, where tokens fire
    results/tradeoff.png   the metric over frame period and over cost, for CTC, seq2seq and pooling
    results/lambda.png     λ over epochs, from each starting point

Every number is a mean over seeds of the head, ± its standard deviation; each encoder was pre-trained once. Between the λ of
the grid, the curve is read by linear interpolation in the frame period.

`python results.py` makes them anew.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from extras.firing import TOLERANCE_MS, firing_table, table
from parts.figures import COLOURS, STYLE
from parts.runs import differing, read_point

PLAIN = "defaults"  # how λ was learned
VARIANTS = {
    PLAIN: "-",
    "jitter 0.15": "--",
    "missing tokens hidden": ":",
}  # those drawn, and their lines
METRIC_OF = {"ctc": "CER", "seq2seq": "WER", "pool": "mAP"}
TASKS = {
    "ctc": "characters (CTC)",
    "seq2seq": "translation (seq2seq)",
    "pool": "concepts (pooling)",
}
PEERS = {
    "none": "no compression",
    "average2": "average of 2",
    "average4": "average of 4",
    "lam0.51": "CIF at λ = 0.51",
    "lam0.78": "CIF at λ = 0.78",
    "lam1.04": "CIF at λ = 1.04",
}
LEGEND = """± is the standard deviation over seeds of the head. *ms / token*: mean frame period of all utterances. *GFLOPs / s*: of positions and Transformer, per
second of speech; attention's part grows with the length of utterances, so tasks differ. *too short*: test utterances with fewer tokens than CTC needs.
*untrained encoder*: the same network with random weights. *deaf*: a head that hears nothing. CER and WER: lower is better; mAP: higher is better."""


def load_points(folder):
    """All points under results/: {(model, task, features, λ, or start of a learned one, how it was learned): its points, one a seed}."""
    points = {}
    for path in sorted(set(folder.glob("*/*.json")) - set(folder.glob("pretraining/*.json"))):
        point = read_point(path)
        config = point["config"]
        how = [f"{name} {config[name]:g}" for name in ("jitter", "price") if config.get(name)]
        how = (
            ", ".join(how + ["missing tokens hidden"] * config.get("hide_missing", False)) or PLAIN
        )
        key = (
            path.parent.name,
            config["task"],
            config["features"],
            config.get("lam", config.get("start")),
            how,
        )
        points.setdefault(key, []).append(point)
        differ = set(differing(config, points[key][0]["config"])) - {"seed"}
        if differ:
            raise ValueError(
                f"{path} is of another configuration than the points with other seeds beside it ({', '.join(differ)} differ)"
            )
    if not points:
        raise ValueError(f"no points under {folder}: compute them with `make sweep`")
    return points


class Summary:
    """Means over the seeds of some points, and the standard deviation of the metric."""

    def __init__(self, points):
        mean = lambda name: float(np.mean([p[name] for p in points]))
        tests = [p["test"] for p in points]
        self.test, self.sd, self.n = (
            float(np.mean(tests)),
            float(np.std(tests, ddof=1)) if len(tests) > 1 else float("nan"),
            len(tests),
        )
        self.valid = mean("valid")
        self.period, self.gflops, self.epochs = (
            mean("frame_period_ms"),
            mean("transformer_gflops_per_s"),
            mean("epochs"),
        )
        self.minutes = (
            min(p["train_s"] for p in points) / 60
        )  # whatever else the machine does can only add to it
        self.infeasible = 100 * mean("infeasible_test") / mean("test_utterances")

    def __str__(self):
        return f"{self.test:.1f} ± {self.sd:.1f}" if self.n > 1 else f"{self.test:.1f}"


def select(points, model, task, features="encoder"):
    """{λ or start: Summary}, in order."""
    return {
        key[3]: Summary(p)
        for key, p in sorted(points.items(), key=lambda item: item[0][3])
        if key[:3] == (model, task, features) and key[4] == PLAIN
    }


def tradeoff_table(points, task):
    rows = []

    def add(name, lam, s):
        rows.append(
            [
                name,
                lam,
                f"{s.period:.1f}" if s.gflops else "",
                f"{s.gflops:.3f}" if s.gflops else "",
                s,
                s.n,
                f"{s.epochs:.0f}",
                f"{s.infeasible:.0f} %" if task == "ctc" else "",
            ]
        )

    for lam, s in select(points, "ofa", task).items():
        add("once-for-all", lam, s)
    for lam, s in select(points, "slots", task).items():
        add("once-for-all, 3 symbols a token", lam, s)
    for peer, name in PEERS.items():
        for s in select(points, peer, task).values():
            add(name, "", s)
    for features in ("logmel", "random", "deaf"):
        for lam, s in select(points, "baselines", task, features).items():
            add(
                {"logmel": "log-mel", "random": "untrained encoder", "deaf": "deaf"}[features],
                lam if features == "random" else "",
                s,
            )
    return table(
        [
            "model",
            "λ",
            "ms / token",
            "GFLOPs / s",
            f"{METRIC_OF[task]} %",
            "seeds",
            "epochs",
            "too short",
        ],
        rows,
    )


def peers_table(points):
    """Once-for-all minus each peer at the peer's frame period; positive where once-for-all is better."""
    rows = []
    for peer, name in PEERS.items():
        row = [name]
        for task in TASKS:
            curve = [s for s in select(points, "ofa", task).values() if s.n > 1]
            other = next((s for s in select(points, peer, task).values() if s.n > 1), None)
            periods = [s.period for s in curve]
            if (
                not curve or not other or not periods[0] - 1 < other.period < periods[-1] + 1
            ):  # outside of the curve
                row.append("")
                continue
            ours = np.interp(other.period, periods, [s.test for s in curve])
            sd = np.hypot(np.interp(other.period, periods, [s.sd for s in curve]), other.sd)
            row.append(f"{(ours - other.test) * (1 if task == 'pool' else -1):+.1f} ± {sd:.1f}")
            row[0] = f"{name}, {other.period:.0f} ms"
        rows.append(row)
    return table(["peer", *TASKS.values()], rows)


def learned_table(points):
    rows = []
    for task, name in TASKS.items():
        grid = select(points, "ofa", task)
        sign = 1 if task == "pool" else -1
        if not grid:
            continue
        best = max(
            grid, key=lambda lam: sign * grid[lam].valid
        )  # as one would choose: test is not for choosing
        minutes = sum(s.minutes for s in grid.values())
        for (model, of, _, start, how), runs in sorted(
            points.items(), key=lambda item: (item[0][4], item[0][3])
        ):
            if (model, of) == ("adaptive", task):
                s, lams = Summary(runs), [p["lam"] for p in runs]
                lam = f"{np.mean(lams):.2f}" + (
                    f" ± {np.std(lams, ddof=1):.2f}" if len(lams) > 1 else ""
                )
                rows.append(
                    [
                        name,
                        start,
                        how,
                        s.n,
                        lam,
                        f"{s.period:.0f}",
                        s,
                        f"{grid[best]} at {best:g}",
                        f"{sign * (s.test - grid[best].test):+.1f}",
                        f"{s.minutes:.1f}",
                        f"{minutes:.1f}",
                    ]
                )
    return table(
        [
            "task",
            "λ starts at",
            "with",
            "seeds",
            "λ learned",
            "ms / token",
            "metric %",
            "best of the grid (by validation)",
            "better by",
            "minutes, fastest seed",
            "minutes of the grid",
        ],
        rows,
    )


def read_rows(path, script):
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no table of {script}, or it is damaged: make it anew with `make results` or `make sweep`"
        ) from None


def pretraining_table(folder):
    rows = []
    for model, name in {"ofa": "once-for-all", **PEERS}.items():
        for row in (
            read_rows(folder / f"{model}.json", "pretrain.py")
            if (folder / f"{model}.json").exists()
            else ()
        ):
            rows.append(
                [
                    name,
                    f"{row['lam']:.2f}",
                    f"{row['period_ms']:.1f}",
                    f"{row['closed_form_ms']:.1f}",
                    f"{np.mean(row['distillation']):.3f}",
                ]
            )
    return table(["model", "λ", "ms / token", "closed form", "distillation loss"], rows)


def tradeoff_figure(points, path):
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(TASKS), figsize=(14, 8), layout="constrained", sharey="col"
        )
        for (task, name), column in zip(TASKS.items(), axes.T):
            for axis, x in zip(column, ("period", "gflops")):
                curve = list(select(points, "ofa", task).values())
                xs, ys, sds = (np.array([getattr(s, k) for s in curve]) for k in (x, "test", "sd"))
                axis.plot(xs, ys, "o-", color=COLOURS["ofa"], label="once-for-all, one encoder")
                axis.fill_between(
                    xs, ys - sds, ys + sds, color=COLOURS["ofa"], alpha=0.2, linewidth=0
                )
                for k, peer in enumerate(PEERS):
                    for s in select(points, peer, task).values():
                        marker = "P" if peer.startswith("average") else "X"
                        axis.errorbar(
                            getattr(s, x),
                            s.test,
                            s.sd,
                            fmt=marker,
                            ms=8,
                            color=COLOURS["peer"],
                            capsize=3,
                            label={
                                "none": "no compression, or CIF at one λ",
                                "average2": "average of 2, of 4",
                            }.get(peer),
                        )
                stars = [
                    Summary([p])
                    for key, runs in points.items()
                    if key[:2] == ("adaptive", task) and key[4] == PLAIN
                    for p in runs
                ]
                axis.plot(
                    [getattr(s, x) for s in stars],
                    [s.test for s in stars],
                    "*",
                    ms=10,
                    color=COLOURS["learned"],
                    label="λ learned, a run each",
                    zorder=5,
                )
                for features, label in (
                    ("logmel", "log-mel, same head"),
                    ("random", "untrained encoder, λ = 0"),
                    ("deaf", "deaf"),
                ):
                    for s in list(select(points, "baselines", task, features).values())[:1]:
                        axis.axhline(s.test, color=COLOURS[features], linestyle="--", label=label)
                axis.set(
                    ylabel=f"test {METRIC_OF[task]} (%)"
                    + (", higher is better" if task == "pool" else ", lower is better"),
                    title=name,
                )
            column[0].set(
                xscale="log",
                xlabel="frame period (ms per token)",
                xticks=[20, 33, 50, 90, 180],
                xticklabels=[20, 33, 50, 90, 180],
            )
            column[0].minorticks_off()
            column[1].set(xlabel="Transformer GFLOPs per second of speech")
        labelled = {
            label: handle
            for axis in axes[0]
            for handle, label in zip(*axis.get_legend_handles_labels())
        }
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
        figure.savefig(path)
        plt.close(figure)


def lambda_figure(points, path):
    tasks = [
        task
        for task in TASKS
        if any(k[:2] == ("adaptive", task) and k[4] in VARIANTS for k in points)
    ]
    if not tasks:
        return
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2,
            len(tasks),
            figsize=(2 + 4.5 * len(tasks), 8),
            layout="constrained",
            sharex="col",
            squeeze=False,
        )
        for task, column in zip(tasks, axes.T):
            runs = {
                k: p for k, p in points.items() if k[:2] == ("adaptive", task) and k[4] in VARIANTS
            }
            starts = sorted({k[3] for k in runs})
            for (*_, start, how), seeds in sorted(runs.items(), key=lambda item: item[0][3:]):
                style = {
                    "color": COLOURS["starts"][starts.index(start) % len(COLOURS["starts"])],
                    "linestyle": VARIANTS[how],
                }
                for p in seeds:
                    epochs = range(len(p["search"]) + 1)
                    label = f"from λ = {start:g}" + f", {how}" * (how != PLAIN)
                    column[0].plot(
                        epochs,
                        [start, *(h["lam"] for h in p["search"])],
                        label=label if p is seeds[0] else None,
                        **style,
                    )
                    column[0].plot(epochs[-1], p["lam"], "*", ms=12, color=style["color"])
                    column[1].plot(epochs[1:], [h["valid"] for h in p["search"]], **style)
            column[0].set(title=TASKS[task], ylabel="λ", ylim=(0, None))
            column[1].set(
                xlabel="epochs", ylabel=f"validation {METRIC_OF[task]} (%)", ylim=(0, 105)
            )
        labelled = {
            label: handle
            for axis in axes[0]
            for handle, label in zip(*axis.get_legend_handles_labels())
        }
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center", ncols=len(tasks)
        )
        figure.savefig(path)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description="Make the tables and figures of results/ anew.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default="results",
        help="where the points are, and the tables and figures go",
    )
    folder = Path(parser.parse_args().folder)
    points = load_points(folder)
    machines = sorted({(p["machine"], p["date"]) for seeds in points.values() for p in seeds})
    text = [
        "# What was found",
        "Made by `python results.py` from the points beside it; computed on "
        + "; ".join(f"{m} ({d})" for m, d in machines)
        + ".",
    ]
    text += [LEGEND]
    for task, name in TASKS.items():
        text += [f"## {name[0].upper()}{name[1:]}", tradeoff_table(points, task)]
    text += [
        "## Once-for-all against its peers",
        "How much better (+) or worse (−) once-for-all is than the peer, at the peer's frame period, in points of the metric.",
        peers_table(points),
        "## The learned λ",
        learned_table(points),
    ]
    if (folder / "pretraining").exists():
        text += [
            "## Pre-training",
            "What pretrain.py printed about each encoder, on the test split.",
            pretraining_table(folder / "pretraining"),
        ]
    if (folder / "firing.json").exists():
        text += [
            "## Where tokens fire",
            f"Agreement with pseudo-boundaries on held-out speech, ± {TOLERANCE_MS} ms (firing.py).",
            firing_table(read_rows(folder / "firing.json", "firing.py")),
        ]
    (folder / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    tradeoff_figure(points, folder / "tradeoff.png")
    lambda_figure(points, folder / "lambda.png")
    print("\n\n".join(text))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"results.py: {error}")
