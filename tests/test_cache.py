"""cache.py on real speech: what is kept is what the encoder gives each utterance alone."""

from pathlib import Path

import pytest
import torch

from ofa_encoder import OFAEncoder
from parts.cache import FrameCache, HiddenStateCache, UnfrozenEncoder, log_mel

CHECKPOINT = Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt"
HALF = {"atol": 0.02, "rtol": 0.02}  # what is kept is in half precision


@pytest.fixture(scope="module")
def encoder():
    return OFAEncoder.from_checkpoint(CHECKPOINT)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.3])
@torch.no_grad()
def test_kept_states_are_the_encoders(asterisk, encoder, lam):
    some = asterisk.subset(20)
    frames = FrameCache(some, encoder, "cpu")
    kept = HiddenStateCache(some, "encoder", encoder, lam, "cpu", frames)
    alone = [encoder(some[i][None], lam=lam) for i in range(20)]
    states, lengths = kept([3, 11])
    for row, n, out in zip(states, lengths, (alone[3], alone[11])):
        assert n == out.lengths[0] and not row[:, n:].any()
        torch.testing.assert_close(row[:, :n], torch.cat(out.hidden_states), **HALF)

    n_frames = sum(out.frames.item() for out in alone)
    n_tokens = sum(out.lengths.item() for out in alone)
    assert kept.tokens == n_tokens
    assert kept.period_ms == pytest.approx(20 * n_frames / n_tokens)
    assert kept.gflops > 0


def test_what_is_not_kept_is_computed(asterisk, encoder):
    some = asterisk.subset(20)
    kept = HiddenStateCache(some, "encoder", encoder, 0.6, "cpu", FrameCache(some, encoder, "cpu"))
    frames = FrameCache(some, encoder, "cpu", keep=False)
    computed = HiddenStateCache(some, "encoder", encoder, 0.6, "cpu", frames, keep=False)
    assert not computed.kept and not computed.frames.kept
    assert computed.period_ms == pytest.approx(kept.period_ms, rel=0.02)
    torch.testing.assert_close(computed([3, 11])[0], kept([3, 11])[0], **HALF)


def test_baselines(asterisk, encoder):
    some = asterisk.subset(3)
    mel = HiddenStateCache(some, "logmel", None, 0.0, "cpu", None)
    deaf = HiddenStateCache(some, "deaf", None, 0.0, "cpu", None)
    assert mel.period_ms == 20 and mel.gflops == 0
    for i in range(3):
        frames = encoder(some[i][None]).frames.item()
        states, _ = mel([i])
        assert states.shape == (1, 1, frames, 80)
        torch.testing.assert_close(states[0, 0], log_mel(some[i]), atol=0.01, rtol=0.001)
        nothing, _ = deaf([i])
        assert nothing.shape == (1, 1, 1, 8) and not nothing.any()


def test_an_unfrozen_encoder_gets_gradients(asterisk, encoder):
    states, lengths = UnfrozenEncoder(asterisk.subset(2), encoder, 0.5, "cpu", lr=0.1)([0, 1])
    states.square().sum().backward()
    assert all(p.grad is not None for p in encoder.feature_extractor.parameters())
    assert lengths.shape == (2,)
