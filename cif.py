"""Continuous integrate-and-fire (CIF): merge frames into tokens by their weights, and back.

Frames x_1 … x_S carry weights α_s ≥ 0, with running total c_s = α_1 + … + α_s. Lay two rulers on
one line:

    frame ends   c_1    c_2  c_3       c_4      one mark for each frame
    token ends       β         2β        3β     one mark at each multiple of the threshold β

Their marks together cut the line into at most S + T pieces. Each piece lies inside one frame f and
one token t, and has a width w. This list of triplets (f, t, w) *is* CIF:

    token_t = Σ w · x_f              over the pieces of token t      (cif)
    frame_f = Σ (w / α_f) · token_t  over the pieces of frame f      (expand, the way back)

The pieces are ordered along the line, so both sums run over consecutive pieces, and each is one
call of `torch.nn.functional.embedding_bag`, which gathers, weighs and sums at once, without a
tensor (B, P, C). There is no loop over time, tokens or utterances, and a frame with a large α may
fire several tokens.

The *tail* is what is left after the last full token. If its mass reaches tail_threshold · β it
fires once more, scaled up to the mass β; a smaller tail is dropped.

Source: Dong and Xu, "CIF: Continuous Integrate-and-Fire for end-to-end speech recognition",
ICASSP 2020, Algorithm 1. What this file does not do: predict α (see ofa_encoder.py), or take
frames in chunks (see extras/streaming.py).

This file needs torch and nothing else: copy it. `python cif.py` prints an example to check by hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.nn.utils.rnn import pad_sequence

# `cif` works for any α ≥ 0 up to 100 tokens a frame on average over an utterance. More than that is
# a mistake, such as a wrong unit, and its tokens would take gigabytes of memory: it is an error.
MAX_TOKENS_PER_FRAME = 100

# A running total that falls short of a token end by less than this fraction of β counts as having
# reached it: ten weights of 0.1 add up to 0.9999999999999999, and what a sum lacks grows with its
# length (1e-9 after three minutes of frames whose α are all 0.7).
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}


# 1. From frames to tokens, and back.


class Fired(NamedTuple):
    """What `cif` returns. B utterances, S frames, T tokens, C channels, P pieces.

    frame, token and width are the list of pieces, ordered along the line. After an utterance's
    last piece follow pieces of width 0. α and widths are float64 (on MPS, float32).
    """

    tokens: Tensor  # (B, T, C) merged frames; zero past each utterance's number of tokens
    lengths: Tensor  # (B,) int64, number of tokens
    fire_times: Tensor  # (B, T) float32, in frames: 2.5 is half-way through the third frame
    frame: Tensor  # (B, P) int64, the frame in which a piece lies, from 0; never decreases
    token: Tensor  # (B, P) int64, the token in which it lies, from 0; never decreases
    width: Tensor  # (B, P) how much of that frame's α lies in it; 0 in a tail that was dropped
    alpha: Tensor  # (B, S) α as integrated: scaled to target_lengths, zero in the padding


def cif(x, alpha, lengths=None, *, threshold=1.0, tail_threshold=0.5, target_lengths=None) -> Fired:
    """Merge frames x (B, S, C) into tokens (B, T, C) by their weights alpha (B, S) ≥ 0.

    lengths (B,): number of valid frames in each utterance, 1 to S; those beyond may hold anything,
        NaN included. Default: all S.
    threshold: β > 0, the mass of one token.
    tail_threshold: a tail fires if its mass is at least this fraction of β, 0 to 1; None: never.
    target_lengths (B,): scale each utterance's α so that exactly so many tokens fire and no tail is
        left (the paper's scaling strategy). Default: take α as they are.

    x and alpha may be of any float type; tokens have that of x. Differentiable in both, through the
    widths of the pieces; the number of tokens is a step function of α and has no gradient.
    Raises ValueError that names the argument at fault, also for more than MAX_TOKENS_PER_FRAME.
    Source: Dong and Xu 2020, Algorithm 1.
    """
    _check_arguments(x, alpha, threshold, tail_threshold)
    alpha, lengths = _prepare(x, alpha, lengths, threshold, target_lengths)
    slack = ROUNDING[alpha.dtype]

    # Lay the two rulers on one line. Token ends need no list, being multiples of β: it is enough to
    # know how many there are at or before each frame end.
    total = alpha.cumsum(1)  # (B, S) c_s, the frame ends
    n_fired = (total.detach() / threshold + slack).long()  # (B, S)

    # What is left after the last full token is the tail. One that holds nothing but rounding errors
    # does not fire, even if tail_threshold is 0.
    full = n_fired[:, -1]  # (B,) number of full tokens
    tail = total[:, -1] - full.to(total) * threshold  # (B,) mass of the tail
    if tail_threshold is None:
        fires_tail = torch.zeros_like(full, dtype=torch.bool)
    else:
        fires_tail = tail >= max(tail_threshold - slack, slack) * threshold
    n_tokens = full + fires_tail.long()

    # These two sizes are needed on the CPU. Fetching both at once makes it wait for a GPU once.
    T, most_full = torch.stack([n_tokens, full]).amax(1).tolist()

    # Cut the line into pieces. The pieces of a dropped tail are kept in the list with width 0.
    frame, token, width = _merge_rulers(total, n_fired, lengths, most_full, threshold)
    width = width.masked_fill(token >= n_tokens[:, None], 0)

    # A token is the sum of its pieces; those of a tail that fires are scaled up to the mass β.
    scale = threshold / tail.where(fires_tail, 1)  # (B,)
    weight = torch.where(token == full[:, None], width * scale[:, None], width)

    # Token t's pieces begin right after the mark that ends token t - 1. Up to and including that
    # mark there are t token ends, and all frame ends at which fewer than t tokens have fired.
    count = torch.arange(T + 1, device=x.device)
    fired_in = torch.searchsorted(n_fired, count.expand(len(x), -1).contiguous())  # (B, T + 1)
    first_piece = (count + fired_in)[:, :-1]
    tokens = _sum_runs(x, frame, weight, first_piece)  # (B, T, C)

    # The same search has found the frame during which each full token fired. A tail fires at the
    # end of the utterance.
    with torch.no_grad():
        during = torch.minimum(fired_in[:, 1:], lengths[:, None] - 1)  # (B, T)
        times = _fire_times(total, alpha, during, threshold)
        times = times.where(count[1:] <= full[:, None], lengths[:, None].to(times))
        times = times.masked_fill(count[1:] > n_tokens[:, None], 0).float()

    return Fired(tokens, n_tokens, times, frame, token, width, alpha)


def _merge_rulers(total, n_fired, lengths, most_full, threshold):
    """Cut the line at the marks of both rulers: the frame, token and width of each piece, (B, P).

    total (B, S): frame ends. n_fired (B, S): how many token ends lie at or before each of them.
    lengths (B,): valid frames. most_full: largest number of full tokens in the batch.

    Piece p is the stretch of the line that ends at mark p. For the example at the bottom of this
    file (five frames, β = 1, all numbers from 0):

        p   mark p            frame  token  width
        0   0.50  frame end     0      0    0.50
        1   1.00  token end     1      0    0.50
        2   1.25  frame end     1      1    0.25
        3   1.75  frame end     2      1    0.50
        4   2.00  token end     3      1    0.25
        5   2.00  frame end     3      2    0.00
        6   2.75  frame end     4      2    0.75

    Before mark p there are p marks: `frame` of them are frame ends, `token` of them token ends. So
    p = frame + token in every row. Where two marks coincide the token end goes first, and the piece
    between them has width 0.
    """
    B, S = total.shape
    place = torch.arange(S + most_full, device=total.device)  # (P,), one for each mark

    # Before frame end s lie s other frame ends and n_fired[s] token ends, which gives its place
    # among all marks. The places left over belong to the token ends.
    ends_frame = torch.zeros(B, S + most_full, dtype=torch.int64, device=total.device)
    ends_frame.scatter_(1, n_fired + place[:S], 1)  # (B, P) 1 at a frame end, 0 at a token end

    # The frame of a piece is the number of frame ends before its own mark. Token ends are the rest.
    frame = ends_frame.cumsum(1) - ends_frame
    token = place - frame
    frame = torch.minimum(frame, lengths[:, None] - 1)  # so that padding is never read

    # A piece reaches from the mark before its own to its own. A token that fired by rounding, a
    # little before its end is reached, ends with its frame. What follows an utterance's last mark
    # is padding and has no width.
    frame_ends = total.gather(1, frame)
    token_ends = torch.minimum((token + 1).to(total) * threshold, frame_ends.detach())
    marks = torch.where(ends_frame == 1, frame_ends, token_ends)
    width = marks.diff(dim=1, prepend=marks.new_zeros(B, 1))
    n_marks = lengths + n_fired[:, -1]  # (B,)
    width = width.masked_fill(place >= n_marks[:, None], 0)
    return frame, token, width


def _fire_times(total, alpha, during, threshold):
    """When each full token fired, in frames: (B, T) for during (B, T), the frame in which it did.

    Within a frame the total rises evenly. If it ends 0.25 above the token end and rose by
    α = 0.75, the token fired a third of a frame before the frame's end.
    Where an utterance has fewer tokens than T the result means nothing, and may be NaN.
    """
    token_ends = torch.arange(1, during.shape[1] + 1, device=total.device).to(total) * threshold
    overshoot = (total.gather(1, during) - token_ends).clamp(min=0)
    return during + 1 - overshoot / alpha.gather(1, during)


def expand(tokens, fired) -> Tensor:
    """Spread tokens (B, T, C) back over the frames from which they were made: (B, S, C).

    tokens: those of `fired`, or any others of the same B and T, such as a Transformer's output.
    A frame gets Σ (w / α_f) · token_t over its pieces: the weighted mean of the tokens it is part
    of. Frames that are part of no token (padding, a dropped tail, α = 0) are zero, and a frame of
    which a part was dropped gets that much less. `expand(torch.ones(B, T, 1), fired)` says how much
    of each frame is part of some token, 0 to 1. Raises ValueError if B or T do not fit.
    """
    B, T = fired.fire_times.shape
    if tokens.ndim != 3 or tokens.shape[:2] != (B, T):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, expected (B, T, C) with (B, T) = {(B, T)}"
        )
    S = fired.alpha.shape[1]
    if T == 0:
        return tokens.new_zeros(B, S, tokens.shape[2])

    # What part of its frame a piece is. A frame with α = 0 has only pieces of width 0. The width of
    # one with a tiny α may be mostly rounding errors.
    alpha = fired.alpha.gather(1, fired.frame)  # (B, P)
    share = (fired.width / alpha.where(alpha > 0, 1)).clamp(max=1)

    # A dropped tail belongs to no token. Its share is 0, so any token will do in its place, if only
    # it is finite: what follows an utterance's tokens may be NaN, as Transformers leave it.
    token = fired.token.clamp(max=T - 1)
    unused = torch.arange(T, device=tokens.device) >= fired.lengths[:, None]  # (B, T)
    tokens = tokens.masked_fill(unused[:, :, None], 0)

    frames = torch.arange(S, device=tokens.device).expand(B, -1).contiguous()
    first_piece = torch.searchsorted(fired.frame, frames)  # (B, S)
    return _sum_runs(tokens, token, share, first_piece)


def _sum_runs(x, index, weight, first):
    """Sum weight[p] · x[index[p]] over runs of consecutive pieces p.

    x (B, N, C), index and weight (B, P); first (B, R): the piece with which each run begins, the
    first of them with piece 0. A run ends where the next one begins. Returns (B, R, C).
    """
    B, N, C = x.shape
    R = first.shape[1]
    if R == 0:
        return x.new_zeros(B, 0, C)

    # embedding_bag knows no batch, so rows and pieces are numbered through all utterances. The last
    # run of an utterance goes on to its last piece; those that belong to no token have weight 0.
    batch = torch.arange(B, device=x.device)[:, None]
    sums = embedding_bag(
        (index + batch * N).flatten(),
        x.reshape(B * N, C),
        (first + batch * index.shape[1]).flatten(),
        per_sample_weights=weight.to(x.dtype).flatten(),
        mode="sum",
    )  # (B · R, C)
    return sums.view(B, R, C)


# 2. What the arguments must be.


def widest_float(device) -> torch.dtype:
    """float64, so that a running total stays exact over an hour of frames. MPS has only float32:
    there the shares of `expand`, differences of totals over α, may be off by a few percent after a
    minute."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_arguments(x, alpha, threshold, tail_threshold):
    """Raise ValueError if a shape, a type or a threshold is wrong."""
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and type {x.dtype}, expected floats (B, S, C), "
            "each size at least 1"
        )
    B, S, _ = x.shape
    if alpha.shape != (B, S) or not alpha.is_floating_point():
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)} and type {alpha.dtype}, expected floats "
            f"(B, S) = {(B, S)}"
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a number > 0")
    _check_tail_threshold(tail_threshold)


def _check_tail_threshold(tail_threshold):
    """Raise ValueError unless it is None, or a number from 0 to 1."""
    if tail_threshold is not None and not 0 <= tail_threshold <= 1:
        raise ValueError(
            f"tail_threshold is {tail_threshold}, expected 0 to 1, or None to drop every tail"
        )


def _prepare(x, alpha, lengths, threshold, target_lengths):
    """α as it is integrated, (B, S): in the widest float, scaled to the targets, zero in the
    padding; and lengths (B,). Raises ValueError for values that are out of range."""
    B, S, _ = x.shape
    alpha = alpha.to(widest_float(x.device))
    if lengths is None:
        lengths = torch.full((B,), S, device=x.device)
    else:
        lengths = _integers("lengths", lengths, B, f"1 to {S}").to(x.device)
        if ((lengths < 1) | (lengths > S)).any():
            raise ValueError(f"lengths is {lengths.tolist()}, expected 1 to {S} frames")
        padding = torch.arange(S, device=x.device) >= lengths[:, None]
        alpha = alpha.masked_fill(padding, 0)

    # All that is left to check is fetched at once, so that the CPU waits for a GPU once.
    low, high = alpha.detach().aminmax()
    rate = _tokens_per_frame(alpha, lengths, threshold)
    low, high, rate = torch.stack([low, high, rate]).tolist()
    if not (low >= 0 and high < torch.inf):  # written so that NaN fails too
        raise ValueError(
            f"alpha of shape {(B, S)} holds negative, infinite or NaN weights, "
            "expected finite ones >= 0"
        )
    if target_lengths is not None:
        alpha, rate = _scale_to_targets(alpha, lengths, threshold, target_lengths)
    if not rate <= MAX_TOKENS_PER_FRAME:
        raise ValueError(
            f"alpha asks for {rate:.4g} tokens a frame in one utterance, expected at "
            f"most {MAX_TOKENS_PER_FRAME}: were α or target_lengths scaled by "
            f"mistake, or is the threshold of {threshold} too small?"
        )
    return alpha, lengths


def _scale_to_targets(alpha, lengths, threshold, target_lengths):
    """Scale α (B, S) so that each utterance has the mass of its target; and its new rate."""
    B = len(alpha)
    target = _integers("target_lengths", target_lengths, B, "1 or more").to(alpha.device)
    mass = alpha.sum(1)  # (B,)
    alpha = alpha * (target.to(mass) * threshold / mass)[:, None]
    fewest = target.amin().to(mass)
    least = mass.detach().amin()
    rate = _tokens_per_frame(alpha, lengths, threshold)
    fewest, least, rate = torch.stack([fewest, least, rate]).tolist()
    if fewest < 1 or least == 0:
        raise ValueError(
            f"target_lengths is {target.tolist()} for α that sum to {mass.tolist()}, "
            "expected targets of 1 or more and sums > 0"
        )
    return alpha, rate


def _tokens_per_frame(alpha, lengths, threshold):
    """The mean number of tokens in a frame, of the utterance that has the most."""
    return (alpha.detach().sum(1) / lengths).amax() / threshold


def _integers(name, value, B, expected):
    """value as an int64 tensor (B,), or a ValueError that says what was expected."""
    value = torch.as_tensor(value)
    if value.shape != (B,) or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and type {value.dtype}, "
            f"expected {B} whole numbers (B,), each {expected}"
        )
    return value.long()


# 3. The same as a plain loop.


def cif_loop(
    x, alpha, lengths=None, *, threshold=1.0, tail_threshold=0.5, target_lengths=None
) -> Fired:
    """The definition, one frame at a time: to read, and to compare with. Same arguments as `cif`.

    It returns the same tokens, lengths and times, and has the same gradients. Its list of pieces
    may lack pieces of width 0.
    """
    _check_arguments(x, alpha, threshold, tail_threshold)
    alpha, lengths = _prepare(x, alpha, lengths, threshold, target_lengths)
    rows = [
        _integrate_and_fire(x[b, :n], alpha[b, :n], threshold, tail_threshold)
        for b, n in enumerate(lengths.tolist())
    ]
    tokens, times, frame, token, width = (list(column) for column in zip(*rows))
    n_tokens = [len(row) for row in tokens]
    return Fired(
        tokens=pad_sequence(tokens, batch_first=True),
        lengths=lengths.new_tensor(n_tokens),
        fire_times=pad_sequence(times, batch_first=True).float(),
        frame=pad_sequence(frame, batch_first=True, padding_value=x.shape[1] - 1),
        token=pad_sequence(token, batch_first=True, padding_value=max(n_tokens)),
        width=pad_sequence(width, batch_first=True),
        alpha=alpha,
    )


def _integrate_and_fire(x, alpha, threshold, tail_threshold):
    """One utterance, x (S, C) and alpha (S,): its tokens (T, C), fire times (T,), and the frame,
    token and width of its pieces, each (P,)."""
    slack = ROUNDING[alpha.dtype]
    zero = alpha.new_zeros(())
    nothing = x.new_zeros(x.shape[1])
    tokens, times = [], []
    frame, token, width = [], [], []  # of each piece
    value = nothing  # of the token that is being filled: the sum so far, (C,)
    mass = zero  # and how much of β it has
    for s in range(len(x)):
        left = alpha[s]  # what this frame has still to give
        while mass + left >= (1 - slack) * threshold:  # enough to fill a token: it fires
            part = threshold - mass
            lacking = (part - left).detach().clamp(min=0)  # by rounding: this frame has no more
            part = part - lacking
            left = left - part
            frame.append(s)
            token.append(len(tokens))
            width.append(part)
            tokens.append(value + part.to(x) * x[s])
            times.append(s + 1 - left.detach() / alpha[s].detach())
            value = nothing
            mass = zero - lacking
        frame.append(s)
        token.append(len(tokens))
        width.append(left)
        value = value + left.to(x) * x[s]
        mass = mass + left

    tail_fires = (
        tail_threshold is not None
        and mass >= (tail_threshold - slack) * threshold
        and mass > slack * threshold  # more than rounding errors
    )
    if tail_fires:
        tokens.append(value * (threshold / mass).to(x))
        times.append(zero + len(x))
    width = [w if t < len(tokens) else zero for t, w in zip(token, width)]  # 0 in a dropped tail
    return (
        torch.stack(tokens) if tokens else x.new_zeros(0, x.shape[1]),
        torch.stack(times) if times else alpha.new_zeros(0),
        torch.tensor(frame, device=x.device),
        torch.tensor(token, device=x.device),
        torch.stack(width),
    )


if __name__ == "__main__":
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])  # five frames of one channel
    alpha = torch.tensor([[0.5, 0.75, 0.5, 0.25, 0.75]])  # running total 0.5, 1.25, 1.75, 2, 2.75
    fired = cif(x, alpha)
    tokens = fired.tokens.flatten().tolist()
    times = fired.fire_times.flatten().tolist()
    print("frames    ", x.flatten().tolist())
    print("α         ", alpha.flatten().tolist())
    print("tokens    ", tokens, "= 0.5·1 + 0.5·2,  0.25·2 + 0.5·3 + 0.25·4,  (0.75·5) / 0.75")
    print("fire times", times, "frames; the third is the tail, at the end")
    print("expanded  ", expand(fired.tokens, fired).flatten().tolist())
