"""streaming.py: however frames are cut into chunks, the tokens are those of cif on all of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cif import cif
from extras import streaming
from ofa_encoder import OFAEncoder, modify_alpha


def stream(x, alpha, cuts, lengths, threshold=1.0, tail_threshold=0.5):
    """Cut before the frames in cuts, and stream: each utterance's tokens and times, as lists."""
    B, S, _ = x.shape
    tokens = [[] for _ in range(B)]
    times = [[] for _ in range(B)]
    state = streaming.start(x)
    for begin, end in zip([0, *cuts], [*cuts, S]):
        in_chunk = (lengths - begin).clamp(0, end - begin)
        out, n_tokens, at, state = streaming.step(
            x[:, begin:end], alpha[:, begin:end], state, in_chunk, threshold=threshold
        )
        assert not out[torch.arange(out.shape[1]) >= n_tokens[:, None]].any()
        for i, n in enumerate(n_tokens):
            tokens[i] += list(out[i, :n])
            times[i] += at[i, :n].tolist()
    tail, fires = streaming.finish(state, threshold=threshold, tail_threshold=tail_threshold)
    for i in range(B):
        if fires[i]:
            tokens[i].append(tail[i])
            times[i].append(float(lengths[i]))
        else:
            assert not tail[i].any()
    assert state.frames.tolist() == lengths.tolist()
    return tokens, times


def check(x, alpha, cuts, lengths, **keywords):
    """Compare tokens and times of the stream with those of cif."""
    expected = cif(x, alpha, lengths, **keywords)
    tokens, times = stream(x, alpha, cuts, lengths, **keywords)
    for i, n in enumerate(expected.lengths.tolist()):
        assert len(tokens[i]) == n
        if n > 0:
            row = torch.stack(tokens[i])
            torch.testing.assert_close(row, expected.tokens[i, :n], atol=1e-5, rtol=1e-5)
            row = torch.tensor(times[i])
            torch.testing.assert_close(row, expected.fire_times[i, :n], atol=1e-4, rtol=1e-5)


@st.composite
def cases(draw):
    """x (B, S, 3), alpha (B, S), cuts, lengths (B,), and keywords.

    α are either multiples of an eighth, whose sums fall on token ends, or any floats, some of them
    zero; some are above 1. Utterances may have no frame in a chunk.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    B = draw(st.integers(1, 4))
    S = draw(st.integers(1, 40))
    x = torch.randn(B, S, 3, generator=generator)
    size = draw(st.sampled_from([0.1, 0.5, 1.0, 2.5]))  # mean α
    alpha = torch.rand(B, S, generator=generator) * 2 * size
    if draw(st.booleans()):
        alpha = (alpha * 8).round() / 8
    else:
        alpha = alpha.masked_fill(torch.rand(B, S, generator=generator) < 0.2, 0)
    lengths = torch.randint(1, S + 1, (B,), generator=generator)
    cuts = []
    if S > 1:
        cuts = sorted(draw(st.sets(st.integers(1, S - 1), max_size=6)))
    keywords = {
        "threshold": draw(st.sampled_from([0.5, 1.0, 1.5])),
        "tail_threshold": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
    }
    return x, alpha, cuts, lengths, keywords


@given(cases())
def test_any_chunking_gives_the_tokens_of_cif(case):
    x, alpha, cuts, lengths, keywords = case
    check(x, alpha, cuts, lengths, **keywords)


@torch.no_grad()
def test_frame_by_frame_on_real_speech(asterisk):
    encoder = OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")
    x, frames = encoder.features(asterisk[0][None], torch.tensor([len(asterisk[0])]))
    alpha = encoder.alpha_predictor(x)
    for lam in (0.0, 0.5, 1.2):
        check(x, modify_alpha(alpha, lam), range(1, x.shape[1]), frames)


def test_chunks_by_hand():
    """Two and a half tokens in a chunk, and then a frame that fills the third."""
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
    alpha = torch.full((1, 6), 0.5)
    tokens, n_tokens, times, state = streaming.step(x[:, :5], alpha[:, :5], streaming.start(x))
    assert tokens.flatten().tolist() == [1.5, 3.5]
    assert n_tokens.tolist() == [2]
    assert times.tolist() == [[2.0, 4.0]]
    assert state.value.tolist() == [[5.0]]
    assert state.mass.tolist() == [0.5]
    assert state.frames.tolist() == [5]

    tokens, n_tokens, times, state = streaming.step(x[:, 5:], alpha[:, 5:], state)
    assert tokens.flatten().tolist() == [5.5]
    assert times.tolist() == [[6.0]]
    assert state.mass.tolist() == [0.0]
    tail, fires = streaming.finish(state)
    assert fires.tolist() == [False]


def test_half_precision_loses_nothing_from_chunk_to_chunk():
    x = (torch.randn(1, 400, 8) + 3).bfloat16()
    alpha = torch.full((1, 400), 0.01)
    state = streaming.start(x)
    tokens = []
    for s in range(400):
        token, n_tokens, _, state = streaming.step(x[:, s : s + 1], alpha[:, s : s + 1], state)
        assert token.dtype == torch.bfloat16
        tokens += token[0, : n_tokens[0]].float()
    exact = cif(x.float(), alpha).tokens[0]
    assert len(tokens) in (3, 4)  # 400 weights of 0.01 are 4, by rounding or as a tail
    torch.testing.assert_close(torch.stack(tokens), exact[: len(tokens)], rtol=0, atol=0.01)


def test_bad_arguments_are_named_as_they_were_given():
    x = torch.randn(1, 4, 2)
    alpha = torch.rand(1, 4)
    state = streaming.start(x)
    for lengths, words in (
        ([5], r"lengths is \[5\], expected 0 to 4 frames"),
        ([-1], r"lengths is \[-1\], expected 0 to 4 frames"),
        ([True], "lengths has shape .* expected 1 whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            streaming.step(x, alpha, state, lengths)
    streaming.step(x, alpha, state, torch.tensor([4], dtype=torch.uint8))
    for tail_threshold in (5, -1, float("nan")):
        with pytest.raises(ValueError, match="tail_threshold is"):
            streaming.finish(state, tail_threshold=tail_threshold)


def test_gradients_cross_chunks():
    x = torch.randn(2, 6, 3)
    alpha = torch.full((2, 6), 0.3, requires_grad=True)
    *_, state = streaming.step(x[:, :2], alpha[:, :2], streaming.start(x))
    tokens, *_ = streaming.step(x[:, 2:], alpha[:, 2:], state)
    tokens.sum().backward()
    expected = alpha.detach().clone().requires_grad_()
    cif(x, expected, tail_threshold=None).tokens.sum().backward()
    torch.testing.assert_close(alpha.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_a_state_can_be_saved(tmp_path):
    x = torch.randn(2, 6, 3)
    alpha = torch.full((2, 6), 0.3)
    *_, state = streaming.step(x[:, :2], alpha[:, :2], streaming.start(x))
    tokens, *_ = streaming.step(x[:, 2:], alpha[:, 2:], state)
    torch.save(state._asdict(), tmp_path / "state.pt")
    loaded = streaming.State(**torch.load(tmp_path / "state.pt", weights_only=True))
    again, *_ = streaming.step(x[:, 2:], alpha[:, 2:], loaded)
    assert torch.equal(again, tokens)
