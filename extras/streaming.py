"""CIF on a stream: frames come in chunks, and tokens leave as soon as they have fired.

What a chunk leaves behind is one token that is not full yet: its mass r < β, and the sum Σ w · x of
its pieces. The next chunk gets it as one more frame in front, with weight r and value Σ w · x / r.
CIF is a sum, so it makes no difference where the frames of a token came from. Streaming is
therefore `cif` itself, called once for each chunk, and a state of two small tensors:

    x (B, S, C), α (B, S) ─ pending frame in front ─ cif ─┬─ full tokens (B, T, C) leave
                 ▲                                        └─ the last, unfilled one is pending
                 └───────────────────── State ────────────────┘

    state = start(x)
    tokens, n_tokens, times, state = step(x, alpha, state)    for each chunk
    tail, fires = finish(state)

The tokens of all chunks, with that of `finish`, are those of `cif` on the whole utterance, however
it was cut, but for rounding: cif lets a token fire that lacks ROUNDING of β, and here it may do so
once a chunk. (It refuses a mean α over MAX_TOKENS_PER_FRAME, and here that is a chunk's mean.)

Source: cif.py (Dong and Xu, ICASSP 2020). What this file does not do: stream the encoder around
CIF, whose convolutions and attention look ahead; nor target lengths, which need the end.

To copy this file, put cif.py beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cif import ROUNDING, _check_tail_threshold, _integers, cif, widest_float


class State(NamedTuple):
    """What has come in and not gone out. Tensors only: `torch.save(state._asdict(), path)`."""

    # (B, C) mean of the frames in the unfilled token, weighted by their widths; float32 at least.
    value: Tensor
    mass: Tensor  # (B,) what it has of β: from 0 to below β
    frames: Tensor  # (B,) int64, frames that have come in


def start(x) -> State:
    """The state before the first chunk, for a batch like x (B, S, C)."""
    B, _, C = x.shape
    # Of half precision, each chunk would round away a little of the sum.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return State(
        value=torch.zeros(B, C, dtype=wide, device=x.device),
        mass=torch.zeros(B, dtype=widest_float(x.device), device=x.device),
        frames=torch.zeros(B, dtype=torch.int64, device=x.device),
    )


def step(x, alpha, state: State, lengths=None, *, threshold=1.0):
    """Take a chunk of frames x (B, S, C) with weights alpha (B, S) ≥ 0.

    lengths (B,): how many of the chunk's frames are valid in each utterance, 0 to S; default: all.
    threshold: β; it must be the same at every step.

    Returns
        tokens (B, T, C): those that have fired, zero past each utterance's number of tokens;
        n_tokens (B,): that number;
        times (B, T): when they fired, in frames since the start of the stream;
        state: for the next chunk.
    Raises ValueError if shapes don't fit, and as `cif` does.
    """
    if x.ndim != 3 or alpha.shape != x.shape[:2] or state.value.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, alpha {tuple(alpha.shape)}, expected (B, S, C) and "
            f"(B, S), with the state's (B, C) = {tuple(state.value.shape)}"
        )
    B, S, _ = x.shape
    if lengths is None:
        lengths = torch.full((B,), S, device=x.device)
    else:
        lengths = _integers("lengths", lengths, B, f"0 to {S}").to(x.device)
        if ((lengths < 0) | (lengths > S)).any():
            raise ValueError(f"lengths is {lengths.tolist()}, expected 0 to {S} frames")

    # What is pending goes in front as one more frame. With tail_threshold 0 `cif` gives out what is
    # pending after this chunk too: as a tail, scaled up to β.
    dtype = x.dtype
    x = torch.cat([state.value[:, None], x.to(state.value)], 1)  # (B, 1 + S, C)
    alpha = torch.cat([state.mass[:, None], alpha.to(state.mass)], 1)  # (B, 1 + S)
    fired = cif(x, alpha, lengths + 1, threshold=threshold, tail_threshold=0.0)

    # Is the last token full, or is it the tail? A tail lacks more of β than rounding explains.
    last = (fired.lengths - 1).clamp(min=0)
    mass = (fired.width * (fired.token == last[:, None])).sum(1)  # (B,)
    full = mass >= threshold * (1 - ROUNDING[mass.dtype] / 2)
    mass = mass.where((fired.lengths > 0) & ~full, 0)
    is_tail = mass > 0
    value = torch.zeros_like(state.value)
    if fired.tokens.shape[1] > 0:
        last_token = fired.tokens[torch.arange(B, device=x.device), last]  # (B, C)
        value = (last_token / threshold).where(is_tail[:, None], 0)

    # The others leave. Their times count the frame in front, which is no frame of this chunk.
    n_tokens = fired.lengths - is_tail.long()
    T = int(n_tokens.max())
    valid = torch.arange(T, device=x.device) < n_tokens[:, None]  # (B, T)
    tokens = (fired.tokens[:, :T] * valid[:, :, None]).to(dtype)
    times = (fired.fire_times[:, :T] - 1 + state.frames[:, None]) * valid
    return tokens, n_tokens, times, State(value, mass, state.frames + lengths)


def finish(state: State, *, threshold=1.0, tail_threshold=0.5):
    """The tail, at the end of the stream: a token (B, C) in the state's type, zero if none fires,
    and whether one fires (B,). threshold, tail_threshold and errors as of `cif`."""
    _check_tail_threshold(tail_threshold)
    if tail_threshold is None:
        fires = torch.zeros_like(state.mass, dtype=torch.bool)
    else:
        enough = tail_threshold * threshold * (1 - ROUNDING[state.mass.dtype])
        fires = (state.mass > 0) & (state.mass >= enough)
    return state.value * threshold * fires[:, None], fires
