"""cif.py against what does not share its code: a hand-worked example, a dense float64 matrix of
overlaps, its own loop, finite differences, and the PyPI package torch-cif."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_cif import cif_function

import cif as cif_module
from cif import MAX_TOKENS_PER_FRAME, Fired, cif, cif_loop, expand

# Eighths make running totals land exactly on token ends; free floats do not. Zeros, and α > 1 that
# fire several tokens in a frame, occur.
weights = st.one_of(
    st.integers(0, 24).map(lambda n: n / 8),
    st.floats(2**-10, 3, width=32),
    st.just(0.0),
    st.just(1.0),
)


@st.composite
def cases(draw):
    """x (B, S, 3), alpha (B, S), lengths (B,), and keywords of cif."""
    B = draw(st.integers(1, 3))
    S = draw(st.integers(1, 12))
    row = st.lists(weights, min_size=S, max_size=S)
    alpha = torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))
    lengths = torch.tensor(draw(st.lists(st.integers(1, S), min_size=B, max_size=B)))
    keywords = {
        "threshold": draw(st.sampled_from([0.5, 0.7, 1.0, 1.25, 1.5])),
        "tail_threshold": draw(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])),
    }
    valid = torch.arange(S) < lengths[:, None]
    can_have_targets = bool(((alpha * valid).sum(1) > 1e-3).all())
    if draw(st.booleans()) and can_have_targets:
        targets = draw(st.lists(st.integers(1, 8), min_size=B, max_size=B))
        keywords["target_lengths"] = torch.tensor(targets)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.rand(B, S, 3, generator=generator) * 2 - 1
    return x, alpha, lengths, keywords


def five_frames():
    """The example at the bottom of cif.py."""
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    alpha = torch.tensor([[0.5, 0.75, 0.5, 0.25, 0.75]])
    return x, alpha


def dense(x, alpha, threshold, tail_threshold, target):
    """One utterance by a dense matrix: how much of each frame's stretch lies in each token's.

    Returns tokens (T, C), fire times (T,), and each token's share of each frame's α, (S, T).
    """
    x = x.double().numpy()
    alpha = alpha.double().numpy()
    if target is not None:
        alpha = alpha * (target * threshold / alpha.sum())
    ends = alpha.cumsum()
    full = int(np.floor(ends[-1] / threshold + 1e-6))
    rest = ends[-1] - full * threshold
    tail_fires = (
        tail_threshold is not None
        and rest >= (tail_threshold - 1e-6) * threshold
        and rest > 1e-6 * threshold
    )
    token_ends = threshold * np.arange(1, full + 1 + tail_fires)
    begins = np.maximum((ends - alpha)[:, None], token_ends - threshold)
    width = (np.minimum(ends[:, None], token_ends) - begins).clip(min=0)  # (S, T)
    tokens = width.T @ x
    times = []
    for end in token_ends[:full]:
        s = int(np.argmax(ends >= end - 1e-6 * threshold))
        times.append(s + 1 - (ends[s] - end) / alpha[s])
    if tail_fires:
        tokens[-1] *= threshold / rest
        times.append(len(alpha))
    share = width / np.where(alpha > 0, alpha, 1)[:, None]
    return tokens, np.array(times), share


@given(cases())
def test_matches_dense_float64_with_nan_in_the_padding(case):
    x, alpha, lengths, keywords = case
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    x_nan = x.masked_fill(padding[:, :, None], torch.nan)
    alpha_nan = alpha.masked_fill(padding, torch.nan)
    fired = cif(x_nan, alpha_nan, lengths, **keywords)
    back = expand(fired.tokens, fired)
    targets = keywords.get("target_lengths")
    for b, n in enumerate(lengths):
        target = None if targets is None else targets[b].item()
        tokens, times, share = dense(
            x[b, :n], alpha[b, :n], keywords["threshold"], keywords["tail_threshold"], target
        )
        T = len(tokens)
        assert fired.lengths[b] == T
        if target is not None:
            assert T == target
        assert np.abs(fired.tokens[b, :T].numpy() - tokens).max(initial=0) <= 1e-5
        assert np.allclose(fired.fire_times[b, :T], times, rtol=0, atol=1e-4 * len(alpha))
        assert not fired.tokens[b, T:].any()
        assert not fired.fire_times[b, T:].any()
        expected = share @ fired.tokens[b, :T].double().numpy()
        assert np.abs(back[b, :n].numpy() - expected).max(initial=0) <= 1e-5
        assert not back[b, n:].any()


def outcome(function, x, alpha, lengths, keywords):
    """Everything that cif and cif_loop must agree on; gradients are None where nothing fired."""
    leaves = (x.double().requires_grad_(), alpha.double().requires_grad_())
    fired = function(*leaves, lengths, **keywords)
    back = expand(fired.tokens, fired)
    gradients = (None, None)
    if fired.tokens.numel() > 0:
        factors = torch.linspace(1, 2, fired.tokens.numel()).view_as(fired.tokens)
        loss = (fired.tokens * factors).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return fired.tokens, fired.lengths, fired.fire_times, back, *gradients


@given(cases())
def test_loop_and_vectorised_agree_in_values_and_gradients(case):
    vectorised = outcome(cif, *case)
    loop = outcome(cif_loop, *case)
    for ours, expected in zip(vectorised, loop, strict=True):
        if expected is None:
            assert ours is None or not ours.any()
        else:
            # Fire times are float32; a small tail is scaled up, and its rounding errors with it.
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@given(cases())
def test_mass_is_kept(case):
    """A full token has mass β. A tail that fires holds the rest, and then no mass is lost."""
    x, alpha, lengths, keywords = case
    fired = cif(x, alpha, lengths, **keywords)
    threshold = keywords["threshold"]
    T = fired.tokens.shape[1]
    token = fired.token.clamp(max=T)
    per_token = fired.width.new_zeros(len(x), T + 1).scatter_add_(1, token, fired.width)
    per_frame = torch.zeros_like(fired.alpha).scatter_add_(1, fired.frame, fired.width)
    for b in range(len(x)):
        total = fired.alpha[b].sum().item()
        full = int(total / threshold + 1e-6)
        # One that fired by rounding may lack a millionth, which the next one has more.
        assert per_token[b, :full].tolist() == pytest.approx([threshold] * full, rel=2e-6)
        if fired.lengths[b] > full:
            rest = total - full * threshold
            assert per_token[b, full].item() == pytest.approx(rest, abs=1e-8)
            assert torch.allclose(per_frame[b], fired.alpha[b], atol=1e-8)


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_example_by_hand(function):
    x, alpha = five_frames()
    fired = function(x, alpha)
    by_hand = [0.5 * 1 + 0.5 * 2, 0.25 * 2 + 0.5 * 3 + 0.25 * 4, 5.0]
    assert fired.tokens.flatten().tolist() == by_hand
    assert torch.allclose(fired.fire_times, torch.tensor([[1 + 0.5 / 0.75, 4.0, 5.0]]))
    assert expand(fired.tokens, fired).flatten().tolist() == pytest.approx([1.5, 2, 3, 3, 5])


def test_pieces_by_hand():
    """The table in _merge_rulers: p = frame + token in each row."""
    fired = cif(*five_frames())
    assert fired.frame.tolist() == [[0, 1, 1, 2, 3, 3, 4]]
    assert fired.token.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert fired.width.tolist() == [[0.5, 0.5, 0.25, 0.5, 0.25, 0.0, 0.75]]
    assert torch.equal(fired.frame + fired.token, torch.arange(7)[None])


@pytest.mark.parametrize("function", [cif, cif_loop])
@pytest.mark.parametrize("tail_threshold", [None, 0.8])
def test_a_small_tail_is_dropped(function, tail_threshold):
    fired = function(*five_frames(), tail_threshold=tail_threshold)
    assert fired.lengths.tolist() == [2]
    assert expand(fired.tokens, fired).flatten().tolist() == pytest.approx([1.5, 2, 3, 3, 0])


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_several_tokens_in_one_frame(function):
    """α = 2.5: two tokens fire inside the frame, and the half that is left is the tail."""
    fired = function(torch.ones(1, 1, 1), torch.tensor([[2.5]]))
    assert fired.fire_times.tolist() == [[pytest.approx(0.4), pytest.approx(0.8), 1]]


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_rounding_neither_delays_nor_adds_a_token(function):
    """Ten weights of 0.1 add up to 0.9999999999999999 in float64: one token, at the tenth frame.
    Thirty add up to a little over 3, which is no tail."""
    tenths = torch.full((1, 30), 0.1, dtype=torch.float64)
    x = torch.ones(1, 30, 1)
    fired = function(x[:, :10], tenths[:, :10], tail_threshold=None)
    assert fired.lengths.tolist() == [1]
    fired = function(x, tenths, tail_threshold=0.0)
    assert fired.lengths.tolist() == [3]
    assert fired.fire_times.tolist() == [[pytest.approx(n, abs=1e-5) for n in (10, 20, 30)]]


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_a_token_that_fires_by_rounding_ends_with_its_frame(function):
    """The second frame fires the first token, though the total is half a billionth short of 1: more
    than half of the frame's own weight."""
    alpha = torch.tensor([[0.999999 - 5e-10, 1e-9, 0.6, 0.6, 0.8]], dtype=torch.float64)
    x = torch.arange(1.0, 6.0)[None, :, None]
    fired = function(x, alpha)
    assert fired.fire_times.tolist() == [[pytest.approx(t, abs=1e-4) for t in (2, 11 / 3, 5)]]
    back = expand(fired.tokens, fired).flatten().tolist()
    first, second, third = fired.tokens.flatten().tolist()
    expected = [first, first, second, (second * 0.4 + third * 0.2) / 0.6, third]
    assert back == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tiny", [1e-8, 2e-15])
@pytest.mark.parametrize("function", [cif, cif_loop])
def test_no_frame_is_more_than_whole(function, tiny):
    """Where weights are as small as rounding errors, shares are still from 0 to 1."""
    alpha = torch.full((1, 350), tiny)
    alpha[:, :50] = 0.37
    for keywords in ({}, {"target_lengths": torch.tensor([18])}):
        fired = function(torch.ones(1, 350, 1), alpha, **keywords)
        coverage = expand(torch.ones_like(fired.tokens), fired)
        assert 0 <= coverage.min() and coverage.max() <= 1 + 1e-6
        assert fired.fire_times.max() <= 350


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_a_long_sum_neither_delays_nor_adds_a_token(function):
    """What a sum of minutes lacks is more than what one of ten frames does."""

    def counted(frames, weight, dtype=torch.float64, **keywords):
        alpha = torch.full((1, frames), weight, dtype=dtype)
        return function(torch.ones(1, frames, 1), alpha, **keywords).lengths.tolist()

    assert counted(13_530, 0.3, tail_threshold=0.0) == [4059]
    target = {"target_lengths": [6265]}
    assert counted(8_950, 0.7, torch.float32, tail_threshold=None, **target) == [6265]
    assert counted(9_000, 0.85, torch.float32, tail_threshold=0.0, target_lengths=[7650]) == [7650]

    # The last of 6,265 tokens fires before silence begins, not after it.
    alpha = torch.full((1, 9_050), 0.7, dtype=torch.float64)
    alpha[0, 8_950:9_049] = 0
    times = function(torch.ones(1, 9_050, 1), alpha).fire_times
    assert times[0, 6_264].item() == pytest.approx(8_950, abs=0.01)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"threshold": 0.7, "tail_threshold": 0.0},
        {"target_lengths": torch.tensor([3, 2])},
    ],
)
def test_gradients_against_finite_differences(keywords):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    alpha = (torch.rand(2, 6, dtype=torch.float64) * 1.5 + 0.05).requires_grad_()
    lengths = torch.tensor([6, 4])

    def there(x, alpha):
        return cif(x, alpha, lengths, **keywords).tokens

    def there_and_back(x, alpha):
        fired = cif(x, alpha, lengths, **keywords)
        return expand(fired.tokens, fired)

    assert torch.autograd.gradcheck(there, (x, alpha))
    assert torch.autograd.gradcheck(there_and_back, (x, alpha))


def test_padding_gets_no_gradient_and_no_nan():
    x = torch.full((1, 5, 2), torch.nan)
    alpha = torch.full((1, 5), torch.nan)
    x[:, :3] = 1.0
    alpha[:, :3] = 0.75
    x.requires_grad_()
    alpha.requires_grad_()
    cif(x, alpha, torch.tensor([3])).tokens.sum().backward()
    for gradient in (x.grad, alpha.grad):
        assert gradient.isfinite().all()
        assert not gradient[:, 3:].any()


@pytest.mark.parametrize("with_targets", [False, True])
def test_agrees_with_torch_cif(with_targets):
    """Within torch-cif's own accuracy: float32 sums, and 1e-4 added to the target mass."""
    torch.manual_seed(0)
    x = torch.randn(4, 60, 8)
    alpha = torch.rand(4, 60) * 0.9 + 0.05
    lengths = torch.tensor([60, 47, 33, 12])
    padding = torch.arange(60) >= lengths[:, None]
    targets = torch.tensor([20, 11, 9, 3]) if with_targets else None
    theirs = cif_function(x, alpha, padding_mask=padding, target_lengths=targets)
    ours = cif(x, alpha, lengths, target_lengths=targets)
    assert ours.lengths.tolist() == theirs["cif_lengths"][0].tolist()
    for b, n in enumerate(ours.lengths):
        expected = theirs["cif_out"][0][b, :n]
        torch.testing.assert_close(ours.tokens[b, :n], expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 8)
    alpha = torch.rand(2, 40) * 0.5
    project = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=dtype):
        projected = project(x)
        fired = cif(projected, alpha)
        assert projected.dtype == fired.tokens.dtype == dtype
        fired.tokens.float().sum().backward()
        assert expand(fired.tokens, fired).dtype == dtype
    assert project.weight.grad.isfinite().all()
    exact = cif(x, alpha).tokens
    torch.testing.assert_close(cif(x.to(dtype), alpha).tokens.float(), exact, rtol=0, atol=0.05)


def test_alpha_of_one_is_the_identity():
    x = torch.randn(2, 7, 4)
    fired = cif(x, torch.ones(2, 7), torch.tensor([7, 3]))
    assert torch.equal(fired.tokens[0], x[0])
    assert torch.equal(expand(fired.tokens, fired)[0], x[0])
    assert fired.lengths.tolist() == [7, 3]
    assert fired.fire_times[1].tolist() == [1, 2, 3] + 4 * [0]


def test_expand_reads_no_token_past_an_utterances_own():
    """A Transformer leaves NaN where all of a row is masked."""
    fired = cif(torch.randn(3, 8, 2), torch.tensor([[0.5], [0.3], [0.01]]).expand(3, 8))
    assert fired.lengths.tolist() == [4, 2, 0]
    expected = expand(fired.tokens, fired)
    tokens = fired.tokens.clone()
    for row, n in zip(tokens, fired.lengths):
        row[n:] = torch.nan
    assert torch.equal(expand(tokens, fired), expected)


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_nothing_fires(function):
    fired = function(torch.ones(2, 3, 4), torch.zeros(2, 3))
    assert fired.tokens.shape == (2, 0, 4)
    assert fired.lengths.tolist() == [0, 0]
    assert not expand(fired.tokens, fired).any()


def test_types_and_shapes_are_those_that_fired_promises():
    """The comments in Fired, for both functions. The lists of pieces may differ in length."""
    x = torch.ones(2, 4, 3, dtype=torch.float16)
    alpha = torch.full((2, 4), 0.7)
    wide, integer = torch.float64, torch.int64
    types = Fired(torch.float16, integer, torch.float32, integer, integer, wide, wide)
    for function in (cif, cif_loop):
        fired = function(x, alpha, torch.tensor([4, 2]))
        assert tuple(value.dtype for value in fired) == types
        assert fired.tokens.shape == (2, 3, 3)
        assert fired.lengths.shape == (2,)
        assert fired.fire_times.shape == (2, 3)
        assert fired.frame.shape == fired.token.shape == fired.width.shape
        assert fired.alpha.shape == (2, 4)
        for ordered in (fired.frame, fired.token):
            assert (ordered.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_too_many_tokens_are_refused(function):
    """Too many is a mean over the valid frames of one utterance, of the α that are integrated."""
    x = torch.ones(2, 4, 3)
    lengths = torch.tensor([4, 2])
    most = MAX_TOKENS_PER_FRAME
    alpha = torch.tensor([[most, most, most, most], [2 * most, 0, 1e30, 1e30]])
    assert function(x, alpha, lengths).lengths.tolist() == [4 * most, 2 * most]
    with pytest.raises(ValueError, match=f"alpha asks for {most + 1} tokens a frame in one"):
        function(x, alpha + torch.tensor([[0], [1]]), lengths)
    with pytest.raises(ValueError, match=f"asks for {2 * most} tokens a frame"):
        function(x, alpha, lengths, threshold=0.5)

    targets = torch.tensor([3, 2])  # whatever α was before
    assert function(x, alpha * 1e6, lengths, target_lengths=targets).lengths.tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"asks for 5e\+08 tokens a frame"):
        function(x, alpha, lengths, target_lengths=torch.tensor([3, 10**9]))


def test_imports_torch_alone():
    """cif.py is copied alone into other projects."""
    modules = set()
    for node in ast.walk(ast.parse(Path(cif_module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
    assert modules == {"torch", "typing"}
