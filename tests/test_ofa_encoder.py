"""ofa_encoder.py against torchaudio's own model, the closed form, and itself alone, padded and in company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_encoder import (
    PRESETS,
    Config,
    OFAEncoder,
    cnn_features,
    lam_from_period,
    modify_alpha,
    period_from_lam,
)
from parts.data import pad
from parts.runs import save

few = settings(max_examples=settings.default.max_examples // 10)  # for what takes long
SMALL = Config(channels=(32,) * 7, dim=64, heads=2, ff=96, layers=2, pos_kernel=16, dropout=0.1)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return OFAEncoder(PRESETS["tiny"]).eval()


@pytest.fixture(scope="module")
def prompts(asterisk):
    return [asterisk[i] for i in (0, 700, 1300, 1900, 2500)]  # five languages, five lengths


def small(compression="cif"):
    torch.manual_seed(0)
    return OFAEncoder(Config(**{**SMALL.__dict__, "compression": compression})).eval()


@pytest.mark.parametrize(
    "lam, expected", [(0, 1.0), (0.25, 0.75 + 0.25 * 0.2), (1, 0.2), (1.5, 0.1), (1.999, 0.0002)]
)
def test_modified_alpha(lam, expected):
    assert modify_alpha(torch.tensor([0.2]), lam).item() == pytest.approx(expected, rel=1e-3)


@given(st.floats(0, 1.99), st.floats(0, 1.99), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_modified_alpha_is_the_formula_between_0_and_1_and_falls_with_lam(lam, other, alpha):
    relu = lambda x: max(x, 0.0)
    expected = [relu(1 - lam) * 1 + (relu(lam) - 2 * relu(lam - 1)) * a for a in alpha]
    ours = modify_alpha(torch.tensor(alpha, dtype=torch.float64), lam)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    assert (ours >= 0).all() and (ours <= 1).all()
    assert (
        (ours - modify_alpha(torch.tensor(alpha, dtype=torch.float64), other)) * (lam - other)
        <= 1e-12
    ).all()


@given(st.floats(0, 1.999), st.floats(0.01, 0.99))
def test_lam_and_period_are_inverse(lam, mean_alpha):
    assert lam_from_period(period_from_lam(lam, mean_alpha), mean_alpha) == pytest.approx(
        lam, abs=1e-6
    )


@pytest.mark.parametrize(
    "lam, slope", [(0.0, 0.25 - 1), (0.5, 0.25 - 1), (1.0, 0.25 - 1), (1.5, -0.25)]
)
def test_modified_alpha_has_a_slope_everywhere(lam, slope):
    lam = torch.tensor(lam, requires_grad=True)
    modify_alpha(torch.tensor(0.25), lam).backward()
    assert lam.grad.item() == slope


def test_design_examples():
    assert period_from_lam(0, 0.22) == 20 and period_from_lam(1, 20 / 90) == pytest.approx(90)
    assert period_from_lam(1.5, 20 / 90) == pytest.approx(180) and lam_from_period(
        50, 20 / 90
    ) == pytest.approx((1 - 0.4) / (1 - 20 / 90))


@torch.no_grad()
def test_uncompressed_is_torchaudios_model(prompts):
    """Same weights, one utterance at a time: the same frames and the same layers as torchaudio's Wav2Vec2Model."""
    import torchaudio

    ours = small("none")
    theirs = torchaudio.models.Wav2Vec2Model(ours.feature_extractor, ours.encoder).eval()
    for waveform in prompts[:2]:
        expected, _ = theirs.extract_features(waveform[None])
        hidden = ours(waveform[None]).hidden_states
        for a, b in zip(hidden[1:], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lam_0_is_the_uncompressed_model(prompts):
    cif, none = small("cif"), small("none")
    none.load_state_dict(cif.state_dict(), strict=False)
    waveforms, lengths = pad(prompts[:3])
    for a, b in zip(
        cif(waveforms, lengths, 0.0).hidden_states, none(waveforms, lengths).hidden_states
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 4])
def test_average_is_average_pooling(prompts, k):
    encoder = small(f"average{k}")
    out = encoder(prompts[0][None])
    x, _ = cnn_features(
        encoder.feature_extractor, prompts[0][None], torch.tensor([len(prompts[0])])
    )
    x = encoder.encoder.feature_projection.layer_norm(x)
    pooled = torch.nn.functional.avg_pool1d(x.transpose(1, 2), k).transpose(1, 2)
    tokens = out.fired.tokens[:, : pooled.shape[1]]
    torch.testing.assert_close(tokens, pooled, rtol=1e-5, atol=1e-5)
    assert out.lengths.item() - pooled.shape[1] == (
        x.shape[1] % k >= k / 2
    )  # a tail of half a token or more fires
    assert out.frame_period() == pytest.approx(20 * k, rel=0.05)


pieces = st.tuples(
    st.integers(0, 4), st.integers(0, 4_000), st.integers(400, 12_000)
)  # of a prompt, from here, so many samples


@few
@given(
    lam=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1.99)),
    pieces=st.lists(pieces, min_size=1, max_size=4),
    padding=st.integers(0, 5_000),
)
@torch.no_grad()
def test_same_alone_padded_and_in_any_batch(encoder, prompts, lam, pieces, padding):
    sounds = [prompts[p][at : at + n] for p, at, n in pieces]
    waveforms, lengths = pad(sounds)
    waveforms = torch.nn.functional.pad(waveforms, (0, padding))
    waveforms = torch.where(
        torch.arange(waveforms.shape[1]) < lengths[:, None], waveforms, torch.nan
    )  # padding may hold anything
    together = encoder(waveforms, lengths, lam)
    for b, waveform in enumerate(sounds):
        alone = encoder(waveform[None], lam=lam)
        n, frames = alone.lengths[0], alone.frames[0]
        assert together.lengths[b] == n and together.frames[b] == frames
        assert (together.alpha[b, :frames] - alone.alpha[0]).abs().max() <= 1e-5
        for a, c in zip(together.hidden_states, alone.hidden_states, strict=True):
            assert (a[b, :n] - c[0]).abs().max() <= 1e-4 and not a[b, n:].any()


@torch.no_grad()
@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75, 1.0, 1.5])
def test_frame_period_follows_the_closed_form(encoder, prompts, lam):
    waveforms, lengths = pad([torch.cat(prompts)] * 2)
    out = encoder(waveforms, lengths, lam)
    assert out.frame_period() == pytest.approx(period_from_lam(lam, out.alpha.mean()), rel=0.05)


@few
@given(samples=st.integers(400, 3000), lam=st.floats(0, 1.9999), seed=st.integers(0, 9))
def test_every_waveform_has_a_token(encoder, samples, lam, seed):
    waveform = torch.randn(1, samples, generator=torch.Generator().manual_seed(seed)) * (
        seed > 0
    )  # seed 0: silence
    with torch.no_grad():
        out = encoder(waveform, lam=lam)
    assert out.lengths.item() >= 1 and out.hidden_states[-1].isfinite().all()


def test_lam_gets_a_gradient(encoder, prompts):
    lam = torch.tensor(0.6, requires_grad=True)
    encoder(prompts[0][None], lam=lam).hidden_states[-1].square().mean().backward()
    assert lam.grad.isfinite() and lam.grad != 0


def test_bf16_autocast(encoder, prompts):
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(prompts[0][None], lam=0.5)
    assert out.alpha.dtype == torch.float32 and out.hidden_states[-1].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_waveforms_of_any_float_type(encoder, prompts, dtype):
    """They are turned into the encoder's own type, here float32."""
    waveforms, lengths = pad(prompts[:2])
    waveforms = waveforms.to(dtype)
    expected = encoder(waveforms.float(), lengths, 0.5).hidden_states[-1]
    hidden = encoder(waveforms, lengths, 0.5).hidden_states[-1]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert encoder.features(waveforms, lengths)[0].dtype == torch.float32
    own = small().to(dtype)
    assert own(waveforms.float(), lengths, 0.5).hidden_states[-1].dtype == dtype


def test_checkpoint_round_trip(prompts, tmp_path):
    encoder = small()
    encoder.mean_alpha.fill_(0.25)
    save(encoder.checkpoint(), tmp_path / "e.pt")
    again = OFAEncoder.from_checkpoint(tmp_path / "e.pt")
    assert (
        not again.training
        and again.config == encoder.config
        and again.lam_for(40) == pytest.approx(2 / 3)
    )
    with torch.no_grad():
        assert all(torch.equal(again.state_dict()[k], v) for k, v in encoder.state_dict().items())
        hidden = again(prompts[0][None], lam=0.5).hidden_states[-1]
        expected = encoder(prompts[0][None], lam=0.5).hidden_states[-1]
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    half = {
        **encoder.checkpoint(),
        "encoder": {k: v.half() for k, v in encoder.state_dict().items()},
    }
    save(half, tmp_path / "half.pt")
    assert all(
        p.dtype == torch.float32
        for p in OFAEncoder.from_checkpoint(tmp_path / "half.pt").parameters()
    )
