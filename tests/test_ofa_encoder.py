"""ofa_encoder.py against torchaudio's own model, average pooling, the closed form, and itself: an
utterance alone, padded, and in a batch."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

import ofa_encoder
from cif import cif
from ofa_encoder import (
    COMPRESSIONS,
    CONSTANT_ALPHA,
    FRAME_MS,
    LONGEST_MS,
    MIN_SAMPLES,
    PRESETS,
    SAMPLE_RATE,
    Config,
    OFAEncoder,
    check_lam,
    cnn_features,
    frames_of,
    lam_from_period,
    lock_to_ends,
    modify_alpha,
    period_from_lam,
    segment_alpha,
    segment_ends,
)
from parts.data import pad
from parts.runs import save

few = settings(max_examples=settings.default.max_examples // 10)  # for what takes long
SMALL = Config(channels=(32,) * 7, dim=64, heads=2, ff=96, layers=2, pos_kernel=16, dropout=0.1)

# Names of the compressions that are average pooling over k frames, and k.
AVERAGES = [
    (name, round(1 / constant))
    for name, constant in CONSTANT_ALPHA.items()
    if (1 / constant).is_integer()
]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return OFAEncoder(PRESETS["tiny"]).eval()


@pytest.fixture(scope="module")
def prompts(asterisk):
    return [asterisk[i] for i in (0, 700, 1300, 1900, 2500)]  # five languages, five lengths


# Every compression, and the second way to α.
VARIANTS = [*COMPRESSIONS, "segments"]


def small(variant="cif"):
    torch.manual_seed(0)
    if variant == "segments":
        encoder = OFAEncoder(replace(SMALL, alpha="segments"))
        encoder.end_threshold.fill_(0.2)  # untrained, no probability is near a half
        return encoder.eval()
    return OFAEncoder(replace(SMALL, compression=variant)).eval()


# λ and the frame period.


@pytest.mark.parametrize(
    "lam, expected", [(0, 1.0), (0.25, 0.75 + 0.25 * 0.2), (1, 0.2), (1.5, 0.1), (1.999, 0.0002)]
)
def test_modified_alpha_by_hand(lam, expected):
    assert modify_alpha(torch.tensor([0.2]), lam).item() == pytest.approx(expected, rel=1e-3)


def papers_formula(alpha: float, lam: float) -> float:
    """relu(1 - λ) · 1 + (relu(λ) - 2 · relu(λ - 1)) · α"""
    return max(1 - lam, 0.0) + (max(lam, 0.0) - 2 * max(lam - 1, 0.0)) * alpha


some_alpha = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(st.floats(0, 1.99), some_alpha)
def test_modified_alpha_is_the_papers_formula(lam, alpha):
    expected = torch.tensor([papers_formula(a, lam) for a in alpha], dtype=torch.float64)
    ours = modify_alpha(torch.tensor(alpha, dtype=torch.float64), lam)
    torch.testing.assert_close(ours, expected)
    assert (ours >= 0).all()
    assert (ours <= 1).all()


@given(st.floats(0, 1.99), st.floats(0, 1.99), some_alpha)
def test_modified_alpha_falls_with_lam(lam, other, alpha):
    alpha = torch.tensor(alpha, dtype=torch.float64)
    smaller, larger = sorted([lam, other])
    assert (modify_alpha(alpha, larger) <= modify_alpha(alpha, smaller) + 1e-12).all()


@pytest.mark.parametrize(
    "lam, slope", [(0.0, 0.25 - 1), (0.5, 0.25 - 1), (1.0, 0.25 - 1), (1.5, -0.25)]
)
def test_modified_alpha_has_a_slope_everywhere(lam, slope):
    lam = torch.tensor(lam, requires_grad=True)
    modify_alpha(torch.tensor(0.25), lam).backward()
    assert lam.grad.item() == slope


@given(st.floats(0, 1.999), st.floats(0.01, 0.99))
def test_lam_and_period_are_inverse(lam, mean_alpha):
    period = period_from_lam(lam, mean_alpha)
    assert lam_from_period(period, mean_alpha) == pytest.approx(lam, abs=1e-6)


def test_periods_by_hand():
    """Speech with a mean α of 20 / 90: one token in 90 ms."""
    assert period_from_lam(0, 20 / 90) == 20
    assert period_from_lam(1, 20 / 90) == pytest.approx(90)
    assert period_from_lam(1.5, 20 / 90) == pytest.approx(180)
    assert lam_from_period(50, 20 / 90) == pytest.approx((1 - 0.4) / (1 - 20 / 90))
    assert lam_from_period(20, 1.0) == 1  # where every frame fires at any λ up to 1
    assert check_lam(lam_from_period(LONGEST_MS, 0.01)) < 2


# Segments.


def test_segments_end_at_peaks_by_hand():
    """Frame 2 is a peak that is too low, 4 and 5 are one plateau, 7 is the last."""
    probability = torch.tensor([[0.1, 0.3, 0.2, 0.8, 0.8, 0.1, 0.7, 0.9]])
    ends = segment_ends(probability, torch.tensor([7]), 0.5)
    assert ends.int().tolist() == [[0, 0, 0, 1, 0, 0, 1, 0]]
    alpha = segment_alpha(ends)
    torch.testing.assert_close(alpha, torch.tensor([[1 / 4] * 4 + [1 / 3] * 3 + [0]]).double())


def test_rounding_makes_no_peaks():
    """Frames of silence, whose probabilities differ in their last digits."""
    noise = 1e-6 * torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    probability = 0.6 + noise
    probability[0, 0] = 0.0
    ends = segment_ends(probability, torch.tensor([50]), 0.5)
    assert ends[0].nonzero()[:, 0].tolist() == [1, 49]


def test_lock_by_hand():
    """The example of its docstring, and a part after the last place where the total has grown."""
    weights = torch.tensor([[1.0, 0.4, 0.9, 0.6, 1.0, 0.3, 0.2]]).double()
    ends = torch.tensor([[0, 1, 1, 1, 0, 1, 1]]).bool()
    expected = torch.tensor([[1 / 1.4, 0.4 / 1.4, 1, 1, 1 / 1.5, 0.3 / 1.5, 0.2 / 1.5]]).double()
    torch.testing.assert_close(lock_to_ends(weights, ends), expected)


def random_ends(lengths):
    """(1, S) bool: ends of segments of these lengths."""
    ends = torch.zeros(1, sum(lengths), dtype=torch.bool)
    ends[0, torch.tensor(lengths).cumsum(0) - 1] = True
    return ends


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 50),
    st.one_of(st.floats(0, 1.99), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0, 1.01, 1.5])),
)
def test_locked_tokens_end_where_segments_end(lengths, repeats, lam):
    """In up to 2,000 segments. Up to λ = 1 a token ends wherever a segment does; beyond it, every
    token ends with a segment. The number of tokens is the rounded total of α′."""
    ends = random_ends(lengths * repeats)
    weights = modify_alpha(segment_alpha(ends), lam)
    total = weights.sum().item()
    if total < 0.51:  # the encoder raises it before it locks
        return
    fired = cif(torch.zeros(1, ends.shape[1], 1), lock_to_ends(weights, ends))
    assert abs(fired.lengths.item() - total) <= 0.5 + 1e-6
    places = set((ends[0].nonzero()[:, 0] + 1).tolist())
    times = fired.fire_times[0].tolist()
    if lam <= 1:
        met = {round(time) for time in times if abs(time - round(time)) < 1e-3}
        assert places <= met
    else:
        assert {round(time) for time in times} <= places
        assert max(abs(time - round(time)) for time in times) < 1e-3
    # And no mass is dropped: all pieces belong to tokens, which are full.
    assert fired.width.sum().item() == pytest.approx(fired.lengths.item(), abs=1e-6)


def test_lam_has_the_slope_of_its_weights_under_the_lock():
    """The factor is straight-through: d α′ / dλ is α - 1 up to λ = 1, times the factor."""
    ends = random_ends([2, 5, 3])
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weights = modify_alpha(segment_alpha(ends), lam)
    locked = lock_to_ends(weights, ends)
    locked.sum().backward()
    expected = ((segment_alpha(ends) - 1) * (locked / weights).detach()).sum()
    assert lam.grad.item() == pytest.approx(expected.item())


@torch.no_grad()
@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75, 1.0, 1.5])
def test_frame_period_follows_the_closed_form(encoder, prompts, lam):
    waveforms, lengths = pad([torch.cat(prompts)] * 2)
    out = encoder(waveforms, lengths, lam)
    assert out.frame_period() == pytest.approx(period_from_lam(lam, out.alpha.mean()), rel=0.05)


def test_lam_gets_a_gradient(encoder, prompts):
    lam = torch.tensor(0.6, requires_grad=True)
    encoder(prompts[0][None], lam=lam).hidden_states[-1].square().mean().backward()
    assert lam.grad.isfinite()
    assert lam.grad != 0


# What the encoder computes.


@torch.no_grad()
def test_durations_add_up_to_the_utterance(encoder, prompts):
    """Tokens follow each other without a gap. A tail fires at the end; one that is dropped is
    shorter than a token."""
    waveforms, lengths = pad(prompts)
    out = encoder(waveforms, lengths, 0.7)
    durations = out.durations()
    assert (durations >= 0).all()
    assert (durations.sum(1) <= out.frames + 1e-3).all()
    mean = (durations.sum(1) / out.lengths).tolist()
    assert mean == pytest.approx((out.frames / out.lengths).tolist(), rel=0.05)
    assert (durations[torch.arange(durations.shape[1]) >= out.lengths[:, None]] == 0).all()
    times = out.fired.fire_times
    since = times.diff(dim=1, prepend=times.new_zeros(len(times), 1)).clamp(min=0)
    torch.testing.assert_close(durations, since, atol=1e-3, rtol=0)
    uncompressed = encoder(waveforms, lengths)
    assert (uncompressed.durations().sum(1) == uncompressed.frames).all()


@torch.no_grad()
def test_frames_of_counts_what_the_cnn_makes():
    cnn = small().feature_extractor
    for samples in (MIN_SAMPLES, 719, 720, 721, 1039, 1040, SAMPLE_RATE):
        x, frames = cnn_features(cnn, torch.zeros(1, samples), torch.tensor([samples]))
        assert frames_of(samples) == x.shape[1] == frames.item()


@torch.no_grad()
def test_uncompressed_is_torchaudios_model(prompts):
    """Same weights, one utterance at a time: the layers of torchaudio's Wav2Vec2Model."""
    ours = small("none")
    theirs = torchaudio.models.Wav2Vec2Model(ours.feature_extractor, ours.encoder).eval()
    for waveform in prompts[:2]:
        expected, _ = theirs.extract_features(waveform[None])
        hidden_states = ours(waveform[None]).hidden_states
        for a, b in zip(hidden_states[1:], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lam_0_is_the_uncompressed_model(prompts):
    ofa = small("cif")
    none = small("none")
    none.load_state_dict(ofa.state_dict(), strict=False)
    waveforms, lengths = pad(prompts[:3])
    expected = none(waveforms, lengths).hidden_states
    for a, b in zip(ofa(waveforms, lengths, 0.0).hidden_states, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("compression, k", AVERAGES)
def test_constant_alpha_is_average_pooling(prompts, compression, k):
    encoder = small(compression)
    out = encoder(prompts[0][None])
    x, frames = encoder.features(prompts[0][None], torch.tensor([len(prompts[0])]))
    pooled = torch.nn.functional.avg_pool1d(x.transpose(1, 2), k).transpose(1, 2)
    tokens = out.fired.tokens[:, : pooled.shape[1]]
    torch.testing.assert_close(tokens, pooled, rtol=1e-5, atol=1e-5)

    # Average pooling leaves out what is left at the end; here a tail of half a token fires.
    left = frames.item() % k
    tail = 1 if left > 0 and left >= k / 2 else 0
    assert out.lengths.item() == pooled.shape[1] + tail


@torch.no_grad()
@pytest.mark.parametrize("compression", CONSTANT_ALPHA)
def test_constant_alpha_sets_the_frame_period(prompts, compression):
    out = small(compression)(prompts[0][None])
    expected = FRAME_MS / CONSTANT_ALPHA[compression]
    assert out.frame_period() == pytest.approx(expected, rel=0.05)
    assert (out.alpha == CONSTANT_ALPHA[compression]).all()


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_preset_and_compression(prompts, preset, compression):
    """Shapes as documented, also when one utterance is as short as can be."""
    torch.manual_seed(0)
    config = replace(PRESETS[preset], compression=compression)
    encoder = OFAEncoder(config).eval()
    waveforms, lengths = pad([prompts[0][:8000], prompts[1][:MIN_SAMPLES]])
    out = encoder(waveforms, lengths)
    assert out.frames.tolist() == [24, 1]
    assert out.lengths.min() >= 1
    assert out.alpha.shape == (2, 24)
    assert len(out.hidden_states) == 1 + config.layers
    for hidden in out.hidden_states:
        assert hidden.shape == (2, out.lengths.max(), config.dim)
        assert hidden.isfinite().all()


# An excerpt of a prompt: which prompt, its first sample, and how many samples.
excerpts = st.tuples(st.integers(0, 4), st.integers(0, 4_000), st.integers(MIN_SAMPLES, 12_000))


@few
@given(
    variant=st.sampled_from(VARIANTS),
    lam=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1.99)),
    excerpts=st.lists(excerpts, min_size=1, max_size=4),
    padding=st.integers(0, 5_000),
)
@torch.no_grad()
def test_same_alone_padded_and_in_any_batch(encoder, prompts, variant, lam, excerpts, padding):
    if variant != "cif":
        encoder = small(variant)
    if variant in CONSTANT_ALPHA:
        lam = 0.0
    sounds = [prompts[which][first : first + n] for which, first, n in excerpts]
    waveforms, lengths = pad(sounds)
    waveforms = torch.nn.functional.pad(waveforms, (0, padding))
    valid = torch.arange(waveforms.shape[1]) < lengths[:, None]
    waveforms = waveforms.where(valid, torch.nan)  # padding may hold anything
    together = encoder(waveforms, lengths, lam)
    for b, sound in enumerate(sounds):
        alone = encoder(sound[None], lam=lam)
        n = alone.lengths[0]
        frames = alone.frames[0]
        assert together.lengths[b] == n
        assert together.frames[b] == frames
        assert (together.alpha[b, :frames] - alone.alpha[0]).abs().max() <= 1e-5
        for hidden, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
            assert (hidden[b, :n] - expected[0]).abs().max() <= 1e-4
            assert not hidden[b, n:].any()


@few
@given(
    variant=st.sampled_from(["cif", "segments"]),
    samples=st.integers(MIN_SAMPLES, 3000),
    lam=st.floats(0, 1.9999),
    seed=st.integers(0, 9),
    volume=st.sampled_from([0.0, 1.0]),
)
@torch.no_grad()
def test_every_waveform_has_a_token(variant, samples, lam, seed, volume):
    """Noise or silence, however short, and with α′ that are nearly zero."""
    encoder = small(variant)
    noise = torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))
    out = encoder(noise * volume, lam=lam)
    assert out.lengths.item() >= 1
    assert out.hidden_states[-1].isfinite().all()


# Types and files.


def test_bf16_autocast(encoder, prompts):
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(prompts[0][None], lam=0.5)
    assert out.alpha.dtype == torch.float32
    assert out.hidden_states[-1].isfinite().all()


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


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_round_trip(prompts, tmp_path, variant):
    encoder = small(variant)
    save(encoder.checkpoint(), tmp_path / "e.pt")
    again = OFAEncoder.from_checkpoint(tmp_path / "e.pt")
    assert not again.training
    assert again.config == encoder.config
    weights = again.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in encoder.state_dict().items())
    expected = encoder(prompts[0][None]).hidden_states[-1]
    torch.testing.assert_close(again(prompts[0][None]).hidden_states[-1], expected)


def test_half_precision_checkpoint(tmp_path):
    """The file is in float16, but for mean α; the encoder that comes back is in float32."""
    encoder = small()
    encoder.mean_alpha.fill_(0.2503)
    save(encoder.checkpoint(torch.float16), tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)["encoder"]
    halves = {name for name, value in saved.items() if value.dtype == torch.float16}
    assert halves == set(saved) - {"mean_alpha"}
    again = OFAEncoder.from_checkpoint(tmp_path / "half.pt")
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert torch.equal(again.mean_alpha, encoder.mean_alpha)


def test_lam_for_uses_the_mean_alpha_of_the_checkpoint(tmp_path):
    encoder = small()
    encoder.mean_alpha.fill_(0.25)
    save(encoder.checkpoint(), tmp_path / "e.pt")
    again = OFAEncoder.from_checkpoint(tmp_path / "e.pt")
    assert again.lam_for(40) == pytest.approx(2 / 3)  # mean α′ = 1/2 = 1 - λ · 3/4


def test_imports_cif_alone():
    """Nothing else of this repository, so that the pair can be copied."""
    source = Path(ofa_encoder.__file__)
    modules = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
    ours = {path.stem for path in source.parent.iterdir()}
    assert modules & ours == {"cif"}


def test_lengths_of_any_whole_type():
    encoder = OFAEncoder(SMALL).eval()
    out = encoder(torch.randn(2, 3000), torch.tensor([2000, 3000], dtype=torch.int32), 0.5)
    assert out.frames.dtype == out.lengths.dtype == torch.int64
