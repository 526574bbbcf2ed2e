"""adaptive_lambda.py: λ's gradient against finite differences, its freeze, its price, and mistakes; on real speech."""

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


@pytest.fixture(scope="module")
def spoken(folder):
    """A TSV of the forty prompts, with their languages as labels."""
    rows = [
        f"{p.name}\t{p.name[:2] == 'en'}\t{('train', 'train', 'train', 'valid', 'test')[n % 5]}"
        for n, p in enumerate(sorted(folder.glob("*.wav")))
    ]
    (folder / "spoken.tsv").write_text("\n".join(["path\tlabel\tsplit", *rows]) + "\n")
    return folder / "spoken.tsv"


@pytest.fixture
def run(spoken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "adaptive_lambda.py",
                "--checkpoint",
                str(REPO / "checkpoints/ofa-tiny.pt"),
                "--task",
                "pool",
                "--data",
                str(spoken),
                "--lam-epochs",
                "6",
                "--epochs",
                "2",
                "--freeze",
                "0",
                "--out",
                "out",
                *flags,
            ],
        )
        adaptive_lambda.main()
        return {p.name: json.loads(p.read_text()) for p in Path("out").glob("*.json")}

    return run


@pytest.mark.parametrize("start", [0.3, 0.8, 1.4])
def test_gradient_is_the_slope_of_the_loss(encoder, folder, start):
    """Utterance by utterance, where no token is won or lost between λ - ε and λ + ε: there the loss is smooth."""
    eps, compared = 2e-3, 0
    for n in range(12):
        learner = LearnedLam(
            start,
            encoder,
            FrameCache(load(str(folder)).subset(12), encoder, "cpu"),
            freeze=0,
            price=1.0,
        )

        def loss(lam):
            with torch.no_grad():
                learner.raw.copy_(torch.logit(torch.tensor(lam / LIMIT)))
            hidden, lengths = learner([n])
            return (hidden[:, -1].mean(2) ** 2).sum() + learner.cost, lengths.item()

        value, tokens = loss(start)
        value.backward()
        slope = learner.raw.grad.item() / (start * (1 - start / LIMIT))  # dλ/dr = LIMIT σ (1 - σ)
        (up, fewer), (down, more) = loss(start + eps), loss(start - eps)
        if tokens == fewer == more:
            assert slope == pytest.approx((up - down).item() / (2 * eps), rel=0.05, abs=0.05)
            compared += 1
    assert compared >= 3


def test_lam_rests_while_frozen_then_moves(encoder, folder):
    learner = LearnedLam(
        0.6, encoder, FrameCache(load(str(folder)).subset(2), encoder, "cpu"), freeze=1
    )
    assert not learner([0])[0].requires_grad and learner([0])[0].requires_grad
    assert learner.lam.item() == pytest.approx(0.6, abs=1e-5) and learner.watch()["period_ms"] > 20
    assert [name for name, _ in learner.named_parameters()] == ["raw"]


def test_steps_are_taken_around_lam_and_validation_at_it(encoder, folder):
    frames = FrameCache(load(str(folder)).subset(4), encoder, "cpu")
    learner = LearnedLam(0.5, encoder, frames, jitter=0.3)
    fixed = LearnedLam(0.5, encoder, frames)([0, 1, 2, 3])[1].tolist()
    torch.manual_seed(0)
    tokens = [sum(learner([0, 1, 2, 3])[1].tolist()) for _ in range(8)]
    assert min(tokens) < sum(fixed) - 5 and max(tokens) > sum(fixed) + 5
    assert learner.eval()([0, 1, 2, 3])[1].tolist() == fixed


def test_missing_tokens_are_charged(encoder, folder):
    """By hand: with twice as many tokens needed as α′ adds up to, half are missing, and a step down the gradient lowers λ."""
    frames = FrameCache(load(str(folder)).subset(2), encoder, "cpu")
    tokens = LearnedLam(1.2, encoder, frames, freeze=0)([0, 1])[1].tolist()
    for needed, expected in (
        ([2 * n for n in tokens], 0.5),
        ([n - 2 for n in tokens], 0.0),
        ([2 * tokens[0], tokens[1] - 2], 0.25),
    ):
        learner = LearnedLam(1.2, encoder, frames, freeze=0, needed=needed, guess=3.0)
        learner([0, 1])
        assert learner.cost.item() == pytest.approx(3.0 * expected, abs=0.08)
        if expected:
            learner.cost.backward()
            assert learner.raw.grad > 0


def test_a_price_buys_longer_tokens(run):
    free, priced = run("--lam", "0.5"), run("--lam", "0.5", "--price", "30")
    (free,), (priced,) = free.values(), [p for name, p in priced.items() if "price30" in name]
    assert priced["search"][-1]["lam"] > free["search"][-1]["lam"] + 0.05
    assert (
        all(0 < h["lam"] < 2 for h in priced["search"])
        and priced["search"][-1]["period_ms"] > priced["search"][0]["period_ms"]
    )
    assert (
        priced["lam"] == pytest.approx(priced["search"][-1]["lam"])
        and priced["frame_period_ms"] > free["frame_period_ms"]
    )
    assert (
        priced["config"]["start"] == 0.5
        and len(priced["search"]) == 6
        and len(priced["history"]) == priced["epochs"] == 2
    )


def test_points_are_kept_and_their_command_computes_them_again(run, monkeypatch, capsys):
    (point,) = run("--lam", "1.1", "--seed", "3", "--epochs", "3").values()
    run("--lam", "1.1", "--seed", "3", "--epochs", "3")
    there = f"is there: test accuracy {point['test']:.1f} % at {point['frame_period_ms']:.1f} ms"
    assert there in capsys.readouterr().out
    script, *flags = point["command"].split()[1:]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    adaptive_lambda.main()
    again = json.loads(Path("runs/again/pool-price0-jitter0-from1.1-seed3.json").read_text())
    assert (again["test"], again["lam"], again["search"], again["history"]) == (
        point["test"],
        point["lam"],
        point["search"],
        point["history"],
    )
