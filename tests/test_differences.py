"""differences.py on heads made here, whose intervals can be worked out by hand, or simulated."""

import numpy as np
import pytest

from extras.differences import T_QUANTILES, compare, half_width
from extras.points import Head


def head(encoder="a", test=50.0, spread=1.0):
    """A head at one rate."""
    draws = test + spread * np.random.default_rng(1).standard_normal((1, 200))
    return Head(encoder, *np.array([[0.0], [20.0], [1.0], [test], [test]]), draws, epochs=1)


def test_the_same_draws_cancel():
    """Two heads that err on the same utterances: the difference is certain, though each is not."""
    found = compare("pool", "x", [head(test=52.0)], [head(test=50.0)], 20)
    assert found.better == pytest.approx(2.0)
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0)
    assert str(found) == "+2.0 (+2.0 to +2.0)"


def test_an_encoder_counts_once_however_many_heads_it_has():
    ours = [head("a", 40.0, 0.0)] * 3 + [head("b", 50.0, 0.0)]
    found = compare("pool", "x", ours, [head(None, 45.0, 0.0)], 20)
    assert found.ours == 45.0 and found.better == pytest.approx(0)
    assert found.encoders == 2  # features such as log-mels need none
    assert found.heads == 1


def test_lower_error_rates_are_better():
    found = compare("ctc", "x", [head(test=30.0)], [head(test=33.0)], 20)
    assert found.better == pytest.approx(3.0)


def test_the_interval_has_what_encoders_and_heads_differ_by():
    """Without any scatter over utterances: three encoders at 49, 50, 51 against a fixed 50. The
    standard error of their mean is 1 / √3, and t of two degrees of freedom is 4.303."""
    ours = [head(name, test, 0.0) for name, test in zip("abc", (49.0, 50.0, 51.0))]
    found = compare("pool", "x", ours, [head("d", 50.0, 0.0)], 20)
    assert (found.low, found.better, found.high) == pytest.approx((-2.484, 0, 2.484), abs=1e-3)
    assert found.encoders == 1
    # Heads of one encoder vary as well.
    same = [head("a", test, 0.0) for test in (49.0, 50.0, 51.0)]
    found = compare("pool", "x", same, [head("d", 50.0, 0.0)], 20)
    assert (found.low, found.high) == pytest.approx((-2.484, 2.484), abs=1e-3)


def test_the_interval_has_what_utterances_differ_by():
    """Heads that err on other utterances: the variance of the difference is that of both."""
    ours = head(test=50.0)
    theirs = ours._replace(draws=ours.draws[:, ::-1])
    found = compare("pool", "x", [ours], [theirs], 20)
    half = 1.96 * np.std(ours.draws - theirs.draws, ddof=1)
    assert (found.low, found.high) == pytest.approx((-half, half))


def test_quantiles_of_t_are_those_of_the_distribution():
    """Between those of the table, too; against 400,000 draws of numpy's."""
    for n in (2, 3, 4, 6, 8, 12, 50):
        sides = [np.resize([1.0, -1.0], n)]
        t = half_width(np.zeros(200), sides) / (np.var(sides[0], ddof=1) / n) ** 0.5
        drawn = np.random.default_rng(0).standard_t(n - 1, 400_000)
        assert np.mean(np.abs(drawn) < t) == pytest.approx(0.95, abs=0.002)
    assert list(T_QUANTILES) == sorted(T_QUANTILES)
    for degrees in (1.1, 1.5, 1.6, 2.5):  # two sides of which one counts for nearly all
        drawn = np.random.default_rng(0).standard_t(degrees, 400_000)
        known = [1 / known for known in T_QUANTILES]
        t = np.interp(1 / degrees, known[::-1], list(T_QUANTILES.values())[::-1])
        assert 0.949 < np.mean(np.abs(drawn) < t) < 0.956


@pytest.mark.parametrize("ours, theirs", [(3, 3), (3, 1), (5, 2), (2, 2)])
@pytest.mark.parametrize("scatter", [0.0, 0.7])
def test_95_of_100_intervals_hold_the_truth(ours, theirs, scatter):
    """Or more: of two alike models, so many encoders each; a fixed one has no seed. scatter: of the
    difference over test splits."""
    random = np.random.default_rng(0)
    hold = []
    for _ in range(1000):
        sides = [random.standard_normal(n) for n in (ours, theirs) if n > 1]
        truth = scatter * random.standard_normal()
        apart = sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0) + truth
        half = half_width(scatter * random.standard_normal(200), sides)
        hold.append(abs(apart) < half)
    assert 0.93 < np.mean(hold)
    if theirs == 1 and not scatter:
        assert np.mean(hold) < 0.97  # exact, so no wider than it must be


def test_encoders_on_both_sides_are_drawn_together():
    """Ours is better by 2 on each of three encoders, which themselves differ by 20."""
    ours = [head(encoder, 52.0 + 10 * k, spread=0) for k, encoder in enumerate("abc")]
    theirs = [head(encoder, 50.0 + 10 * k, spread=0) for k, encoder in enumerate("abc")]
    d = compare("pool", "x", ours, theirs[::-1], 20)
    assert (d.better, d.low, d.high) == pytest.approx((2, 2, 2))
    others = [head(encoder, 50.0 + 10 * k, spread=0) for k, encoder in enumerate("def")]
    d = compare("pool", "x", ours, others, 20)
    assert d.high - d.low > 10


def test_what_heads_vary_by_counts_once():
    """Two encoders at 49 and 51, each with three heads around that: only the means count."""
    ours = [head("a", 49.0 + k, 0.0) for k in (-1, 0, 1)] + [head("b", 51.0, 0.0)] * 3
    found = compare("pool", "x", ours, [head("d", 50.0, 0.0)], 20)
    assert found.high == pytest.approx(12.706 * (2 / 2) ** 0.5)
