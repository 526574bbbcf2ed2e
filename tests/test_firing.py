"""firing.py: matching against brute force, scores by hand, and real speech."""

from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras.firing import agreeing, firing, scores, table
from ofa_encoder import OFAEncoder
from parts import boundaries
from parts.teachers import load_teacher

times = st.lists(st.integers(0, 15), max_size=5, unique=True).map(sorted)


def most_pairs(fires, ends, tolerance):
    """The size of the largest matching, found by trying all."""
    few, many = sorted((fires, ends), key=len)
    most = 0
    for size in range(len(few) + 1):
        for chosen in combinations(few, size):
            for partners in permutations(many, size):
                pairs = sum(abs(a - b) <= tolerance for a, b in zip(chosen, partners))
                most = max(most, pairs)
    return most


@given(times, times, st.sampled_from([0, 1, 2]))
def test_pairs_are_a_largest_matching(fires, ends, tolerance):
    assert agreeing(fires, ends, tolerance) == most_pairs(fires, ends, tolerance)


def test_perfect_agreement():
    assert scores(4, 4, 4) == {"precision": 1, "recall": 1, "f1": 1, "r_value": 1}


def test_scores_by_hand():
    """Half of the fire times are right and three of four boundaries are found, so OS = 0.5."""
    s = scores(3, 6, 4)
    assert (s["precision"], s["recall"], s["f1"]) == (0.5, 0.75, 0.6)
    assert s["r_value"] == pytest.approx(1 - (np.sqrt(0.25**2 + 0.5**2) + 0.75 / np.sqrt(2)) / 2)


def test_nothing_agrees():
    assert scores(0, 10, 10)["r_value"] == pytest.approx(1 - (1 + 1 / np.sqrt(2)) / 2)
    assert scores(0, 5, 4)["f1"] == 0
    assert scores(0, 0, 4)["precision"] == 0


@pytest.fixture(scope="module")
def encoder():
    return OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")


def test_own_fire_times_as_boundaries(asterisk, encoder):
    """They are met perfectly by the encoder, and not by equal spacing."""
    some = asterisk.part("test").subset(30)
    lam = encoder.lam_for(90)
    ends = []
    for i in range(len(some)):
        out = encoder(some[i][None], lam=lam)
        ends.append(np.unique(np.append(out.fired.fire_times[0].numpy(), out.frames.item())))
    tokens, equal = firing(encoder, some, ends, [lam])
    assert tokens["f1"] == pytest.approx(1)
    assert tokens["r_value"] == pytest.approx(1)
    assert equal["f1"] < 0.95
    assert tokens["period_ms"] == equal["period_ms"] == pytest.approx(90, rel=0.1)


def test_boundaries_of_real_speech(asterisk, encoder, tmp_path):
    """Boundaries are met neither always nor never, by the encoder or by equal spacing."""
    some = asterisk.part("test").subset(30)
    path = tmp_path / "ends.tsv"
    boundaries.segment(some, load_teacher("mfcc"), path)
    tokens, equal = firing(encoder, some, boundaries.read_boundaries(path, some), [1.0])
    assert 0.2 < equal["f1"] < 0.7
    assert 0.2 < tokens["f1"] < 0.9


def test_table():
    lines = ["| a    | λ ms |", "| ---- | ---- |", "| 1    | 2    |", "| 1000 |      |"]
    assert table(["a", "λ ms"], [[1, "2"], [1000, ""]]).splitlines() == lines
