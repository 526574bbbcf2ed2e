"""boundaries.py against all possible cuts, by brute force, and on real speech."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofa_encoder import frames_of
from parts.boundaries import (
    cache_path,
    cheapest_cuts,
    pseudo_alpha,
    read_boundaries,
    segment,
    spreads,
)
from parts.data import Speech, Utterance, load
from parts.teachers import load_teacher

FRAMES = 6  # of an utterance without padding, in the test by brute force


def price(x, ends, gamma):
    """The price of these segments of x (S, D), as the docstring of boundaries.py has it."""
    segments = np.split(x, ends[:-1])
    return sum(((rows - rows.mean(0)) ** 2).sum() + gamma for rows in segments)


def all_cuts(S, longest):
    """The ends of every way to cut S frames into segments of at most `longest`."""
    for cuts in itertools.product([False, True], repeat=S - 1):
        ends = np.append(np.flatnonzero(cuts) + 1, S)
        if np.diff(ends, prepend=0).max() <= longest:
            yield ends


@given(
    S=st.integers(1, FRAMES),
    longest=st.integers(1, FRAMES + 1),
    gamma=st.floats(0, 3),
    seed=st.integers(0),
)
def test_no_cuts_are_cheaper(S, longest, gamma, seed):
    """In a batch of an utterance of S frames with padding, and one without."""
    random = torch.Generator().manual_seed(seed % 2**32)
    x = torch.randn(2, FRAMES, 3, generator=random)
    found = cheapest_cuts(spreads(x, longest), torch.tensor([S, FRAMES]), gamma)
    for row, n, ends in zip(x.double().numpy(), (S, FRAMES), found, strict=True):
        lowest = min(price(row[:n], cuts, gamma) for cuts in all_cuts(n, longest))
        assert ends[-1] == n and np.diff(ends, prepend=0).max() <= longest
        assert price(row[:n], ends, gamma) == pytest.approx(lowest, abs=1e-4)


def test_spread_of_long_segments_far_from_zero():
    """Differences of sums of a thousand large numbers: against the definition, in float64."""
    x = 100 + torch.randn(1, 1000, 2, generator=torch.Generator().manual_seed(0))
    last = x[0, -50:].double()
    wanted = (last - last.mean(0)).square().sum().item()
    assert spreads(x, 50)[0, -1, -1].item() == pytest.approx(wanted, rel=1e-5)


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


def test_cache_path_tells_files_of_one_name_apart(folder, tmp_path):
    """The same names and lengths elsewhere, and a file that has been changed in place."""
    for name in ("clean", "noisy"):
        shutil.copytree(folder, tmp_path / name)
    clean, noisy = (load(str(tmp_path / name)) for name in ("clean", "noisy"))
    before = cache_path(clean, "a", 90.0, "data")
    assert cache_path(noisy, "a", 90.0, "data") != before
    assert cache_path(clean, "a", 90.0, "data") == before
    os.utime(clean.utterances[0].path, (0, 0))
    assert cache_path(clean, "a", 90.0, "data") != before


def test_a_file_of_times_from_elsewhere(some, tmp_path):
    """Times may repeat, lie past the end or lack it; they are rounded to frames. Empty lines and
    other utterances do no harm."""
    few = Speech(some.utterances[:2])
    first, second = few.utterances
    path = tmp_path / "mine.tsv"
    text = f"{first.id}\t0.00 0.1 0.1 0.205 99\n\n{second.id}\t0.3\nanother\t1.0\n"
    path.write_text(text, encoding="utf-8-sig")  # as Windows saves it
    ends = read_boundaries(path, few)
    assert ends[0].tolist() == [5, 10, frames_of(first.samples)]
    assert ends[1].tolist() == [15, frames_of(second.samples)]


@pytest.mark.parametrize("seconds", [1, 3])
@pytest.mark.parametrize("unit", [1e3, 16e3, 1e9, 1e15])  # ms, samples, ns, and too much for int32
def test_times_that_are_not_in_seconds_are_refused(tmp_path, seconds, unit):
    """Of short utterances, too, whose segments would last no longer than usual ones do."""
    speech = Speech([Utterance(f"{n}", "speaker", seconds * 16_000) for n in range(4)])
    path = tmp_path / "ms.tsv"
    times = " ".join(f"{unit * time:.0f}" for time in (0.09, 0.18, 0.25, 0.34))
    path.write_text("".join(f"{n}\t{times}\n" for n in range(4)))
    with pytest.raises(ValueError, match="ms.tsv: 16 of 16 times lie past .* in seconds?"):
        read_boundaries(path, speech)


def test_times_in_minutes_are_refused(tmp_path):
    speech = Speech([Utterance(f"{n}", "speaker", 3 * 16_000) for n in range(4)])
    path = tmp_path / "minutes.tsv"
    path.write_text("".join(f"{n}\t0.0015 0.003\n" for n in range(4)))
    with pytest.raises(ValueError, match="minutes.tsv: segments last 2980 ms .* in seconds?"):
        read_boundaries(path, speech)


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
