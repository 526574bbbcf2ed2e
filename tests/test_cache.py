"""cache.py on real speech: what is kept is what the encoder gives each utterance alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ofa_encoder import PRESETS, OFAEncoder, frames_of
from parts.cache import FrameCache, HiddenStateCache, UnfrozenEncoder, log_mel_frames

HALF = {"atol": 0.02, "rtol": 0.02}  # what is kept is in half precision


@pytest.fixture(scope="module")
def encoder():
    return OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")


@pytest.mark.parametrize("keep", [True, False])
def test_frames_are_the_encoders(asterisk, encoder, keep):
    some = asterisk.subset(5)
    x, lengths = FrameCache(some, encoder, "cpu", keep)([3, 1])
    assert x.shape[:2] == (2, lengths.max())
    for row, n, i in zip(x, lengths, [3, 1]):
        with torch.no_grad():
            alone, frames = encoder.features(some[i][None], torch.tensor([len(some[i])]))
        assert n == frames[0]
        torch.testing.assert_close(row[:n], alone[0], **HALF)
        assert not row[n:].any()


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.3])
def test_kept_states_are_the_encoders(asterisk, encoder, lam):
    some = asterisk.subset(20)
    frames = FrameCache(some, encoder, "cpu")
    kept = HiddenStateCache(some, "encoder", encoder, lam, "cpu", frames)
    with torch.no_grad():
        alone = [encoder(some[i][None], lam=lam) for i in range(20)]

    states, lengths = kept([3, 11])
    for row, n, i in zip(states, lengths, [3, 11]):
        assert n == alone[i].lengths[0]
        torch.testing.assert_close(row[:, :n], torch.cat(alone[i].hidden_states), **HALF)
        assert not row[:, n:].any()

    n_frames = sum(out.frames.item() for out in alone)
    assert kept.tokens == sum(out.lengths.item() for out in alone)
    assert kept.period_ms == pytest.approx(20 * n_frames / kept.tokens)
    assert kept.gflops > 0


def test_states_that_are_not_kept_are_the_same(asterisk, encoder):
    some = asterisk.subset(20)
    frames = FrameCache(some, encoder, "cpu")
    kept = HiddenStateCache(some, "encoder", encoder, 0.6, "cpu", frames)
    frames = FrameCache(some, encoder, "cpu", keep=False)
    computed = HiddenStateCache(some, "encoder", encoder, 0.6, "cpu", frames, keep=False)
    assert not frames.kept and not computed.kept
    assert computed.period_ms == pytest.approx(kept.period_ms, rel=0.02)
    torch.testing.assert_close(computed([3, 11])[0], kept([3, 11])[0], **HALF)


def test_known_segments_replace_those_that_are_detected(asterisk):
    """At λ = 1 a token is a segment, wherever the file says that one ends."""
    torch.manual_seed(0)
    encoder = OFAEncoder(replace(PRESETS["tiny"], alpha="segments")).eval()
    some = asterisk.subset(6)
    ends = [np.unique([3, 10, frames_of(u.samples)]) for u in some.utterances]
    for keep in (True, False):
        frames = FrameCache(some, encoder, "cpu", keep, ends)
        states = HiddenStateCache(some, "encoder", encoder, 1.0, "cpu", frames, keep, told=True)
        _, lengths = states([4, 0, 5])
        assert lengths.tolist() == [3, 3, 3]
        detected = FrameCache(some, encoder, "cpu", False)
        other = HiddenStateCache(some, "encoder", encoder, 1.0, "cpu", detected, False)
        assert states.gflops != other.gflops  # the work, too, is that of the known segments
        x, numbers = frames([4, 0])
        out = encoder.encode(x, numbers, 1.0, frames.marks([4, 0]))
        torch.testing.assert_close(out.durations()[:, :2], torch.tensor([[3.0, 7.0]] * 2))
    assert FrameCache(some, encoder, "cpu", keep=False).marks([0]) is None


@pytest.mark.parametrize("keep", [True, False])
def test_baselines(asterisk, encoder, keep):
    some = asterisk.subset(3)
    mel = HiddenStateCache(some, "logmel", None, 0.0, "cpu", None, keep)
    deaf = HiddenStateCache(some, "deaf", None, 0.0, "cpu", None, keep)
    assert mel.period_ms == 20  # a log-mel frame for every frame of the CNN
    assert mel.gflops == 0
    for i in range(3):
        states, _ = mel([i])
        frames = encoder(some[i][None]).frames.item()
        assert states.shape == (1, 1, frames, 80)
        torch.testing.assert_close(states[0, 0], log_mel_frames(some[i]), atol=0.01, rtol=0.001)
        states, lengths = deaf([i])
        assert states.shape == (1, 1, 1, 8) and lengths.tolist() == [1]
        assert not states.any()


def test_an_unfrozen_encoder_has_gradients(asterisk, encoder):
    states, lengths = UnfrozenEncoder(asterisk.subset(2), encoder, 0.5, "cpu", lr=0.1)([0, 1])
    states.square().sum().backward()
    assert all(p.grad is not None for p in encoder.feature_extractor.parameters())
    assert lengths.shape == (2,)
