"""firing.py: matching against brute force, scores by hand, and real speech."""

from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras.firing import agreeing, firing, scores
from ofa_encoder import OFAEncoder
from parts import boundaries
from parts.teachers import load_teacher

times = st.lists(st.integers(0, 15), max_size=5, unique=True).map(sorted)


def most_pairs(fires, ends, tolerance):
    """The largest matching, by trying all."""
    few, many = sorted((fires, ends), key=len)
    return max(
        (
            sum(abs(a - b) <= tolerance for a, b in zip(chosen, order))
            for k in range(len(few) + 1)
            for chosen in combinations(few, k)
            for order in permutations(many, k)
        ),
        default=0,
    )


@given(times, times, st.sampled_from([0, 1, 2]))
def test_pairs_are_a_largest_matching(fires, ends, tolerance):
    assert agreeing(fires, ends, tolerance) == most_pairs(fires, ends, tolerance)


def test_scores_by_hand():
    assert scores(4, 4, 4) == {"precision": 1, "recall": 1, "f1": 1, "r_value": 1}
    s = scores(
        3, 6, 4
    )  # half of the fires are right, three of four boundaries are found, so OS = 0.5
    assert (s["precision"], s["recall"], s["f1"]) == (0.5, 0.75, 0.6)
    assert s["r_value"] == pytest.approx(1 - (np.sqrt(0.25**2 + 0.5**2) + 0.75 / np.sqrt(2)) / 2)
    assert scores(0, 10, 10)["r_value"] == pytest.approx(1 - (1 + 1 / np.sqrt(2)) / 2)
    assert scores(0, 5, 4)["f1"] == 0 and scores(0, 0, 4)["precision"] == 0


def test_real_speech(asterisk, tmp_path):
    """Fed its own fire times as boundaries the encoder is perfect; constant α is not, and no more often right than by chance."""
    some = asterisk.part("test").subset(30)
    encoder = OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")
    lam, ends = encoder.lam_for(90), []
    for i in range(len(some)):
        out = encoder(some[i][None], lam=lam)
        ends.append(np.unique(np.append(out.fired.fire_times[0].numpy(), out.frames.item())))
    learned, constant = firing(encoder, some, ends, [90])
    assert (
        learned["f1"] == pytest.approx(1)
        and learned["r_value"] == pytest.approx(1)
        and constant["f1"] < 0.95
    )
    assert learned["period_ms"] == constant["period_ms"] == pytest.approx(90, rel=0.1)
    boundaries.segment(some, load_teacher("mfcc"), tmp_path / "ends.tsv")
    learned, constant = firing(
        encoder, some, boundaries.read_boundaries(tmp_path / "ends.tsv", some), [90]
    )
    assert 0.2 < constant["f1"] < 0.7 and 0.2 < learned["f1"] < 0.9
