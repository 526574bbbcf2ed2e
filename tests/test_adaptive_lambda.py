"""adaptive_lambda.py on real speech: λ has the right slope, rests, pays; points are kept."""

import json
import sys
from pathlib import Path

import pytest
import torch

import adaptive_lambda
from adaptive_lambda import LIMIT, LearnedLam
from ofa_encoder import OFAEncoder
from parts.cache import FrameCache
from parts.data import load

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def encoder():
    return OFAEncoder.from_checkpoint(REPO / "checkpoints/ofa-tiny.pt").requires_grad_(False)


@pytest.fixture
def frames(encoder, folder):
    return FrameCache(load(str(folder)).subset(12), encoder, "cpu")


@pytest.fixture(scope="module")
def spoken(folder):
    """A TSV of the forty prompts; the label is whether they are English."""
    sides = ("train", "train", "train", "valid", "test")
    rows = ["path\tlabel\tsplit"]
    for n, path in enumerate(sorted(folder.glob("*.wav"))):
        rows.append(f"{path.name}\t{path.name[:2] == 'en'}\t{sides[n % 5]}")
    (folder / "spoken.tsv").write_text("\n".join(rows) + "\n")
    return folder / "spoken.tsv"


@pytest.fixture
def run(spoken, tmp_path, monkeypatch):
    """run("--lam", "0.5") learns λ in a few epochs and returns {file name: point}."""
    monkeypatch.chdir(tmp_path)
    checkpoint = str(REPO / "checkpoints/ofa-tiny.pt")
    flags = ["--checkpoint", checkpoint, "--task", "pool", "--data", str(spoken), "--out", "out"]
    flags += ["--lam-epochs", "6", "--epochs", "2", "--freeze", "0"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["adaptive_lambda.py", *flags, *more])
        adaptive_lambda.main()
        return {p.name: json.loads(p.read_text()) for p in Path("out").glob("*.json")}

    return run


def loss_at(learned, lam, n):
    """A smooth loss of utterance n at λ, and its number of tokens."""
    with torch.no_grad():
        learned.raw.copy_(torch.logit(torch.tensor(lam / LIMIT)))
    states, lengths = learned([n])
    return (states[:, -1].mean(2) ** 2).sum() + learned.cost, lengths.item()


@pytest.mark.parametrize("start", [0.3, 0.8, 1.4])
def test_gradient_is_the_slope_of_the_loss(encoder, frames, start):
    """Utterance by utterance, where no token is won or lost around λ: there the loss is smooth."""
    step = 2e-3
    compared = 0
    for n in range(12):
        learned = LearnedLam(start, encoder, frames, price=1.0)
        value, tokens = loss_at(learned, start, n)
        value.backward()
        slope = learned.raw.grad.item() / (start * (1 - start / LIMIT))  # dλ/dr = LIMIT σ (1 - σ)
        above, tokens_above = loss_at(learned, start + step, n)
        below, tokens_below = loss_at(learned, start - step, n)
        if tokens_above == tokens == tokens_below:
            expected = (above - below).item() / (2 * step)
            assert slope == pytest.approx(expected, rel=0.05, abs=0.05)
            compared += 1
    assert compared >= 3


def test_lam_rests_while_frozen_then_moves(encoder, frames):
    learned = LearnedLam(0.6, encoder, frames, freeze=1)
    first, _ = learned([0])
    second, _ = learned([0])
    assert not first.requires_grad and second.requires_grad
    assert learned.lam.item() == pytest.approx(0.6, abs=1e-5)
    assert learned.watch()["period_ms"] > 20
    assert [name for name, _ in learned.named_parameters()] == ["raw"]


def test_missing_tokens_are_charged(encoder, frames):
    """With twice as many tokens needed as α′ adds up to, half are missing: λ must go down."""
    _, lengths = LearnedLam(1.2, encoder, frames)([0, 1])
    a, b = lengths.tolist()
    for needed, missing in (([2 * a, 2 * b], 0.5), ([a - 2, b - 2], 0.0), ([2 * a, b - 2], 0.25)):
        learned = LearnedLam(1.2, encoder, frames, needed=needed, guess=3.0)
        learned([0, 1])
        assert learned.cost.item() == pytest.approx(3.0 * missing, abs=0.08)
        if missing:
            learned.cost.backward()
            assert learned.raw.grad > 0  # a step down the gradient lowers λ


def test_a_price_buys_longer_tokens(run):
    (free,) = run("--lam", "0.5").values()
    priced = run("--lam", "0.5", "--price", "30")["pool-price30-from0.5-seed0.json"]
    assert priced["config"]["start"] == 0.5
    assert len(priced["search"]) == 6 and len(priced["history"]) == priced["epochs"] == 2
    assert all(0 < epoch["lam"] < 2 for epoch in priced["search"])
    assert priced["lam"] == pytest.approx(priced["search"][-1]["lam"])
    assert priced["lam"] > free["lam"] + 0.05
    assert priced["search"][-1]["period_ms"] > priced["search"][0]["period_ms"]
    assert priced["frame_period_ms"] > free["frame_period_ms"]


def test_points_are_kept_and_their_command_computes_them_again(run, monkeypatch, capsys):
    flags = ("--lam", "1.1", "--seed", "3", "--epochs", "3")
    (point,) = run(*flags).values()
    run(*flags)
    there = f"is there: test accuracy {point['test']:.1f} % at {point['frame_period_ms']:.1f} ms"
    assert there in capsys.readouterr().out
    script, *again = point["command"].split()[1:]
    monkeypatch.setattr(sys, "argv", [script, *again])
    adaptive_lambda.main()
    found = json.loads(Path("runs/again/pool-price0-from1.1-seed3.json").read_text())
    for what in ("test", "lam", "search", "history"):
        assert found[what] == point[what]
