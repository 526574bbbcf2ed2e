"""boundaries.py against every possible path, by brute force, and on real speech."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofa_encoder import frames_of
from parts.boundaries import (
    cache_path,
    cheapest_path,
    kmeans,
    pseudo_alpha,
    read_boundaries,
    segment,
)
from parts.data import Speech
from parts.teachers import load_teacher

FRAMES = 6  # of an utterance without padding, in the test by brute force


def price(distances, path, gamma):
    """The price of a path, a code for each frame, as the docstring of boundaries.py has it."""
    changes = sum(a != b for a, b in zip(path, path[1:]))
    return sum(distances[s, code].item() for s, code in enumerate(path)) + gamma * changes


def path_of(distances, ends):
    """The best path (S,) with these segments: in each of them the code that is nearest overall."""
    path = []
    start = 0
    for end in ends:
        code = distances[start:end].sum(0).argmin().item()
        path += [code] * (end - start)
        start = end
    return path


@given(S=st.integers(1, FRAMES), K=st.integers(1, 3), gamma=st.floats(0, 3), seed=st.integers(0))
def test_no_path_is_cheaper(S, K, gamma, seed):
    """In a batch of an utterance of S frames with padding, and one without."""
    random = torch.Generator().manual_seed(seed % 2**32)
    distances = torch.rand(2, FRAMES, K, generator=random, dtype=torch.float64)
    found = cheapest_path(distances, torch.tensor([S, FRAMES]), gamma)
    for d, n, ends in zip(distances, (S, FRAMES), found, strict=True):
        lowest = min(price(d, path, gamma) for path in itertools.product(range(K), repeat=n))
        assert ends[-1] == n
        assert price(d, path_of(d, ends), gamma) == pytest.approx(lowest, abs=1e-9)


def test_kmeans_is_lloyds_algorithm():
    """Against a plain loop that starts from the same rows. Each row is there three times, so two
    codes may start in one place; then the second is nearest to nothing and stays."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    for seed in range(5):
        codes = kmeans(x, 6, rounds=0, seed=seed).numpy()
        for _ in range(20):
            nearest = [np.linalg.norm(codes - row, axis=1).argmin() for row in x.numpy()]
            for k in range(6):
                members = [row for row, code in zip(x.numpy(), nearest) if code == k]
                if members:
                    codes[k] = np.mean(members, axis=0)
        np.testing.assert_allclose(kmeans(x, 6, rounds=20, seed=seed), codes, atol=1e-5)


# Real speech.


@pytest.fixture(scope="module")
def some(asterisk):
    return Speech(asterisk.utterances[:600:6], sound=asterisk.sound)


@pytest.fixture(scope="module")
def ends_of(some, tmp_path_factory):
    """The ends of all segments of `some`, by how long the mean segment shall be."""
    result = {}
    for period_ms in (60, 90):
        path = tmp_path_factory.mktemp("boundaries") / f"{period_ms}.tsv"
        segment(some, load_teacher("mfcc"), path, period_ms)
        result[period_ms] = read_boundaries(path, some)
    return result


def test_the_last_segment_ends_with_the_utterance(some, ends_of):
    for ends in ends_of.values():
        assert [e[-1] for e in ends] == [frames_of(u.samples) for u in some.utterances]


@pytest.mark.parametrize("period_ms", [60, 90])
def test_segments_last_as_long_as_asked(ends_of, period_ms):
    frames = sum(e[-1] for e in ends_of[period_ms])
    segments = sum(len(e) for e in ends_of[period_ms])
    assert 20 * frames / segments == pytest.approx(period_ms, rel=0.03)


def test_segments_end_where_the_sound_changes(some, ends_of):
    """The MFCCs on both sides of an end differ more than those elsewhere."""
    at_ends = []
    elsewhere = []
    for i in range(20):
        (targets,) = load_teacher("mfcc")(some[i][None], torch.tensor([len(some[i])]))
        mfcc = targets[0, :, :13]  # without the differences
        jumps = (mfcc[1:] - mfcc[:-1]).norm(dim=1).numpy()  # (S - 1,)
        ends = ends_of[90][i][:-1] - 1
        at_ends += list(jumps[ends])
        elsewhere += list(np.delete(jumps, ends))
    assert np.mean(at_ends) > 1.25 * np.mean(elsewhere)


# Files.


def test_cache_path_tells_corpora_teachers_and_periods_apart(some):
    fewer = Speech(some.utterances[1:])
    keys = [(some, "a", 90.0), (some, "b", 90.0), (some, "a", 60.0), (fewer, "a", 90.0)]
    paths = [cache_path(*key, "data") for key in keys]
    assert len(set(paths)) == 4
    assert cache_path(*keys[0], "data") == paths[0]


def test_a_file_of_times_from_elsewhere(some, tmp_path):
    """Times may repeat, lie past the end or lack it; they are rounded to frames. Empty lines and
    other utterances do no harm."""
    few = Speech(some.utterances[:2])
    first, second = few.utterances
    path = tmp_path / "mine.tsv"
    path.write_text(f"{first.id}\t0.00 0.1 0.1 0.205 99\n\n{second.id}\t0.3\nanother\t1.0\n")
    ends = read_boundaries(path, few)
    assert ends[0].tolist() == [5, 10, frames_of(first.samples)]
    assert ends[1].tolist() == [15, frames_of(second.samples)]


# Guidance.


def test_pseudo_alpha_by_hand():
    alpha, segment_number = pseudo_alpha([np.array([2, 3, 7]), np.array([4])])
    assert alpha.tolist() == [[0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25], [0.25] * 4 + [0] * 3]
    assert segment_number.tolist() == [[0, 1, 2, 0, 0, 0, 3], [0, 0, 0, 1, 0, 0, 0]]


def test_pseudo_alpha_adds_up_to_the_segment_number(ends_of):
    alpha, segment_number = pseudo_alpha(ends_of[90])
    at_end = segment_number > 0
    sums = alpha.double().cumsum(1)[at_end]
    torch.testing.assert_close(sums, segment_number.double()[at_end], rtol=1e-6, atol=1e-6)


def test_pseudo_alpha_of_no_utterances():
    """As for a process that got none of a batch."""
    alpha, segment_number = pseudo_alpha([])
    assert alpha.shape == segment_number.shape == (0, 1)
