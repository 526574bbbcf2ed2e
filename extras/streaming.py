"""CIF on a stream: frames come in chunks, tokens leave as soon as they have fired.

What a chunk leaves behind is a token that is not full yet: its mass r < β, and the sum Σ w · x of what it holds. The next chunk
gets it as one more frame in front, with weight r and value Σ w · x / r, and since CIF is a sum it makes no difference where the
frames of a token came from. So streaming is `cif` itself, called once a chunk, and a state of two small tensors:

    chunk x (B, S, C), α (B, S) ─ put the pending frame in front ─ cif ─ full tokens (B, T, C) leave ─ the last, unfilled one stays

The tokens over all chunks, with `finish` for the tail, are those of `cif` on the whole, however it was cut.

Source: cif.py (Dong and Xu, ICASSP 2020). What this file does not do: stream the encoder around CIF, whose convolutions and
attention look ahead; nor target lengths, which need the end.

`python streaming.py` streams the example of cif.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cif import cif


class State(NamedTuple):
    """What has come in and not gone out. Tensors only: save it with torch.save."""

    value: Tensor  # (B, C) mean of the frames in the unfilled token
    mass: Tensor  # (B,) what it has of β, 0 to below β
    frames: Tensor  # (B,) int64, frames that have come in


def start(x) -> State:
    """The state before the first chunk, for a batch like x (B, S, C)."""
    B, _, C = x.shape
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return State(
        x.new_zeros(B, C),
        torch.zeros(B, dtype=wide, device=x.device),
        torch.zeros(B, dtype=torch.int64, device=x.device),
    )


def step(x, alpha, state: State, lengths=None, *, threshold=1.0):
    """Take a chunk x (B, S, C), alpha (B, S) >= 0, of which lengths (B,), 0 to S, are valid. The threshold must be the same at every step.

    Returns tokens (B, T, C) that have fired, zero past each length; their number (B,); the times (B, T) at which they fired, in frames
    since the start of the stream; and the new state. Raises cif's ValueErrors.
    """
    if x.ndim != 3 or alpha.shape != x.shape[:2] or state.value.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, alpha {tuple(alpha.shape)}, expected (B, S, C) and (B, S), with the state's "
            f"(B, C) = {tuple(state.value.shape)}"
        )
    B, S, _ = x.shape
    lengths = (
        torch.full((B,), S, device=x.device)
        if lengths is None
        else torch.as_tensor(lengths, device=x.device)
    )
    x = torch.cat([state.value[:, None].to(x), x], 1)  # (B, 1 + S, C)
    alpha = torch.cat([state.mass[:, None], alpha.to(state.mass)], 1)  # (B, 1 + S)
    fired = cif(
        x, alpha, lengths + 1, threshold=threshold, tail_threshold=0.0
    )  # any tail fires, scaled up to β

    last = (fired.lengths - 1).clamp(min=0)
    mass = (fired.width * (fired.token == last[:, None])).sum(
        1
    )  # (B,) of the last token: β, or less if it is the tail
    mass = mass.where((fired.lengths > 0) & (mass < threshold * (1 - 5e-10)), 0)
    n_tokens = fired.lengths - (mass > 0).long()
    T = int(n_tokens.max())
    value = torch.zeros_like(state.value)
    if fired.tokens.shape[1]:
        value = (fired.tokens[torch.arange(B, device=x.device), last] / threshold).where(
            mass[:, None] > 0, 0
        )
    valid = torch.arange(T, device=x.device) < n_tokens[:, None]
    times = (
        fired.fire_times[:, :T] - 1 + state.frames[:, None]
    ) * valid  # the frame put in front came earlier
    return (
        fired.tokens[:, :T] * valid[:, :, None],
        n_tokens,
        times,
        State(value, mass, state.frames + lengths),
    )


def finish(state: State, *, threshold=1.0, tail_threshold=0.5):
    """The tail, at the end of the stream: a token (B, C), zero where none fires, and whether it fires (B,)."""
    fires = (
        (state.mass > 0) & (state.mass >= tail_threshold * threshold * (1 - 1e-9))
        if tail_threshold is not None
        else state.mass < 0
    )
    return state.value * threshold * fires[:, None], fires
