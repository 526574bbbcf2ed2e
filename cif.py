"""Continuous integrate-and-fire (CIF): merge frames into tokens by their weights; and spread them back.

FrameCache x_1 .. x_S carry weights α_s >= 0 with running total c_s = α_1 + … + α_s. Lay two rulers on one line:

    frame ends   c_1    c_2  c_3       c_4          one mark per frame
    token ends       β         2β        3β         one mark per β (the threshold, usually 1)

Together the marks cut the line into at most S + T pieces. A piece lies inside one frame f and one token t
and has a width w. That list of triplets *is* CIF:

    token_t = Σ w · x_f              over the pieces of token t      (cif)
    frame_f = Σ (w / α_f) · token_t  over the pieces of frame f      (expand, the way back)

Since pieces are ordered along the line, both sums run over consecutive pieces and each is one call of
`torch.nn.functional.embedding_bag`. There is no loop over time, fires or batch, and several tokens
may fire inside one frame. Only α that ask for more than MAX_TOKENS_PER_FRAME are refused: they are
a mistake, and the tokens would take gigabytes.

The tail, what is left after the last full token, fires once more if its mass reaches tail_threshold · β,
and is then scaled up to β; a smaller tail is dropped.

Source: Dong and Xu, "CIF: Continuous Integrate-and-Fire for end-to-end speech recognition", ICASSP 2020,
Algorithm 1. What this file does not do: predict α (ofa_encoder.py), or stream in chunks (streaming.py).

This file needs torch and nothing else: copy it. `python cif.py` prints an example to check by hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.nn.utils.rnn import pad_sequence

MAX_TOKENS_PER_FRAME = 100  # on average over an utterance


class Fired(NamedTuple):
    """What `cif` returns. B utterances, S frames, T tokens, C channels, P pieces."""

    tokens: Tensor  # (B, T, C) merged frames, zero past each length
    lengths: Tensor  # (B,) int64, tokens per utterance
    fire_times: Tensor  # (B, T) where on the frame axis each token fired: 2.5 is half-way through the third frame
    frame: Tensor  # (B, P) int64, the frame in which a piece lies; never decreases
    token: Tensor  # (B, P) int64, the token in which it lies; never decreases
    width: Tensor  # (B, P) its share of that frame's α; zero where nothing fired; float64
    alpha: Tensor  # (B, S) the α that were integrated: rescaled to target_lengths, zero in the padding; float64


def cif(x, alpha, lengths=None, *, threshold=1.0, tail_threshold=0.5, target_lengths=None) -> Fired:
    """Merge frames x (B, S, C) into tokens (B, T, C) by their weights alpha (B, S) >= 0.

    lengths (B,): valid frames of each utterance; what lies beyond may hold anything, NaN included. Default: all S.
    threshold: β, the mass of one token.
    tail_threshold: a tail of at least this part of β fires too; None never fires it.
    target_lengths (B,): rescale each utterance's α so that exactly so many tokens fire and no tail is left.

    Differentiable in x and alpha. Raises ValueError that names the argument at fault.
    Source: Dong and Xu 2020, Algorithm 1; target_lengths is their scaling strategy.
    """
    alpha, lengths, slack = _prepare(x, alpha, lengths, threshold, tail_threshold, target_lengths)
    B, S, C = x.shape
    device = x.device

    total = alpha.cumsum(1)  # (B, S) c_s, the marks of the first ruler
    fires = (
        total.detach() / threshold + slack
    ).long()  # (B, S) token ends at or before each frame end
    full = fires[:, -1]  # (B,) full tokens; then the tail:
    tail = total[:, -1] - full.to(total) * threshold  # (B,) its mass
    enough = torch.inf if tail_threshold is None else max(tail_threshold, 2 * slack) - slack
    fires_tail = tail >= enough * threshold
    n_tokens = full + fires_tail
    T, most = torch.stack([n_tokens, full]).amax(1).tolist()  # a GPU is waited for once
    P = S + most

    # Merge the rulers. Frame end s has s frame ends and fires[s] token ends before it, which gives its place.
    # Piece p ends at mark p, so p = (frame ends before it) + (token ends before it) = frame + token.
    place = torch.arange(P, device=device)
    ends_frame = torch.zeros(B, P + 1, dtype=torch.bool, device=device)
    ends_frame.scatter_(
        1, fires + torch.arange(1, S + 1, device=device), True
    )  # whether the mark *before* a place ends a frame
    frame, ends_frame = ends_frame.cumsum(1)[:, :-1], ends_frame[:, 1:]
    token = place - frame  # (B, P)
    frame = torch.minimum(frame, lengths[:, None] - 1)  # padding is never read
    marks = torch.where(ends_frame, total.gather(1, frame), (token + 1).to(total) * threshold)
    width = marks.diff(dim=1, prepend=marks.new_zeros(B, 1))
    width = width.masked_fill(
        (token >= n_tokens[:, None]) | (place >= (lengths + full)[:, None]), 0
    )

    # A tail that fires is scaled up to β.
    weight = torch.where(
        token == full[:, None], width * (threshold / tail.where(fires_tail, 1))[:, None], width
    )

    # Token t's pieces follow the mark that ends token t - 1, in the first frame at whose end t tokens have fired.
    count = torch.arange(T + 1, device=device)
    fired_in = torch.searchsorted(fires, count.expand(B, -1).contiguous())
    tokens = _sum_runs(x, frame, weight, (count + fired_in)[:, :-1])  # (B, T, C)

    with torch.no_grad():  # when did the mark that ends token t pass?
        frame_at = torch.minimum(fired_in[:, 1:], lengths[:, None] - 1)
        overshoot = total.gather(1, frame_at) - count[1:].to(total) * threshold
        times = (
            frame_at
            + 1
            - overshoot / alpha.gather(1, frame_at).clamp(min=torch.finfo(alpha.dtype).tiny)
        )
        times = times.where(count[1:] <= full[:, None], lengths[:, None].to(times))
        times = times.masked_fill(count[1:] > n_tokens[:, None], 0).float()

    return Fired(tokens, n_tokens, times, frame, token, width, alpha)


def expand(tokens, fired) -> Tensor:
    """Spread tokens (B, T, C) back over the frames from which they were made: (B, S, C).

    A frame gets Σ (w / α_f) · token_t over its pieces. FrameCache of which nothing fired (padding, a dropped tail,
    α = 0) get zeros, a frame of which a part was dropped gets that much less. `expand(torch.ones(B, T, 1), fired)` says how much of each frame is covered, 0 to 1.
    """
    B, T = fired.fire_times.shape
    if tokens.ndim != 3 or tokens.shape[:2] != (B, T):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, expected (B, T, C) with (B, T) = {(B, T)}"
        )
    S = fired.alpha.shape[1]
    alpha = fired.alpha.gather(1, fired.frame)  # (B, P)
    share = fired.width / alpha.where(alpha > 0, 1)
    first = torch.searchsorted(
        fired.frame, torch.arange(S, device=tokens.device).expand(B, -1).contiguous()
    )
    return (
        _sum_runs(tokens, fired.token.clamp(max=T - 1), share, first)
        if T
        else tokens.new_zeros(B, S, tokens.shape[2])
    )


def _sum_runs(x, index, weight, first):
    """Σ weight[p] · x[index[p]] over the runs of pieces that start at `first`: (B, N, C), (B, P), (B, P), (B, R) -> (B, R, C)."""
    B, N, C = x.shape
    if first.shape[1] == 0:
        return x.new_zeros(B, 0, C)
    batch = torch.arange(B, device=x.device)[:, None]
    out = embedding_bag(
        (index + batch * N).flatten(),
        x.reshape(B * N, C),
        (first + batch * index.shape[1]).flatten(),
        per_sample_weights=weight.to(x.dtype).flatten(),
        mode="sum",
    )
    return out.view(B, -1, C)


def _prepare(x, alpha, lengths, threshold, tail_threshold, target_lengths):
    """Check the arguments. Return α in the widest float, rescaled to the targets and zero in the padding, lengths,
    and the rounding error to forgive when a running total is compared with a token end."""
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and type {x.dtype}, expected floats (B, S, C), each size at least 1"
        )
    B, S, _ = x.shape
    if alpha.shape != (B, S) or not alpha.is_floating_point():
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)} and type {alpha.dtype}, expected floats (B, S) = {(B, S)}"
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a number > 0")
    if tail_threshold is not None and not 0 <= tail_threshold <= 1:
        raise ValueError(
            f"tail_threshold is {tail_threshold}, expected 0 to 1, or None to drop every tail"
        )
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    alpha = alpha.to(wide)
    if lengths is None:
        lengths = torch.full((B,), S, device=x.device)
    else:
        lengths = _whole_numbers("lengths", lengths, B, f"1 to {S}").to(x.device)
        if ((lengths < 1) | (lengths > S)).any():
            raise ValueError(f"lengths is {lengths.tolist()}, expected 1 to {S} frames")
        alpha = alpha.masked_fill(torch.arange(S, device=x.device) >= lengths[:, None], 0)
    rate = _tokens_per_frame(alpha, lengths, threshold)
    low, high = alpha.detach().aminmax()
    low, high, rate = torch.stack([low, high, rate]).tolist()  # a GPU is waited for once
    if not (low >= 0 and high < torch.inf):  # as of NaN
        raise ValueError(
            f"alpha of shape {(B, S)} holds negative, infinite or NaN weights, expected finite ones >= 0"
        )
    if target_lengths is not None:
        target = _whole_numbers("target_lengths", target_lengths, B, "1 or more").to(x.device)
        mass = alpha.sum(1)
        alpha = alpha * (target.to(mass) * threshold / mass)[:, None]
        rate = _tokens_per_frame(alpha, lengths, threshold)
        fewest, least = target.amin().to(mass), mass.detach().amin()
        fewest, least, rate = torch.stack([fewest, least, rate]).tolist()  # and once more
        if fewest < 1 or least == 0:
            raise ValueError(
                f"target_lengths is {target.tolist()} for α that sum to {mass.tolist()}, expected targets "
                "of 1 or more and sums > 0"
            )
    if not rate <= MAX_TOKENS_PER_FRAME:
        raise ValueError(
            f"alpha asks for {rate:.4g} tokens a frame in one utterance, expected at "
            f"most {MAX_TOKENS_PER_FRAME}: were α or target_lengths scaled by "
            f"mistake, or is the threshold of {threshold} too small?"
        )
    return alpha, lengths, 1e-9 if wide == torch.float64 else 1e-4


def _tokens_per_frame(alpha, lengths, threshold):
    """The mean number of tokens in a frame, of the utterance that has the most."""
    return (alpha.detach().sum(1) / lengths).amax() / threshold


def _whole_numbers(name, value, B, expected):
    value = torch.as_tensor(value)
    if value.shape != (B,) or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and type {value.dtype}, "
            f"expected {B} whole numbers (B,), each {expected}"
        )
    return value.long()


def cif_loop(
    x, alpha, lengths=None, *, threshold=1.0, tail_threshold=0.5, target_lengths=None
) -> Fired:
    """The definition, one frame at a time: same arguments, tokens, lengths and times as `cif`. For reading and for tests."""
    alpha, lengths, slack = _prepare(x, alpha, lengths, threshold, tail_threshold, target_lengths)
    B, S, C = x.shape
    zero = alpha.new_zeros(())
    columns = [[] for _ in range(5)]  # tokens, fire times and pieces of each utterance
    for b in range(B):
        tokens, times, pieces = [], [], []  # a piece: (frame, token, width)
        token, mass = x.new_zeros(C), zero  # the token being filled, and its mass so far
        for s in range(lengths[b]):
            left = alpha[b, s]  # what this frame has still to give
            while mass + left >= (1 - slack) * threshold:  # enough to fire
                width = threshold - mass
                tokens.append(token + width.to(x) * x[b, s])
                pieces.append((s, len(tokens) - 1, width))
                left = left - width
                times.append(s + 1 - left.detach() / alpha[b, s].detach())
                token, mass = x.new_zeros(C), zero
            token, mass = token + left.to(x) * x[b, s], mass + left
            pieces.append((s, len(tokens), left))
        if (
            tail_threshold is not None
            and mass >= (tail_threshold - slack) * threshold
            and mass > slack * threshold
        ):
            tokens.append(token * (threshold / mass).to(x))
            times.append(zero + lengths[b])
        frames, owners, widths = zip(*pieces)
        widths = [w if t < len(tokens) else zero for t, w in zip(owners, widths)]  # a dropped tail
        row = (
            torch.stack(tokens) if tokens else x.new_zeros(0, C),
            torch.stack(times) if times else zero[None][:0],
            lengths.new_tensor(frames),
            lengths.new_tensor(owners),
            torch.stack(widths),
        )
        for column, value in zip(columns, row):
            column.append(value)
    n_tokens = lengths.new_tensor([len(tokens) for tokens in columns[0]])
    fillers = (0, 0, S - 1, n_tokens.max().item(), 0)
    tokens, times, frame, token, width = (
        pad_sequence(c, batch_first=True, padding_value=f) for c, f in zip(columns, fillers)
    )
    return Fired(tokens, n_tokens, times.float(), frame, token, width, alpha)


if __name__ == "__main__":
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])  # five frames of one channel
    alpha = torch.tensor([[0.5, 0.75, 0.5, 0.25, 0.75]])  # running total 0.5, 1.25, 1.75, 2, 2.75
    fired = cif(x, alpha)
    print("frames    ", x.flatten().tolist())
    print("α         ", alpha.flatten().tolist())
    print(
        "tokens    ",
        fired.tokens.flatten().tolist(),
        "= 0.5·1 + 0.5·2,  0.25·2 + 0.5·3 + 0.25·4,  (0.75·5) / 0.75",
    )
    print(
        "fire times",
        fired.fire_times.flatten().tolist(),
        "frames; the third is the tail, at the end",
    )
    print("expanded  ", expand(fired.tokens, fired).flatten().tolist())
