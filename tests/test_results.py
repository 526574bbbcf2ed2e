"""results.py on points made here, whose tables can be worked out by hand, and on the committed."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from extras import results

REPO = Path(__file__).parent.parent


def write_point(folder, model, test, period, **config):
    """A point in folder/model, with metric `test` and frame period `period`."""
    config = {"features": "encoder", "seed": 0, **config}
    content = {
        "config": config,
        "metric": results.METRIC_OF[config["task"]],
        "test": test,
        "valid": test,
        "frame_period_ms": period,
        "transformer_gflops_per_s": 2 / period,
        "epochs": 2,
        "best_epoch": 2,
        "train_s": 30.0,
        "infeasible_test": 5,
        "test_utterances": 50,
        "lam": 0.7,
        "search": [{"lam": 0.6, "valid": 9.0}, {"lam": 0.7, "valid": test}],
        "machine": "m",
        "date": "2026-01-01",
    }
    (folder / model).mkdir(exist_ok=True)
    number = len(list(folder.glob("*/*")))
    (folder / model / f"{number}.json").write_text(json.dumps(content))


def make(folder, monkeypatch) -> str:
    """Run results.py on a folder; its page."""
    monkeypatch.setattr(sys, "argv", ["results.py", str(folder)])
    results.main()
    return (folder / "results.md").read_text()


@pytest.fixture
def points(tmp_path):
    """A curve of two λ, a peer, a learned λ with and without a price, and log-mels; two seeds."""
    for task in results.TASKS:
        for seed in (0, 1):
            of_all = {"task": task, "seed": seed}
            write_point(tmp_path, "ofa", 40.0 + seed, 20, lam=0.0, **of_all)
            write_point(tmp_path, "ofa", 50.0 + seed, 40, lam=1.0, **of_all)
            write_point(tmp_path, "average2", 44.0 + seed, 30, lam=0.0, **of_all)
            write_point(tmp_path, "adaptive", 41.0 + seed, 27, start=0.1, price=0.0, **of_all)
        write_point(tmp_path, "adaptive", 43.0, 36, start=0.1, price=3.0, task=task)
        write_point(tmp_path, "baselines", 70.0, 20, features="logmel", lam=0.0, task=task)
    return tmp_path


def test_tables_by_hand(points, monkeypatch, capsys):
    text = make(points, monkeypatch)
    assert text.strip() == capsys.readouterr().out.strip()
    text = re.sub(" +", " ", text)  # without what makes columns line up
    assert "| once-for-all | 0.0 | 20.0 | 0.100 | 40.5 ± 0.7 | 2 | 2 | 10 % |" in text
    # Between 40.5 at 20 ms and 50.5 at 40 ms lies 45.5 at 30 ms, where the peer has 44.5: one worse
    # as an error rate, one better as mAP.
    assert "| average of 2, 30 ms | -1.0 ± 1.0 | -1.0 ± 1.0 | +1.0 ± 1.0 |" in text
    # The best of the grid has the lowest error rate, or the highest mAP.
    learned = "| 0.1 | 0 | 2 | 0.70 ± 0.00 | 27 | 41.5 ± 0.7"
    assert f"| characters (CTC) {learned} | 40.5 ± 0.7 at 0 | -1.0 | 0.5 | 1.0 |" in text
    assert f"| concepts (pooling) {learned} | 50.5 ± 0.7 at 1 | -9.0 | 0.5 | 1.0 |" in text
    assert "| characters (CTC) | 0.1 | 3 | 1 | 0.70 | 36 | 43.0 |" in text


def test_figures(points, monkeypatch):
    make(points, monkeypatch)
    for name in ("tradeoff.png", "lambda.png"):
        assert (points / name).stat().st_size > 10_000


def test_figures_leave_out_what_paid_a_price(points):
    starts = results.select(results.load_points(points), "adaptive", "ctc")
    assert [summary.period for summary in starts.values()] == [27]


def test_other_configurations_are_not_averaged(tmp_path):
    write_point(tmp_path, "ofa", 40.0, 20, task="pool", seed=0, lam=0.0, lr=1)
    write_point(tmp_path, "ofa", 41.0, 20, task="pool", seed=1, lam=0.0, lr=2)
    with pytest.raises(ValueError, match=r"1.json is of another configuration .*lr differ"):
        results.load_points(tmp_path)


def test_committed_tables_are_those_of_the_committed_points(tmp_path, monkeypatch):
    shutil.copytree(REPO / "results", tmp_path / "results")
    text = make(tmp_path / "results", monkeypatch)
    committed = (REPO / "results/results.md").read_text()
    assert text == committed, "run `python -m extras.results`"
