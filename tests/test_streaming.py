"""streaming.py: over any chunking, the tokens of cif on the whole."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from cif import cif
from extras import streaming
from extras.streaming import finish, start, step
from ofa_encoder import OFAEncoder, modify_alpha


def stream(x, alpha, cuts, threshold=1.0, tail_threshold=0.5, lengths=None):
    """All tokens and times of each utterance, as lists."""
    B, S, _ = x.shape
    lengths = torch.full((B,), S) if lengths is None else lengths
    state, tokens, times = start(x), [[] for _ in range(B)], [[] for _ in range(B)]
    for a, b in zip([0, *cuts], [*cuts, S]):
        out, n, at, state = step(
            x[:, a:b], alpha[:, a:b], state, (lengths - a).clamp(0, b - a), threshold=threshold
        )
        assert not out[torch.arange(out.shape[1]) >= n[:, None]].any()
        for i in range(B):
            tokens[i] += list(out[i, : n[i]])
            times[i] += at[i, : n[i]].tolist()
    tail, fires = finish(state, threshold=threshold, tail_threshold=tail_threshold)
    for i in range(B):
        if fires[i]:
            tokens[i].append(tail[i])
            times[i].append(float(lengths[i]))
    assert state.frames.tolist() == lengths.tolist()
    return tokens, times


def check(x, alpha, cuts, lengths=None, **how):
    whole = cif(x, alpha, lengths, **how)
    tokens, times = stream(x, alpha, cuts, lengths=lengths, **how)
    for i, n in enumerate(whole.lengths.tolist()):
        assert len(tokens[i]) == n
        if n:
            mine = torch.stack(tokens[i])
            torch.testing.assert_close(mine, whole.tokens[i, :n], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                torch.tensor(times[i]), whole.fire_times[i, :n], atol=1e-4, rtol=1e-5
            )


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([0.1, 0.5, 1.0, 2.5]),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
    st.sampled_from([1 / 8, None]),
    st.data(),
)
def test_any_chunking_gives_the_tokens_of_the_whole(
    seed, B, S, size, threshold, tail_threshold, grid, data
):
    """α with zeros, above 1, and (grid) of eighths, whose sums fall on token ends; chunks may be empty for some utterances."""
    g = torch.Generator().manual_seed(seed)
    x, alpha = torch.randn(B, S, 3, generator=g), torch.rand(B, S, generator=g) * 2 * size
    alpha = (
        (alpha / grid).round() * grid
        if grid
        else alpha.masked_fill(torch.rand(B, S, generator=g) < 0.2, 0)
    )
    lengths = torch.randint(1, S + 1, (B,), generator=g)
    cuts = sorted(data.draw(st.sets(st.integers(1, S - 1), max_size=6))) if S > 1 else []
    check(x, alpha, cuts, lengths, threshold=threshold, tail_threshold=tail_threshold)


def test_frame_by_frame_on_real_speech(asterisk):
    encoder = OFAEncoder.from_checkpoint(Path(__file__).parent.parent / "checkpoints/ofa-tiny.pt")
    with torch.no_grad():
        x, frames = encoder.features(asterisk[0][None], torch.tensor([len(asterisk[0])]))
        for lam in (0.0, 0.5, 1.2):
            check(x, modify_alpha(encoder.alpha_predictor(x), lam), range(1, int(frames)))


def test_state_can_be_saved_and_gradients_cross_chunks(tmp_path):
    x, alpha = torch.randn(2, 6, 3), torch.full((2, 6), 0.3, requires_grad=True)
    *_, state = step(x[:, :2], alpha[:, :2], start(x))
    tokens, *_ = step(x[:, 2:], alpha[:, 2:], state)
    tokens.sum().backward()
    assert alpha.grad[:, :2].abs().sum() > 0
    torch.save(state._asdict(), tmp_path / "state.pt")
    loaded = streaming.State(**torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(step(x[:, 2:], alpha[:, 2:], loaded)[0], tokens)
