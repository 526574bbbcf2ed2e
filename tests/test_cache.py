"""heard.py on real speech: what is kept is what the encoder gives each utterance alone."""

from pathlib import Path

import pytest
import torch

from ofa_encoder import OFAEncoder
from parts.cache import FrameCache, HiddenStateCache, UnfrozenEncoder, log_mel


@pytest.fixture(scope="module")
def encoder():
    return OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.3])
def test_kept_states_are_the_encoders(asterisk, encoder, lam):
    some = asterisk.subset(20)
    kept = HiddenStateCache(some, "encoder", encoder, lam, "cpu", FrameCache(some, encoder, "cpu"))
    hidden, lengths = kept([3, 11])
    frames = tokens = 0
    for i in range(20):
        with torch.no_grad():
            out = encoder(some[i][None], lam=lam)
        frames, tokens = frames + out.frames.item(), tokens + out.lengths.item()
        if i in (3, 11):
            b = (3, 11).index(i)
            assert lengths[b] == out.lengths[0] and not hidden[b, :, lengths[b] :].any()
            torch.testing.assert_close(
                hidden[b, :, : lengths[b]], torch.cat(out.hidden_states), atol=0.02, rtol=0.02
            )  # half precision
    assert (
        kept.tokens == tokens
        and kept.period_ms == pytest.approx(20 * frames / tokens)
        and kept.gflops > 0
    )
    computed = HiddenStateCache(
        some,
        "encoder",
        encoder,
        lam,
        "cpu",
        FrameCache(some, encoder, "cpu", keep=False),
        keep=False,
    )
    assert (
        computed.states is None
        and computed.frames.x is None
        and computed.period_ms == pytest.approx(kept.period_ms, rel=0.02)
    )
    torch.testing.assert_close(computed([3, 11])[0], hidden, atol=0.02, rtol=0.02)


def test_baselines(asterisk, encoder):
    some = asterisk.subset(3)
    mel, deaf = (
        HiddenStateCache(some, "logmel", None, 0.0, "cpu", None),
        HiddenStateCache(some, "deaf", None, 0.0, "cpu", None),
    )
    for i in range(3):
        frames = encoder(some[i][None]).frames.item()
        assert (
            mel([i])[0].shape == (1, 1, frames, 80)
            and deaf([i])[0].shape == (1, 1, 1, 8)
            and not deaf([i])[0].any()
        )
        torch.testing.assert_close(mel([i])[0][0, 0], log_mel(some[i]), atol=0.01, rtol=0.001)
    assert mel.period_ms == 20 and mel.gflops == 0


def test_live_trains_the_encoder(asterisk, encoder):
    hidden, lengths = UnfrozenEncoder(asterisk.subset(2), encoder, 0.5, "cpu", lr=0.1)([0, 1])
    hidden.square().sum().backward()
    assert all(
        p.grad is not None for p in encoder.feature_extractor.parameters()
    ) and lengths.shape == (2,)
