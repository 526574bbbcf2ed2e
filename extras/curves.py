"""The figures of results/: the trade-off between a task's metric and the rate, and the learned λ.

    tradeoff.png   the metric over frame period and over cost, for CTC, seq2seq and pooling
    lambda.png     λ over epochs, from each starting point, if it was learned

results.py draws them.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from extras.points import (
    BASELINES,
    LEARNED,
    METRIC_OF,
    PEERS,
    TASKS,
    Summary,
    learned_settings,
    load_heads,
    mean_and_sd,
    score_at,
    select,
)
from parts.figures import COLOURS, STYLE
from parts.runs import HIGHER_IS_BETTER

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

    # As high as characters need, so that a point of the metric looks alike in all tasks.
    low, high = axis.get_ylim()
    room = max(0, 70 - (high - low)) / 2
    axis.set(ylim=(low - room, high + room), ylabel=f"test {METRIC_OF[task]} (%)")

    axis.set(title=f"{TASKS[task]}, {better_is(task)}")
    if x == "period":
        axis.set(xlabel="frame period in ms per token (cheaper →)", xscale="log")
        axis.set(xticks=[20, 33, 50, 90, 180], xticklabels=[20, 33, 50, 90, 180])
        axis.minorticks_off()
    else:
        axis.set(title="", xlabel="Transformer GFLOPs per second\nof speech (cheaper →)")
        axis.xaxis.set_inverted(True)


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
        mean, sd = mean_and_sd(score_at(heads, periods), [head.encoder for head in heads])
        xs = periods if x == "period" else heads[0].gflops
        axis.plot(xs, mean, style, color=colour, linewidth=2.5, label=label)
        if len(heads) > 1:
            axis.fill_between(xs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def draw_own(axis, points, task, x):
    """Heads of their own at single rates, on the once-for-all encoder."""
    curve = list(select(points, "ofa", task).values())
    if not curve:
        return
    xs = [getattr(summary, x) for summary in curve]
    tests = [summary.test for summary in curve]
    sds = [summary.sd for summary in curve]
    green = COLOURS["ofa"]
    label = "once-for-all, a head for each rate"
    axis.plot(xs, tests, "o-", color=green, linewidth=1.2, label=label)
    axis.errorbar(xs, tests, sds, fmt="none", color=green)


def draw_peers(axis, points, task, x):
    """A mark for each peer, with a bar of a standard deviation."""
    black = COLOURS["peer"]
    for peer in PEERS:
        marker, label = peer_mark(peer)
        for summary in select(points, peer, task).values():
            at = getattr(summary, x)
            axis.plot(at, summary.test, marker, markersize=8, color=black, label=label, zorder=6)
            if summary.heads > 1:
                axis.errorbar(at, summary.test, summary.sd, color=black)


def draw_learned(axis, points, task, x):
    """A star for each run in which λ was learned by differences, since it ends elsewhere with each
    seed. (lambda.png has autograd's, too.)"""
    runs = []
    for setting in learned_settings(points, task):
        if setting.model == "learned-differences" and setting.price == 0:
            runs += [Summary([point]) for point in points[setting]]
    if runs:
        axis.plot(
            [getattr(run, x) for run in runs],
            [run.test for run in runs],
            "*",
            markersize=11,
            color=COLOURS["learned"],
            label="λ learned by differences, each run",
            zorder=5,
        )


def better_is(task) -> str:
    """Which way the task's metric is better."""
    metric = METRIC_OF[task]
    return f"{metric}: {'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better"


def peer_mark(peer) -> tuple[str, str]:
    """Marker and label of a peer."""
    if peer == "none":
        return "s", "no compression"
    if peer.startswith("average"):
        return {"average2": "^", "average4": "v"}[peer], PEERS[peer]
    return "X", "CIF trained at one λ"


# 2. λ while it is learned.


def lambda_figure(points, path):
    """λ over the epochs in which it is learned, without a price, a panel for each task."""
    tasks = []
    for task in TASKS:
        if any(setting.price == 0 for setting in learned_settings(points, task)):
            tasks.append(task)
    if not tasks:
        return
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(tasks), figsize=(1 + 4.2 * len(tasks), 4.5), layout="constrained", squeeze=False
        )
        for task, axis in zip(tasks, axes[0]):
            draw_search(axis, points, task)
        add_legend(figure, axes, ncols=len(tasks))  # as wide as the panels are
        figure.savefig(path)
        plt.close(figure)


def draw_search(axis, points, task):
    """One task's λ: a line for each run, and a star where it ends."""
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
            axis.plot(epochs, lams, style, color=colour, label=label)
            axis.plot(epochs[-1], point["lam"], "*", markersize=12, color=colour)
    axis.plot([], [], "*", markersize=12, color="black", label="the λ that was learned")
    axis.set(title=TASKS[task], xlabel="epochs", ylabel="λ", ylim=(0, None))


def add_legend(figure, axes, ncols):
    """One legend below all panels, with each label once. axes: an array of one or two rows."""
    labelled = {}
    for axis in np.atleast_2d(axes)[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=ncols)
