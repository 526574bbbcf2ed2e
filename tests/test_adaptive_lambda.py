"""adaptive_lambda.py on real speech: λ's slope by differences and by autograd, its freeze, its
price, the charge for missing tokens, the search, and the points."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptive_lambda
import finetune
from adaptive_lambda import (
    LIMIT,
    LearnedLam,
    MeasuredLam,
    best_rate,
    errors_of,
    losses_of,
    smooth,
)
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
    base += ["--task", "pool", "--data", str(spoken), "--out", "out", "--epochs", "2"]

    def run(*flags, way="autograd"):
        if way != "search":
            flags = ("--lam-epochs", "6", "--freeze", "0", *flags)
        flags = ("--way", way, *flags)
        monkeypatch.setattr(sys, "argv", [*base, *flags])
        adaptive_lambda.main()
        return {path.name: json.loads(path.read_text()) for path in Path("out").glob("*.json")}

    return run


def learned(start, frames, price=0.0, freeze=0, texts=(), kind=LearnedLam):
    """A λ to learn. texts: for CTC, the text of each utterance."""
    args = Namespace(lam_lr=0.02, freeze=freeze, delta=0.1, symbols_per_token=1)
    task = SimpleNamespace(kind="ctc" if texts else "pool", targets=texts, symbols=range(19))
    return kind(args, task, frames, start, price)


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
        learner = learned(start, frames, price=1.0)
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
    learner = learned(0.6, frames, freeze=1)
    assert not learner([0])[0].requires_grad
    assert learner([0])[0].requires_grad
    assert learner.lam.item() == pytest.approx(0.6, abs=1e-5)


def test_validation_does_not_count_as_a_step(encoder, frames):
    learner = learned(0.6, frames, freeze=1).eval()
    learner([0])
    assert not learner.train()([0])[0].requires_grad


def test_lam_alone_is_trained(encoder, frames):
    learner = learned(0.6, frames)
    assert [name for name, _ in learner.named_parameters()] == ["raw"]
    assert not encoder.training and not learner.train().encode.__self__.training


def test_missing_tokens_are_charged(encoder, frames):
    """By hand: with twice as many tokens needed as α′ adds up to, half are missing, and a step down
    the gradient lowers λ."""
    first, second = learned(1.2, frames)([0, 1])[1].tolist()
    for needed, expected in (
        ([2 * first, 2 * second], 0.5),
        ([first - 2, second - 2], 0.0),
        ([2 * first, second - 2], 0.25),
    ):
        texts = [list(range(n)) for n in needed]  # no symbol twice in a row: no blanks needed
        learner = learned(1.2, frames, texts=texts)
        learner([0, 1])
        uniform = np.log(20)  # of 19 symbols and the blank
        assert learner.cost.item() == pytest.approx(uniform * expected, abs=0.08)
        if expected:
            learner.cost.backward()
            assert learner.raw.grad > 0


def test_what_is_too_short_is_counted_where_slopes_are_measured(frames):
    tokens = learned(1.2, frames)([0, 1])[1].tolist()
    for more, expected in (((0, 0), 0.0), ((1, 0), 0.5), ((1, 9), 1.0)):
        texts = [list(range(n + k)) for n, k in zip(tokens, more)]
        learner = learned(1.2, frames, texts=texts, kind=MeasuredLam).eval()
        learner([0, 1])
        assert learner.cost.item() == pytest.approx(np.log(20) * expected)


class Ruler:
    """A head whose loss is how many tokens there are."""

    def loss(self, states, lengths, targets):
        return lengths.sum().float()

    def eval(self):
        pass

    train = eval


def test_measured_slope_is_that_of_the_number_of_tokens(encoder, frames):
    """Autograd has no slope there at all. By hand: tokens at λ + δ less those at λ - δ."""
    batch = [3, 4, 5]
    lesson = SimpleNamespace(head=Ruler(), targets=[[]] * 12, batches=lambda split: [batch])
    for start in (0.5, 0.03):  # near 0 the step is cut off
        learner = learned(start, frames, kind=MeasuredLam)
        learner.begin(lesson)
        states, lengths = learner.train()([0])
        learner.cost.backward()
        below, above = max(0, start - 0.1), start + 0.1
        tokens = [encoder.encode(*frames(batch), lam).lengths.sum() for lam in (below, above)]
        slope = (tokens[1] - tokens[0]).item() / (above - below)
        assert slope < -50
        dlam = start * (1 - start / LIMIT)  # dλ/dr
        assert learner.raw.grad.item() == pytest.approx(slope * dlam, rel=1e-3)
        assert learner.cost.item() == 0
        assert not states.requires_grad


def test_beside_a_measured_slope_the_head_learns_at_any_lam(encoder, frames):
    """Between λ = 0 and 1.6 the number of tokens falls by more than a factor of nine."""
    learner = learned(0.6, frames, freeze=99, kind=MeasuredLam).train()
    torch.manual_seed(0)
    tokens = [learner([0])[1].item() for _ in range(60)]
    all_frames = frames([0])[1].item()
    assert max(tokens) > 0.8 * all_frames
    assert min(tokens) < 0.2 * all_frames
    assert learner.lam.item() == pytest.approx(0.6, abs=1e-5)


def test_a_measured_lam_rests_while_frozen(encoder, frames):
    learner = learned(0.6, frames, freeze=1, kind=MeasuredLam)
    learner([0])
    assert learner.cost == 0.0


# Search.


def test_smoothing_leaves_a_parabola_as_it_is():
    x = np.arange(40)
    parabola = (x - 17.3) ** 2
    np.testing.assert_allclose(smooth(parabola), parabola, atol=1e-6)
    noise = np.random.default_rng(0).standard_normal(400)
    assert smooth(noise).std() < 0.7


def rows_of(losses):
    """Rows of a curve at forty periods."""
    periods = np.geomspace(20, 220, 40)
    return [
        {"valid_loss": loss, "infeasible_valid": 0.0, "frame_period_ms": period}
        for loss, period in zip(losses, periods)
    ]


def test_the_best_rate_is_the_lowest_point_of_the_curve():
    for lowest in (0, 17, 39):
        losses = (np.arange(40) - lowest) ** 2
        rows = rows_of(losses)
        assert best_rate(rows, losses, 0) is rows[lowest]


@given(st.lists(st.floats(0, 5), min_size=40, max_size=40), st.floats(0, 9), st.floats(0, 9))
def test_dearer_tokens_are_never_shorter(losses, a, b):
    """Whatever the curve is like, and however small the price."""
    rows = rows_of(losses)
    cheap, dear = (best_rate(rows, losses, price)["frame_period_ms"] for price in sorted([a, b]))
    assert cheap <= dear * (1 + 1e-9)


def test_what_is_too_short_costs_as_much_as_an_even_answer():
    rows = rows_of(np.linspace(2, 1, 40))  # zero_infinity: the longer the tokens the better
    for row in rows:
        row["infeasible_valid"] = max(0, row["frame_period_ms"] - 60) / 60
    alone = [row["valid_loss"] for row in rows]
    assert best_rate(rows, alone, 0)["frame_period_ms"] == pytest.approx(220)
    charged = losses_of(rows, SimpleNamespace(symbols=range(19)))
    assert charged[-1] == pytest.approx(1 + np.log(20) * 160 / 60)
    assert 50 < best_rate(rows, charged, 0)["frame_period_ms"] < 80


def test_the_best_metric_may_be_high_or_low():
    rows = rows_of(np.zeros(40))
    for k, row in enumerate(rows):
        row["valid"] = 50 + (k - 12) ** 2 / 10
    assert best_rate(rows, errors_of(rows, "CER"), 0) is rows[12]
    assert best_rate(rows, errors_of(rows, "mAP"), 0) is rows[39]
    # A price is in points: at 12 a token of 42 ms is 0.48 tokens a frame.
    assert best_rate(rows, errors_of(rows, "CER"), 20)["frame_period_ms"] > 45
    for row in rows:
        row["valid"] = 100.0  # an easy task, at whatever rate
    assert best_rate(rows, errors_of(rows, "accuracy"), 0) is rows[-1]


def test_search_uses_one_head_for_all_prices(run, monkeypatch, capsys):
    monkeypatch.setattr("finetune.LAMS_KEPT", 3)
    monkeypatch.setattr("finetune.RATES", 9)
    found = run("--by", "loss", "--price", "0", "0.5", "1000", way="search")
    head = found.pop("pool-any-seed0.json")
    assert len(found) == 3
    chosen = [found[f"pool-search-loss-price{price}-seed0.json"] for price in ("0", "0.5", "1000")]
    periods = [point["frame_period_ms"] for point in chosen]
    assert periods == sorted(periods)
    assert periods[-1] == head["rows"][-1]["frame_period_ms"]
    for point in chosen:
        (row,) = [row for row in head["rows"] if row["lam"] == point["lam"]]
        assert point["test"] == row["test"]
        # Those of the head are at λ = 0.
        assert not {"tokens", "examples", "encode_s"} & point.keys()
        price = point["config"]["price"]
        assert point["command"].startswith("python adaptive_lambda.py ")
        assert ("--price" in point["command"]) == (price != 0)
        assert point["config"] == {
            **head["config"],
            "way": "search",
            "by": "loss",
            "price": point["config"]["price"],
        }
        assert "--by loss" in point["command"]
    # The metric has a curve of its own, and what it is made of was computed with the head.
    Path("out/pool-any-seed0.json").write_text(json.dumps({**head, "machine": "another"}))
    found = run(way="search")
    point = found["pool-search-metric-price0-seed0.json"]
    assert point["machine"] == "another"
    assert point["config"]["by"] == "metric"
    lowest = best_rate(head["rows"], errors_of(head["rows"], head["metric"]), 0)
    assert point["frame_period_ms"] == lowest["frame_period_ms"]
    # The head is there, and finetune.py would have made the same. What is no better than guessing
    # is named, whatever the price.
    Path("out/pool-any-seed0.json").write_text(json.dumps({**head, "guessing": 100.0}))
    capsys.readouterr()
    run("--price", "2", way="search")
    *_, there, searched = capsys.readouterr().out.splitlines()
    assert "pool-any-seed0.json is there" in there
    assert searched.endswith("reach 100.0 %)")
    script, *words = head["command"].split()[1:]
    assert script == "finetune.py"
    monkeypatch.setattr(sys, "argv", [script, *words])
    finetune.main()
    again = json.loads(Path("runs/again/pool-any-seed0.json").read_text())
    assert again["rows"] == head["rows"]
    assert again["config"] == head["config"]


# Points.


def test_a_price_buys_longer_tokens(run):
    (free,) = run("--lam-lr", "0.1", "--lam", "0.5").values()
    priced = run("--lam-lr", "0.1", "--lam", "0.5", "--price", "30")[
        "pool-autograd-price30-from0.5-seed0.json"
    ]
    assert priced["search"][-1]["lam"] > free["search"][-1]["lam"] + 0.05
    assert all(0 < epoch["lam"] < 2 for epoch in priced["search"])
    assert priced["search"][-1]["lam"] > priced["search"][0]["lam"]
    assert priced["frame_period_ms"] > free["frame_period_ms"]


def test_a_new_head_is_trained_at_the_lam_that_was_learned(run):
    (point,) = run("--lam", "0.5").values()
    assert point["config"]["start"] == 0.5
    assert len(point["search"]) == 6
    assert len(point["history"]) == point["epochs"] == 2
    assert point["lam"] == pytest.approx(point["search"][-1]["lam"])
    assert "lam" not in point["history"][0]


def test_lam_is_learned_by_differences(run):
    (point,) = run("--lam", "0.5", way="differences").values()
    lams = [epoch["lam"] for epoch in point["search"]]
    assert len(set(lams)) == 6
    assert all(0 < lam < 2 for lam in lams)


def test_all_points_are_looked_at_before_lam_is_learned(run):
    run("--lam", "0.9")
    with pytest.raises(ValueError, match="from0.9-seed0.json is of another configuration"):
        run("--lam", "0.5", "0.9", "--lr", "0.1")
    assert not Path("out/pool-autograd-price0-from0.5-seed0.json").exists()


def test_points_are_kept_and_their_command_computes_them_again(run, monkeypatch, capsys):
    flags = ("--lam", "1.1", "--seed", "3", "--epochs", "3")
    (point,) = run(*flags).values()
    run(*flags)
    there = f"is there: test accuracy {point['test']:.1f} % at {point['frame_period_ms']:.1f} ms"
    assert there in capsys.readouterr().out
    script, *words = point["command"].split()[1:]
    monkeypatch.setattr(sys, "argv", [script, *words])
    adaptive_lambda.main()
    again = json.loads(Path("runs/again/pool-autograd-price0-from1.1-seed3.json").read_text())
    for name in ("test", "lam", "search", "history"):
        assert again[name] == point[name]
