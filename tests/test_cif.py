"""cif.py against things that do not share its code: a hand-worked example, a dense float64 overlap matrix,
its own loop, finite differences, and the PyPI package torch-cif."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_cif import cif_function

import cif as cif_module
from cif import MAX_TOKENS_PER_FRAME, cif, cif_loop, expand

# Eighths make running totals land exactly on token ends; free floats do not; zeros and α > 1 occur.
weights = st.one_of(
    st.integers(0, 24).map(lambda n: n / 8),
    st.floats(2**-10, 3, width=32),
    st.just(0.0),
    st.just(1.0),
)


@st.composite
def cases(draw):
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    alpha = torch.tensor(
        draw(st.lists(st.lists(weights, min_size=S, max_size=S), min_size=B, max_size=B))
    )
    lengths = torch.tensor(draw(st.lists(st.integers(1, S), min_size=B, max_size=B)))
    keywords = dict(
        threshold=draw(st.sampled_from([0.5, 0.7, 1.0, 1.25, 1.5])),
        tail_threshold=draw(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])),
    )
    valid = torch.arange(S) < lengths[:, None]
    if draw(st.booleans()) and bool(((alpha * valid).sum(1) > 1e-3).all()):
        keywords["target_lengths"] = torch.tensor(
            draw(st.lists(st.integers(1, 8), min_size=B, max_size=B))
        )
    x = (
        torch.rand(B, S, 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 2
        - 1
    )
    return x, alpha, lengths, keywords


def overlaps(x, alpha, beta, tail_threshold, target):
    """One utterance by the definition as a dense matrix: how much of each frame's stretch lies in each token's."""
    x, alpha = x.double().numpy(), alpha.double().numpy()
    if target is not None:
        alpha = alpha * (target * beta / alpha.sum())
    ends = alpha.cumsum()
    full = int(np.floor(ends[-1] / beta + 1e-9))
    rest = ends[-1] - full * beta
    tail = (
        tail_threshold is not None and rest >= (tail_threshold - 1e-9) * beta and rest > 1e-9 * beta
    )
    token_ends = beta * np.arange(1, full + 1 + tail)
    width = np.minimum(ends[:, None], token_ends) - np.maximum(
        (ends - alpha)[:, None], token_ends - beta
    )
    width = width.clip(min=0)
    tokens = width.T @ x
    times = []
    for end in token_ends[:full]:
        s = int(np.argmax(ends >= end - 1e-9 * beta))
        times.append(s + 1 - (ends[s] - end) / alpha[s])
    if tail:
        tokens[-1] *= beta / rest
        times.append(len(alpha))
    share = width / np.where(alpha > 0, alpha, 1)[:, None]
    return tokens, np.array(times), share


@given(cases())
def test_matches_dense_float64_with_nan_in_the_padding(case):
    x, alpha, lengths, keywords = case
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    fired = cif(
        x.masked_fill(padding[:, :, None], torch.nan),
        alpha.masked_fill(padding, torch.nan),
        lengths,
        **keywords,
    )
    targets = keywords.get("target_lengths")
    back = expand(fired.tokens, fired)
    for b, n in enumerate(lengths):
        target = None if targets is None else targets[b].item()
        tokens, times, share = overlaps(
            x[b, :n], alpha[b, :n], keywords["threshold"], keywords["tail_threshold"], target
        )
        T = len(tokens)
        assert fired.lengths[b] == T and (target is None or T == target)
        assert np.abs(fired.tokens[b, :T].numpy() - tokens).max(initial=0) <= 1e-5
        assert np.allclose(fired.fire_times[b, :T], times, rtol=0, atol=1e-4 * len(alpha))
        assert not fired.tokens[b, T:].any() and not fired.fire_times[b, T:].any()
        expected = share @ fired.tokens[b, :T].double().numpy()
        assert np.abs(back[b, :n].numpy() - expected).max(initial=0) <= 1e-5
        assert not back[b, n:].any()


@given(cases())
def test_loop_and_vectorised_agree_in_values_and_gradients(case):
    x, alpha, lengths, keywords = case
    results = []
    for function in (cif, cif_loop):
        leaves = x.double().requires_grad_(), alpha.double().requires_grad_()
        fired = function(*leaves, lengths, **keywords)
        back = expand(fired.tokens, fired)
        loss = (
            fired.tokens * torch.linspace(1, 2, fired.tokens.numel()).view_as(fired.tokens)
        ).sum()
        gradients = (
            torch.autograd.grad(loss, leaves, allow_unused=True)
            if fired.tokens.numel()
            else (None, None)
        )
        results.append((fired.tokens, fired.lengths, fired.fire_times, back, *gradients))
    for vectorised, loop in zip(*results):
        if loop is None:
            assert vectorised is None or not vectorised.any()
        else:
            # Fire times are float32; a small tail is scaled up, and its rounding errors with it.
            torch.testing.assert_close(vectorised, loop, rtol=1e-6, atol=1e-6)


@given(cases())
def test_mass_is_kept(case):
    x, alpha, lengths, keywords = case
    fired = cif(x, alpha, lengths, **keywords)
    beta, T = keywords["threshold"], fired.tokens.shape[1]
    per_token = fired.width.new_zeros(len(x), T + 1).scatter_add_(
        1, fired.token.clamp(max=T), fired.width
    )
    per_frame = torch.zeros_like(fired.alpha).scatter_add_(1, fired.frame, fired.width)
    for b in range(len(x)):
        total = fired.alpha[b].sum().item()
        full = int(total / beta + 1e-9)
        assert torch.allclose(
            per_token[b, :full], torch.tensor(beta, dtype=torch.float64), atol=1e-8
        )
        if fired.lengths[b] > full:  # a tail that fires holds the rest, and no mass is lost
            assert torch.allclose(
                per_token[b, full],
                torch.tensor(total - full * beta, dtype=torch.float64),
                atol=1e-8,
            )
            assert torch.allclose(per_frame[b], fired.alpha[b], atol=1e-8)


def test_example_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    alpha = torch.tensor([[0.5, 0.75, 0.5, 0.25, 0.75]])
    for function in (cif, cif_loop):
        fired = function(x, alpha)
        assert fired.tokens.flatten().tolist() == [
            0.5 * 1 + 0.5 * 2,
            0.25 * 2 + 0.5 * 3 + 0.25 * 4,
            5.0,
        ]
        assert torch.allclose(fired.fire_times, torch.tensor([[1 + 0.5 / 0.75, 4.0, 5.0]]))
        assert function(x, alpha, tail_threshold=None).lengths.tolist() == [2]
        assert function(x, alpha, tail_threshold=0.8).lengths.tolist() == [2]
        # α = 2.5 in one frame: two tokens fire inside it and its half is the tail.
        assert function(x[:, :1], torch.tensor([[2.5]])).fire_times.tolist() == [
            [pytest.approx(0.4), pytest.approx(0.8), 1]
        ]


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    alpha = (torch.rand(2, 6, dtype=torch.float64) * 1.5 + 0.05).requires_grad_()
    lengths = torch.tensor([6, 4])
    for keywords in (
        {},
        {"threshold": 0.7, "tail_threshold": 0.0},
        {"target_lengths": torch.tensor([3, 2])},
    ):
        assert torch.autograd.gradcheck(
            lambda x, a: cif(x, a, lengths, **keywords).tokens, (x, alpha)
        )

        def there_and_back(x, a):
            fired = cif(x, a, lengths, **keywords)
            return expand(fired.tokens, fired)

        assert torch.autograd.gradcheck(there_and_back, (x, alpha))


def test_padding_gets_no_gradient_and_no_nan():
    x = torch.full((1, 5, 2), torch.nan)
    alpha = torch.full((1, 5), torch.nan)
    x[:, :3], alpha[:, :3] = 1.0, 0.75
    x.requires_grad_(), alpha.requires_grad_()
    cif(x, alpha, torch.tensor([3])).tokens.sum().backward()
    assert x.grad.isfinite().all() and alpha.grad.isfinite().all()
    assert not x.grad[:, 3:].any() and not alpha.grad[:, 3:].any()


@pytest.mark.parametrize("with_targets", [False, True])
def test_agrees_with_torch_cif(with_targets):
    """Within torch-cif's own accuracy: float32 sums, and an eps of 1e-4 added to the target mass."""
    torch.manual_seed(0)
    x, alpha = torch.randn(4, 60, 8), torch.rand(4, 60) * 0.9 + 0.05
    lengths = torch.tensor([60, 47, 33, 12])
    targets = torch.tensor([20, 11, 9, 3]) if with_targets else None
    theirs = cif_function(
        x, alpha, padding_mask=torch.arange(60) >= lengths[:, None], target_lengths=targets
    )
    ours = cif(x, alpha, lengths, target_lengths=targets)
    assert ours.lengths.tolist() == theirs["cif_lengths"][0].tolist()
    for b, n in enumerate(ours.lengths):
        torch.testing.assert_close(
            ours.tokens[b, :n], theirs["cif_out"][0][b, :n], rtol=0, atol=5e-4
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    x, alpha, project = torch.randn(2, 40, 8), torch.rand(2, 40) * 0.5, torch.nn.Linear(8, 8)
    exact = cif(x, alpha).tokens
    with torch.autocast("cpu", dtype=dtype):
        low = project(x)
        fired = cif(low, alpha)
        assert low.dtype == fired.tokens.dtype == dtype
        fired.tokens.float().sum().backward()
        assert expand(fired.tokens, fired).dtype == dtype
    assert project.weight.grad.isfinite().all()
    torch.testing.assert_close(cif(x.to(dtype), alpha).tokens.float(), exact, rtol=0, atol=0.05)


def test_alpha_of_one_is_the_identity():
    x = torch.randn(2, 7, 4)
    fired = cif(x, torch.ones(2, 7), torch.tensor([7, 3]))
    assert torch.equal(fired.tokens[0], x[0]) and torch.equal(expand(fired.tokens, fired)[0], x[0])
    assert fired.lengths.tolist() == [7, 3] and fired.fire_times[1].tolist() == [
        1,
        2,
        3,
        0,
        0,
        0,
        0,
    ]


def test_nothing_fires():
    fired = cif(torch.ones(2, 3, 4), torch.zeros(2, 3))
    assert fired.tokens.shape == (2, 0, 4) and fired.lengths.tolist() == [0, 0]
    assert not expand(fired.tokens, fired).any()


@pytest.mark.parametrize("function", [cif, cif_loop])
def test_too_many_tokens_are_refused(function):
    """Too many is a mean over the valid frames of one utterance, of the α that are integrated."""
    x, lengths = torch.ones(2, 4, 3), torch.tensor([4, 2])
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
    tree = ast.parse(Path(cif_module.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {
        name
        for n in imports
        for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
    }
    assert {m.split(".")[0] for m in modules} == {"torch", "typing"}
