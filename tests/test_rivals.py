"""rivals.py against the encoder they are made of, average pooling, and merges by hand."""

from dataclasses import replace

import pytest
import torch

from ofa_encoder import PRESETS, OFAEncoder, lam_from_period
from parts.data import pad
from parts.rivals import RIVALS, Rival


def encoder(compression):
    torch.manual_seed(0)
    return OFAEncoder(replace(PRESETS["tiny"], compression=compression)).eval()


@pytest.fixture(scope="module")
def prompts(asterisk):
    return pad([asterisk[i] for i in (0, 700, 1300)])


@torch.no_grad()
@pytest.mark.parametrize("by", RIVALS)
def test_at_lam_0_nothing_is_merged(prompts, by):
    expected = encoder("none")(*prompts)
    found = Rival(encoder("none"), by).eval()(*prompts, lam=0.0)
    assert torch.equal(found.lengths, expected.lengths)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_average_of_two_is_average_pooling(prompts):
    rival = Rival(encoder("none"), "average").eval()
    expected = encoder("average2")(*prompts)
    found = rival(*prompts, lam=lam_from_period(40, rival.mean_alpha.item()))
    assert torch.equal(found.lengths, expected.lengths)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by", RIVALS)
@pytest.mark.parametrize("lam", [0.3, 1.0, 1.6])
def test_both_have_the_rate_of_lam(prompts, by, lam):
    rival = Rival(encoder("none"), by).eval()
    out = rival(*prompts, lam=lam)
    expected = 20 / (1 - lam + 0.22 * lam if lam < 1 else (2 - lam) * 0.22)
    assert out.frame_period() == pytest.approx(expected, rel=0.1)  # whole tokens


@torch.no_grad()
@pytest.mark.parametrize("by", RIVALS)
@pytest.mark.parametrize("samples", [400, 900])
def test_the_shortest_utterances_have_a_token(by, samples):
    rival = Rival(encoder("none"), by).eval()
    assert rival(torch.randn(1, samples), lam=1.9).lengths.item() == 1


def test_neighbours_that_are_alike_are_merged():
    """Two by two, whatever their length; padding is ignored."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    x = torch.stack([torch.stack([a, 3 * a, b, -b, -2 * b, b]), torch.stack([a, b, b, a, a, a])])
    rival = Rival(encoder("none"), "merge")
    ends = rival.ends_by_likeness(x, torch.tensor([6, 3]), torch.tensor(4 / 6))
    assert ends.int().tolist() == [[0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 0, 0]]


def test_an_encoder_that_compresses_is_refused():
    with pytest.raises(ValueError, match="--compression none"):
        Rival(encoder("average2"), "merge")
