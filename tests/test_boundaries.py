"""boundaries.py against every possible path, by brute force, and on real speech."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofa_encoder import frames_of
from parts import boundaries
from parts.data import Speech
from parts.teachers import load_teacher


@given(S=st.integers(1, 6), K=st.integers(1, 3), gamma=st.floats(0, 3), seed=st.integers(0, 999))
def test_smoothing_finds_the_cheapest_path(S, K, gamma, seed):
    distances = torch.rand(2, 6, K, generator=torch.Generator().manual_seed(seed))
    ends = boundaries.cheapest_path(distances, torch.tensor([S, 6]), gamma)[0]

    def price(path):
        return sum(distances[0, s, z].item() for s, z in enumerate(path)) + gamma * sum(
            a != b for a, b in zip(path, path[1:])
        )

    cheapest = min(itertools.product(range(K), repeat=S), key=price)
    changes = [s for s in range(1, S) if cheapest[s] != cheapest[s - 1]]
    # Ties aside, the same segments: the best code of each of ours gives the same price.
    starts = [0, *ends[:-1]]
    ours = sum(distances[0, a:b].sum(0).min().item() for a, b in zip(starts, ends)) + gamma * (
        len(ends) - 1
    )
    assert ours == pytest.approx(price(cheapest), abs=1e-4) and ends[-1] == S
    assert (
        len(changes) == len(ends) - 1
        or gamma == 0
        or ours == pytest.approx(price(cheapest), abs=1e-6)
    )


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centres.repeat_interleave(50, 0) + torch.randn(150, 2) * 0.1
    found = boundaries.kmeans(x, 3, seed=1)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2 or len(found) == 3


@pytest.fixture(scope="module")
def some(asterisk):
    return Speech(asterisk.utterances[:600:6], sound=asterisk.sound)


def test_segments_of_real_speech_last_as_long_as_asked(some, tmp_path):
    path = tmp_path / "b.tsv"
    for period in (60, 90):
        boundaries.segment(some, load_teacher("mfcc"), path, period)
        ends = boundaries.read_boundaries(path, some)
        assert [e[-1] for e in ends] == [frames_of(u.samples) for u in some.utterances]
        assert 20 * sum(e[-1] for e in ends) / sum(map(len, ends)) == pytest.approx(
            period, rel=0.03
        )
    # Segments end where the sound changes: there, neighbouring MFCCs differ more than elsewhere.
    at, elsewhere = [], []
    for i in range(20):
        x = load_teacher("mfcc")(some[i][None], [len(some[i])])[0][0, :, :13]
        jumps = (x[1:] - x[:-1]).norm(dim=1).numpy()
        mask = np.zeros(len(jumps), bool)
        mask[ends[i][:-1] - 1] = True
        at, elsewhere = at + list(jumps[mask]), elsewhere + list(jumps[~mask])
    assert np.mean(at) > 1.25 * np.mean(elsewhere)


def test_cache_path_tells_corpora_teachers_and_periods_apart(some):
    keys = (
        (some, "mfcc", 90.0),
        (some, "another", 90.0),
        (some, "mfcc", 60.0),
        (Speech(some.utterances[1:]), "mfcc", 90.0),
    )
    paths = {boundaries.cache_path(*key, "data") for key in keys}
    assert len(paths) == 4 and boundaries.cache_path(*keys[0], "data") in paths


def test_pseudo_alpha_by_hand():
    alpha, number = boundaries.pseudo_alpha([np.array([2, 3, 7]), np.array([4])])
    assert alpha.tolist() == [[0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25], [0.25] * 4 + [0] * 3]
    assert number.tolist() == [[0, 1, 2, 0, 0, 0, 3], [0, 0, 0, 1, 0, 0, 0]]
    assert (alpha.cumsum(1) - number)[
        number > 0
    ].abs().max() < 1e-6  # pseudo-α reaches i where segment i ends


def test_file_of_times(some, tmp_path):
    few = Speech(some.utterances[:2])
    a, b = (u.id for u in few.utterances)
    path = tmp_path / "mine.tsv"
    path.write_text(f"{a}\t0.00 0.1 0.1 0.205 99\n{b}\t0.3\n")
    ends = boundaries.read_boundaries(path, few)
    assert ends[0].tolist() == [5, 10, frames_of(few.utterances[0].samples)]
    assert ends[1].tolist() == [15, frames_of(few.utterances[1].samples)]
