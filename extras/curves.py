"""The figures of results/: the trade-off between a task's metric and the rate, and the learned λ.

    tradeoff.png   the metric over frame period and over cost, for CTC, seq2seq and pooling; where
                   a task has heads for all rates, with such other points only as were trained by
                   the same rule (those with a bootstrap)
    lambda.png     λ over epochs, from each starting point, if it was learned

results.py draws them.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from extras.points import (
    BASELINES,
    ENCODERS,
    LEARNED,
    METRIC_OF,
    PEERS,
    TASKS,
    Setting,
    Summary,
    learned_settings,
    load_heads,
    mean_and_sd,
    select,
)
from parts.figures import COLOURS, STYLE

# 1. The trade-off.


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
    labels = ("log-mel at 20 ms, same head", "untrained encoder, λ = 0", "deaf head (no input)")
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
        mean, sd = mean_and_sd(tests, [head.encoder for head in heads])
        xs = periods if x == "period" else heads[0].gflops
        axis.plot(xs, mean, style, color=colour, linewidth=2.5, label=label)
        if len(heads) > 1:
            axis.fill_between(xs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


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
            if summary.heads > 1:
                axis.errorbar(at, summary.test, summary.sd, color=black)


def draw_learned(axis, points, task, x):
    """A star for each run in which λ was learned, since it ends elsewhere with each seed; an open
    one, if by autograd."""
    stars = {}  # {slope: a Summary of each run}
    for setting in learned_settings(points, task):
        if setting.price == 0:
            slope, _ = LEARNED[setting.model]
            stars.setdefault(slope, []).extend(Summary([point]) for point in points[setting])
    for slope, runs in stars.items():
        axis.plot(
            [getattr(run, x) for run in runs],
            [run.test for run in runs],
            "*",
            markersize=11,
            color=COLOURS["learned"],
            markerfacecolor="white" if slope == "autograd" else COLOURS["learned"],
            label=f"λ learned by {slope}, each run",
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


# 2. λ while it is learned.


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
        add_legend(figure, axes, ncols=len(tasks))  # as wide as the panels are
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
            # Not every epoch ends with validation.
            measured = [k for k, epoch in enumerate(search, 1) if "valid" in epoch]
            valid = [search[k - 1]["valid"] for k in measured]
            below.plot(measured, valid, style, marker=".", color=colour)
    above.plot([], [], "*", markersize=12, color="black", label="the λ that was learned")
    above.set(title=TASKS[task], ylabel="λ", ylim=(0, None))
    # A head that repeats itself has a WER of several hundred: such lines leave the figure.
    below.set(title=better_is(task), ylabel=f"validation {METRIC_OF[task]} (%)", ylim=(0, 105))
    searches = [point["search"] for setting in settings for point in points[setting]]
    highest = max(epoch.get("valid", 0) for search in searches for epoch in search)
    below.set(xlabel="epochs" if highest <= 105 else "epochs (values over 105 % are cut off)")


def add_legend(figure, axes, ncols):
    """One legend below all panels, with each label once. axes: an array of one or two rows."""
    labelled = {}
    for axis in np.atleast_2d(axes)[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=ncols)
