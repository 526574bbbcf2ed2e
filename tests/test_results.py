"""results.py on points made here, whose tables can be worked out by hand; and the committed tables are those of the committed points."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from extras import results

REPO = Path(__file__).parent.parent


def point(folder, model, task, test, period, seed=0, features="encoder", **config):
    metric = {"ctc": "CER", "seq2seq": "WER", "pool": "mAP"}[task]
    (folder / model).mkdir(exist_ok=True)
    content = {
        "config": {"task": task, "features": features, "seed": seed, **config},
        "metric": metric,
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
    (folder / model / f"{len(list(folder.glob('*/*')))}.json").write_text(json.dumps(content))


def test_tables_by_hand(tmp_path, monkeypatch, capsys):
    for task in results.TASKS:
        for lam, period, test in ((0.0, 20, 40.0), (1.0, 40, 50.0)):
            for seed in (0, 1):
                point(tmp_path, "ofa", task, test + seed, period, seed, lam=lam)
        for seed in (0, 1):
            point(tmp_path, "average2", task, 44.0 + seed, 30, seed, lam=0.0)
            point(tmp_path, "adaptive", task, 41.0 + seed, 27, seed, start=0.1, price=0.0)
        point(tmp_path, "baselines", task, 70.0, 20, features="logmel", lam=0.0)
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path)])
    results.main()
    text = (tmp_path / "results.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| once-for-all | 0.0 | 20.0 | 0.100 | 40.5 ± 0.7 | 2 | 2 | 10 % |" in text
    # Between 40.5 at 20 ms and 50.5 at 40 ms lies 45.5 at 30 ms: one worse than the peer's 44.5 as an error rate, one better as mAP.
    assert "| average of 2, 30 ms | -1.0 ± 1.0 | -1.0 ± 1.0 | +1.0 ± 1.0 |" in text
    assert (
        "| characters (CTC) | 0.1 | defaults | 2 | 0.70 ± 0.00 | 27 | 41.5 ± 0.7 | 40.5 ± 0.7 at 0 | -1.0 | 0.5 | 1.0 |"
        in text
    )
    assert (
        "| concepts (pooling) | 0.1 | defaults | 2 | 0.70 ± 0.00 | 27 | 41.5 ± 0.7 | 50.5 ± 0.7 at 1 | -9.0 | 0.5 | 1.0 |"
        in text
    )
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("tradeoff.png", "lambda.png"))


def test_other_configurations_are_not_averaged(tmp_path):
    point(tmp_path, "ofa", "pool", 40.0, 20, seed=0, lam=0.0, lr=1)
    point(tmp_path, "ofa", "pool", 41.0, 20, seed=1, lam=0.0, lr=2)
    with pytest.raises(ValueError, match=r"1.json is of another configuration .*lr differ"):
        results.load_points(tmp_path)


def test_committed_tables_are_those_of_the_committed_points(tmp_path, monkeypatch):
    shutil.copytree(REPO / "results", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path / "results")])
    results.main()
    assert (tmp_path / "results/results.md").read_text() == (
        REPO / "results/results.md"
    ).read_text(), "run `python results.py`"
