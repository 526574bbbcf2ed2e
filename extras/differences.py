"""Whether one model is better than another: differences of their scores, with intervals.

A difference between two models owes something to the seeds of pre-training, something to the
seeds of the heads, and something to the utterances that happen to be in the test split. With the
variances of these three the 95 % interval is

    difference ± t · √(v_utterances + v_ours + v_theirs)

v_utterances: of the difference over 200 resampled test splits (scores.bootstrap), which are the
same for both models. v_ours, v_theirs: the variance between the encoders of one side, each with
the mean of its heads, over their number; where a side has one encoder, between its heads; where it
has one head, nothing is known, and it is left out. (Two sides that have the same encoders, and
several, are compared encoder by encoder.) t is the quantile of Student's distribution, since two
or three encoders say little about how much encoders vary. Its degrees of freedom are

    (v_utterances + v_ours + v_theirs)² / (v_ours² / (n_ours − 1) + v_theirs² / (n_theirs − 1)),

so that t is 4.3 where all depends on one side's three encoders, 2.8 where it depends on three each,
and 1.96 where it depends on the utterances. Where the interval holds 0, no difference has been
shown.

A curve is read between two of its rates by linear interpolation in the frame period.

Source of the degrees of freedom of t: Welch, "The generalization of Student's problem when several
different population variances are involved", Biometrika 1947.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from extras.points import draws_at, gain, score_at

# The 97.5 % quantile of Student's t, by degrees of freedom. Between these it is nearly a straight
# line over 1 / degrees.
T_QUANTILES = {1: 12.706, 1.25: 8.028, 1.5: 6.017, 1.75: 4.949, 2: 4.303, 3: 3.182, 4: 2.776}
T_QUANTILES |= {6: 2.447, 10: 2.228, math.inf: 1.960}


def of_encoders(heads, period) -> tuple[np.ndarray, np.ndarray]:
    """What varies on one side at a period: n scores (n,) and, on resampled test splits, (n, 200).

    They are of each encoder, the means of its heads; or of each head, where all are on one encoder.
    """
    tests = score_at(heads, period)
    draws = draws_at(heads, period)
    rows = defaultdict(list)  # {encoder: the numbers of its heads}
    for k, head in enumerate(heads):
        rows[head.encoder].append(k)
    if len(rows) == 1:
        return tests, draws
    in_order = [rows[encoder] for encoder in sorted(rows)]
    tests = [tests[of_one].mean() for of_one in in_order]
    return np.array(tests), np.array([draws[of_one].mean(0) for of_one in in_order])


def half_width(utterances, sides) -> float:
    """Half of the 95 % interval of a difference.

    utterances (200,): the difference on resampled test splits. sides: for each side that varies
    with seeds, its scores (n,).
    """
    of_seeds = [np.var(scores, ddof=1) / len(scores) for scores in sides]
    total = np.var(utterances, ddof=1) + sum(of_seeds)
    # Welch's degrees of freedom: few if most of the variance is between few seeds.
    unsure = sum(v**2 / (len(scores) - 1) for v, scores in zip(of_seeds, sides))
    inverse = unsure / total**2 if total > 0 else 0.0
    known = [1 / degrees for degrees in T_QUANTILES]
    t = np.interp(inverse, known[::-1], list(T_QUANTILES.values())[::-1])
    return float(t * total**0.5)


class Difference(NamedTuple):
    """How much better ours is than theirs, in points of the metric, with a 95 % interval."""

    task: str
    beside: str  # what theirs is
    period: float  # ms
    ours: float
    theirs: float
    better: float
    low: float
    high: float
    encoders: int  # of ours and theirs, the smaller number
    heads: int

    def __str__(self):
        return f"{self.better:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def encoders_of(heads) -> set[str]:
    """The encoders that they are on; none, if their features need none."""
    return {head.encoder for head in heads if head.encoder}


def compare(task, beside, ours, theirs, period, their_period=None) -> Difference:
    """ours, theirs: heads; their_period: if it is not the same."""
    our_encoders, their_encoders = encoders_of(ours), encoders_of(theirs)
    our_tests, our_draws = of_encoders(ours, period)
    their_tests, their_draws = of_encoders(theirs, their_period or period)
    better = gain(task, our_tests.mean(), their_tests.mean())
    sides = [our_tests, their_tests]
    if our_encoders == their_encoders and len(our_encoders) > 1:
        sides = [our_tests - their_tests]
    sides = [scores for scores in sides if len(scores) > 1]
    half = half_width(our_draws.mean(0) - their_draws.mean(0), sides)
    return Difference(
        task,
        beside,
        round(float(period), 2),
        float(our_tests.mean()),
        float(their_tests.mean()),
        float(better),
        float(better - half),
        float(better + half),
        min(len(encoders) for encoders in (our_encoders, their_encoders) if encoders),
        min(len(ours), len(theirs)),
    )


def compare_at(periods, task, beside, ours, theirs, their_period=None):
    """`compare` at each of the periods; nothing, where one of the two has not been measured."""
    if not ours or not theirs:
        return []
    return [compare(task, beside, ours, theirs, ms, their_period) for ms in periods]
