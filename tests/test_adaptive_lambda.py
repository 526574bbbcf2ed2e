"""adaptive_lambda.py on real speech: λ's gradient by finite differences, its freeze, its price,
the charge for missing tokens, and its points."""

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
def frames(encoder, folder):
    return FrameCache(load(str(folder)).subset(12), encoder, "cpu")


@pytest.fixture(scope="module")
def spoken(folder):
    """A TSV of the forty prompts; the label says whether the prompt is English."""
    splits = ("train", "train", "train", "valid", "test")
    rows = ["path\tlabel\tsplit"]
    for n, path in enumerate(sorted(folder.glob("*.wav"))):
        rows.append(f"{path.name}\t{path.name[:2] == 'en'}\t{splits[n % 5]}")
    (folder / "spoken.tsv").write_text("\n".join(rows) + "\n")
    return folder / "spoken.tsv"


@pytest.fixture
def run(spoken, tmp_path, monkeypatch):
    """run("--lam", "0.5", …) learns λ in tmp_path; returns the points there, by their names."""
    monkeypatch.chdir(tmp_path)
    base = ["adaptive_lambda.py", "--checkpoint", str(REPO / "checkpoints/ofa-tiny.pt")]
    base += ["--task", "pool", "--data", str(spoken), "--out", "out"]
    base += ["--lam-epochs", "6", "--epochs", "2", "--freeze", "0"]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [*base, *flags])
        adaptive_lambda.main()
        return {path.name: json.loads(path.read_text()) for path in Path("out").glob("*.json")}

    return run


@pytest.mark.parametrize("start", [0.3, 0.8, 1.4])
def test_gradient_is_the_slope_of_the_loss(encoder, frames, start):
    """Utterance by utterance, where no token is won or lost between λ - ε and λ + ε: there the loss
    is smooth."""
    eps = 2e-3
    compared = 0

    def loss_at(learner, lam, n):
        with torch.no_grad():
            learner.raw.copy_(torch.logit(torch.tensor(lam / LIMIT)))
        states, lengths = learner([n])
        return (states[:, -1].mean(2) ** 2).sum() + learner.cost, lengths.item()

    for n in range(12):
        learner = LearnedLam(start, encoder, frames, price=1.0)
        loss, tokens = loss_at(learner, start, n)
        loss.backward()
        slope = learner.raw.grad.item() / (start * (1 - start / LIMIT))  # dλ/dr = LIMIT σ (1 - σ)
        above, fewer = loss_at(learner, start + eps, n)
        below, more = loss_at(learner, start - eps, n)
        if tokens == fewer == more:
            expected = (above - below).item() / (2 * eps)
            assert slope == pytest.approx(expected, rel=0.05, abs=0.05)
            compared += 1
    assert compared >= 3


def test_lam_rests_while_frozen_then_moves(encoder, frames):
    learner = LearnedLam(0.6, encoder, frames, freeze=1)
    assert not learner([0])[0].requires_grad
    assert learner([0])[0].requires_grad
    assert learner.lam.item() == pytest.approx(0.6, abs=1e-5)


def test_validation_does_not_count_as_a_step(encoder, frames):
    learner = LearnedLam(0.6, encoder, frames, freeze=1).eval()
    learner([0])
    assert not learner.train()([0])[0].requires_grad


def test_the_history_has_the_frame_period_of_an_epoch(encoder, frames):
    learner = LearnedLam(0.6, encoder, frames)
    for _ in range(2):  # each epoch is counted anew
        used = {}
        for n in (0, 1):
            _, lengths = learner([n])
            used[n] = (frames([n])[1].item(), lengths.item())
        n_frames, n_tokens = (sum(column) for column in zip(*used.values()))
        assert learner.watch()["period_ms"] == pytest.approx(20 * n_frames / n_tokens)


def test_lam_alone_is_trained(encoder, frames):
    learner = LearnedLam(0.6, encoder, frames)
    assert [name for name, _ in learner.named_parameters()] == ["raw"]
    assert not encoder.training and not learner.train().encode.__self__.training


def test_missing_tokens_are_charged(encoder, frames):
    """By hand: with twice as many tokens needed as α′ adds up to, half are missing, and a step down
    the gradient lowers λ."""
    first, second = LearnedLam(1.2, encoder, frames)([0, 1])[1].tolist()
    for needed, expected in (
        ([2 * first, 2 * second], 0.5),
        ([first - 2, second - 2], 0.0),
        ([2 * first, second - 2], 0.25),
    ):
        learner = LearnedLam(1.2, encoder, frames, needed=needed, guess=3.0)
        learner([0, 1])
        assert learner.cost.item() == pytest.approx(3.0 * expected, abs=0.08)
        if expected:
            learner.cost.backward()
            assert learner.raw.grad > 0


def test_a_price_buys_longer_tokens(run):
    (free,) = run("--lam", "0.5").values()
    priced = run("--lam", "0.5", "--price", "30")["pool-price30-from0.5-seed0.json"]
    assert priced["search"][-1]["lam"] > free["search"][-1]["lam"] + 0.05
    assert all(0 < epoch["lam"] < 2 for epoch in priced["search"])
    assert priced["search"][-1]["period_ms"] > priced["search"][0]["period_ms"]
    assert priced["frame_period_ms"] > free["frame_period_ms"]


def test_a_new_head_is_trained_at_the_lam_that_was_learned(run):
    (point,) = run("--lam", "0.5").values()
    assert point["config"]["start"] == 0.5
    assert len(point["search"]) == 6
    assert len(point["history"]) == point["epochs"] == 2
    assert point["lam"] == pytest.approx(point["search"][-1]["lam"])
    assert "lam" not in point["history"][0]


def test_points_have_the_configuration_of_those_in_results(run):
    (point,) = run("--lam", "1.1").values()
    committed = next((REPO / "results/adaptive").glob("pool-*.json"))
    assert point["config"].keys() == json.loads(committed.read_text())["config"].keys()


def test_points_are_kept_and_their_command_computes_them_again(run, monkeypatch, capsys):
    flags = ("--lam", "1.1", "--seed", "3", "--epochs", "3")
    (point,) = run(*flags).values()
    run(*flags)
    there = f"is there: test accuracy {point['test']:.1f} % at {point['frame_period_ms']:.1f} ms"
    assert there in capsys.readouterr().out
    script, *words = point["command"].split()[1:]
    monkeypatch.setattr(sys, "argv", [script, *words])
    adaptive_lambda.main()
    again = json.loads(Path("runs/again/pool-price0-from1.1-seed3.json").read_text())
    for name in ("test", "lam", "search", "history"):
        assert again[name] == point[name]
