"""extras/export.py: what it writes once more against the original, onnxruntime against PyTorch."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cif import cif
from extras import export
from extras.export import LAMS, TOLERANCE, cif_graph, cnn_graph, difference, open_session, run
from ofa_encoder import (
    ALPHAS,
    CONSTANT_ALPHA,
    INITIAL_ALPHA,
    MIN_SAMPLES,
    SAMPLE_RATE,
    Config,
    OFAEncoder,
    cnn_features,
)
from parts.data import pad
from parts.runs import save

SMALL = Config(channels=(32,) * 7, dim=64, heads=2, ff=96, layers=2, pos_kernel=16)


def small(**changes):
    """An untrained encoder whose predictor lies around the threshold, so that segments differ."""
    torch.manual_seed(0)
    encoder = OFAEncoder(replace(SMALL, **changes)).eval()
    if encoder.config.alpha == "segments":
        encoder.end_threshold.fill_(INITIAL_ALPHA)
    return encoder


def session_of(encoder, folder):
    path = folder / "encoder.onnx"
    export.export(encoder).save(path, external_data=False)
    return open_session(path)


@pytest.fixture(scope="module", params=ALPHAS)
def both(request, tmp_path_factory):
    """An encoder, and onnxruntime's session of it."""
    encoder = small(alpha=request.param)
    return encoder, session_of(encoder, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def prompts(asterisk):
    return list(asterisk.subset(20))


# What was written once more.

# Eighths make running totals land exactly on token ends; free floats do not.
weights = st.one_of(st.integers(0, 12).map(lambda n: n / 8), st.floats(2**-10, 1.5, width=32))


@st.composite
def cases(draw):
    """x (B, S, 3), alpha (B, S) of at most S in sum and lengths (B,), with NaN in the padding."""
    B = draw(st.integers(1, 3))
    S = draw(st.integers(1, 12))
    row = st.lists(weights, min_size=S, max_size=S)
    alpha = torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))
    lengths = torch.tensor(draw(st.lists(st.integers(1, S), min_size=B, max_size=B)))
    padding = torch.arange(S) >= lengths[:, None]
    assume((alpha.masked_fill(padding, 0).sum(1) <= S).all())
    x = torch.rand(B, S, 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return (
        x.masked_fill(padding[:, :, None], torch.nan),
        alpha.masked_fill(padding, torch.nan),
        lengths,
    )


@given(cases())
def test_cif_graph_is_cif(case):
    expected = cif(*case)
    assume(expected.tokens.shape[1] > 0)  # an encoder's utterance has a token
    tokens, n_tokens, times = cif_graph(*case)
    assert n_tokens.tolist() == expected.lengths.tolist()
    torch.testing.assert_close(tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(times, expected.fire_times, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cnn_graph_is_cnn_features(prompts):
    extractor = small().feature_extractor
    sounds = [prompts[0], prompts[1][:MIN_SAMPLES], prompts[2]]
    waveforms, lengths = pad([sound + 0.1 for sound in sounds])  # with a mean that is not zero
    frames, n_frames = cnn_graph(extractor, waveforms, lengths)
    expected, expected_n = cnn_features(extractor, waveforms, lengths)
    assert n_frames.tolist() == expected_n.tolist()
    for b, n in enumerate(n_frames):
        torch.testing.assert_close(frames[b, :n], expected[b, :n], rtol=1e-4, atol=1e-5)


def test_running_maximum_is_cummax():
    torch.manual_seed(0)
    x = torch.randn(2, 1000, dtype=torch.float64)
    assert torch.equal(export.running_maximum(x, 1)[0], x.cummax(1).values)


# onnxruntime.


class CifGraph(torch.nn.Module):
    def forward(self, x, alpha, lengths):
        return cif_graph(x, alpha, lengths)


def test_cif_alone(tmp_path):
    """With any number of utterances and frames."""
    names = ("x", "alpha", "lengths")
    names_out = ("tokens", "n_tokens", "times")
    batch = torch.export.Dim("batch")
    frames = torch.export.Dim("frames")
    example = (torch.rand(2, 30, 4), torch.rand(2, 30).double(), torch.tensor([30, 20]))
    shapes = ({0: batch, 1: frames}, {0: batch, 1: frames}, {0: batch})
    export.to_onnx(CifGraph(), example, shapes, names, names_out).save(tmp_path / "cif.onnx")
    session = open_session(tmp_path / "cif.onnx")

    def check(x, alpha, lengths):
        feed = {name: value.numpy() for name, value in zip(names, (x, alpha, lengths))}
        tokens, n_tokens, times = [torch.from_numpy(value) for value in session.run(None, feed)]
        expected = cif(x, alpha, lengths)
        assert n_tokens.tolist() == expected.lengths.tolist()
        torch.testing.assert_close(tokens, expected.tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(times, expected.fire_times, rtol=1e-5, atol=1e-5)

    for B, S in ((1, 2), (1, 7), (3, 50), (8, 700)):
        torch.manual_seed(S)
        lengths = torch.randint(1, S + 1, (B,))
        check(torch.randn(B, S, 4), 0.6 + 0.4 * torch.rand(B, S).double(), lengths)

    # Ten weights of 0.1 add up to 0.9999999999999999, and are a token; ten of 0.15, which add up to
    # 1.4999999999999998, are a token and a tail.
    alpha = torch.tensor([[0.1], [0.15]], dtype=torch.float64).expand(2, 10)
    check(torch.randn(2, 10, 4), alpha, torch.tensor([10, 10]))


@pytest.mark.parametrize("lam", LAMS)
def test_twenty_utterances(both, prompts, lam):
    encoder, session = both
    assert len(prompts) == 20
    for prompt in prompts:
        assert difference(session, encoder, prompt, lam) <= TOLERANCE


@torch.no_grad()
def test_a_batch_and_its_fire_times(both, prompts):
    """Padded with NaN, and with the shortest utterance that there can be."""
    encoder, session = both
    waveforms, lengths = pad([prompts[0], prompts[1][:MIN_SAMPLES], prompts[2], prompts[3]])
    valid = torch.arange(waveforms.shape[1]) < lengths[:, None]
    waveforms = waveforms.where(valid, torch.nan)
    hidden_states, n_tokens, times = run(session, waveforms, lengths, 0.7)
    expected = encoder(waveforms, lengths, 0.7)
    assert n_tokens.tolist() == expected.lengths.tolist()
    stacked = torch.stack(expected.hidden_states, 1)
    torch.testing.assert_close(hidden_states, stacked, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(times, expected.fired.fire_times, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("samples", [MIN_SAMPLES, 719, 720, 80 * SAMPLE_RATE])
def test_short_and_long(both, prompts, samples):
    encoder, session = both
    waveform = torch.cat(prompts * 4)[:samples]
    assert len(waveform) == samples
    assert difference(session, encoder, waveform, 1.0) <= TOLERANCE


@pytest.mark.parametrize("compression", CONSTANT_ALPHA)
def test_fixed_rates(prompts, tmp_path, compression):
    encoder = small(compression=compression)
    session = session_of(encoder, tmp_path)
    for prompt in prompts[:3]:
        assert difference(session, encoder, prompt, 0.0) <= TOLERANCE


# The command.


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def test_the_command(monkeypatch, tmp_path, capsys):
    save(small().checkpoint(), tmp_path / "encoder.pt")
    program = export.export(small())
    monkeypatch.setattr(export, "export", lambda encoder: program)  # which takes seconds each time
    out = tmp_path / "new" / "encoder.onnx"
    call(monkeypatch, tmp_path / "encoder.pt", out)
    printed = capsys.readouterr().out
    assert "differ by at most" in printed and "20 prompts" in printed
    encoder = OFAEncoder.from_checkpoint(tmp_path / "encoder.pt")
    assert difference(open_session(out), encoder, torch.randn(8000), 0.5) <= TOLERANCE

    written = out.stat().st_mtime_ns
    for wrong in ("inf", "nan"):
        monkeypatch.setattr(export, "difference", lambda *_, wrong=wrong: float(wrong))
        with pytest.raises(ValueError, match="more than 0.0001"):
            call(monkeypatch, tmp_path / "encoder.pt", out)
    assert out.stat().st_mtime_ns == written  # what is of no use replaces nothing


def test_another_number_of_tokens_is_a_difference(both, prompts):
    encoder, session = both

    def at_another_rate(waveform, lam):
        return encoder(waveform, lam=lam + 0.5)

    assert difference(session, at_another_rate, prompts[0], 0.5) == float("inf")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_missing_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"{name} is missing: pip install"):
        export.check_libraries()
