"""results.py and curves.py on points made here, worked out by hand, and on the committed ones."""

import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from extras import claims, curves, results
from extras.points import METRIC_OF, PEERS, TASKS, load_heads, load_points, mean_and_sd, select

REPO = Path(__file__).parent.parent


def write_point(folder, model, test, period, **config):
    """A point in folder/model, with metric `test` and frame period `period`; returns its path."""
    config = {"features": "encoder", "seed": 0, **config}
    content = {
        "config": config,
        "metric": METRIC_OF[config["task"]],
        "test": test,
        "bootstrap": [test] * 200,
        "valid": test,
        "frame_period_ms": period,
        "transformer_gflops_per_s": 2 / period,
        "epochs": 2,
        "best_epoch": 2,
        "train_s": 30.0,
        "infeasible_test": 5,
        "test_utterances": 50,
        "lam": 0.7,
        "search": [{"lam": 0.6, "valid": 9.0}, {"lam": 0.65}, {"lam": 0.7, "valid": test}],
        "machine": "m",
        "date": "2026-01-01",
    }
    (folder / model).mkdir(exist_ok=True)
    number = len(list(folder.glob("*/*")))
    path = folder / model / f"{number}.json"
    path.write_text(json.dumps(content))
    return path


def write_any(folder, model, tests, features="encoder", **config):
    """A point of a head for all rates, with its metric at 20, 40 and 80 ms."""
    path = write_point(folder, model, tests[0], 20, features=features, lam="any", **config)
    point = json.loads(path.read_text())
    point["config"]["checkpoint_sha1"] = "e"
    point["rows"] = []
    for period, test in zip((20.0, 40.0, 80.0), tests):
        row = {"frame_period_ms": period, "test": test, "transformer_gflops_per_s": 2 / period}
        row["valid"] = test
        point["rows"].append({**row, "lam": period / 100, "bootstrap": [test] * 200})
    path.unlink()
    name = f"{config['task']}-{features}-any-seed{config['seed']}.json"
    (folder / model / name).write_text(json.dumps(point))


def make(folder, monkeypatch) -> str:
    """Run results.py on a folder; its page."""
    monkeypatch.setattr(sys, "argv", ["results.py", str(folder)])
    results.main()
    return (folder / "results.md").read_text()


@pytest.fixture
def points(tmp_path):
    """A curve of two λ, a peer, a learned λ with and without a price, and log-mels; two seeds."""
    for task in TASKS:
        for seed in (0, 1):
            of_all = {"task": task, "seed": seed, "checkpoint_sha1": "e"}
            write_point(tmp_path, "ofa", 40.0 + seed, 20, lam=0.0, **of_all)
            write_point(tmp_path, "ofa", 50.0 + seed, 40, lam=1.0, **of_all)
            write_point(tmp_path, "average2", 44.0 + seed, 30, lam=0.0, **of_all)
            learned = {"start": 0.1, "price": 0.0, **of_all}
            write_point(tmp_path, "learned-autograd", 41.0 + seed, 27, **learned)
            write_point(tmp_path, "learned-differences", 39.0 + seed, 25, **learned)
        dear = {"start": 0.1, "price": 3.0, "task": task, "checkpoint_sha1": "e"}
        write_point(tmp_path, "learned-autograd", 43.0, 36, **dear)
        write_point(tmp_path, "baselines", 70.0, 20, features="logmel", lam=0.0, task=task)
    return tmp_path


def test_tables_by_hand(points, monkeypatch, capsys):
    text = make(points, monkeypatch)
    assert text.strip() == capsys.readouterr().out.strip()
    text = re.sub(" +", " ", text)  # without what makes columns line up
    assert "| once-for-all | 0.0 | 20.0 | 0.100 | 40.5 ± 0.7 | 1 | 2 | 2 | 10 % |" in text
    assert "| log-mel | | | | 70.0 | 0 | 1 | 2 | 10 % |" in text
    # The best of the grid has the lowest error rate, or the highest mAP.
    learned = "| autograd | 0.1 | 0 | 2 | 0.70 ± 0.00 | 27 | 2 | 41.5 ± 0.7"
    assert f"| characters (CTC) {learned} | 40.5 ± 0.7 at 0 | -1.0 |" in text
    assert f"| concepts (pooling) {learned} | 50.5 ± 0.7 at 1 | -9.0 |" in text
    differences = "| characters (CTC) | differences | 0.1 | 0 | 2 | 0.70 ± 0.00 | 25"
    assert f"{differences} | 2 | 39.5 ± 0.7 | 40.5 ± 0.7 at 0 | +1.0 |" in text
    assert "| characters (CTC) | autograd | 0.1 | 3 | 1 | 0.70 | 36 | 2 | 43.0 |" in text

    # Heads on another encoder are not of the grid.
    path = write_point(points, "ofa-seed1", 10.0, 20, lam=0.0, task="ctc", checkpoint_sha1="f")
    text = re.sub(" +", " ", make(points, monkeypatch))
    assert f"| characters (CTC) {learned} | 40.5 ± 0.7 at 0 | -1.0 |" in text
    path.unlink()

    # Heads that learned for longer are not compared with the grid.
    for path in points.glob("learned-differences/*.json"):
        point = json.loads(path.read_text())
        path.write_text(json.dumps({**point, "epochs": 3}))
    text = re.sub(" +", " ", make(points, monkeypatch))
    assert f"{differences} | 3 | 39.5 ± 0.7 | 40.5 ± 0.7 at 0 | |" in text


def test_means_are_over_encoders_where_there_are_several():
    """Three heads at 40 on one encoder, one at 50 on another: 45, not 42.5."""
    mean, sd = mean_and_sd([40, 40, 40, 50], ["a", "a", "a", "b"])
    assert (mean, sd) == (45, pytest.approx(10 / 2**0.5))
    mean, sd = mean_and_sd([40, 42], ["a", "a"])
    assert (mean, sd) == (41, pytest.approx(2**0.5))
    mean, sd = mean_and_sd([[40, 1], [50, 3]], ["a", "b"])
    assert mean.tolist() == [45, 2]
    mean, sd = mean_and_sd([40], ["a"])
    assert mean == 40 and np.isnan(sd)


def test_what_longer_tokens_cost(tmp_path):
    """40 at 20 ms and 50 at 40 ms: 42.5 at 25 ms, on a straight line."""
    assert results.longer_tokens_table(tmp_path) == ""
    write_any(tmp_path, "any", (40.0, 50.0, 30.0), task="pool", seed=0)
    write_any(tmp_path, "any", (40.0, 50.0, 30.0), task="ctc", seed=0)
    text = re.sub(" +", " ", results.longer_tokens_table(tmp_path))
    assert "| 20 ms | 25 ms | -2.5 (-2.5 to -2.5) | | +2.5 (+2.5 to +2.5) |" in text


def test_how_alike_validation_and_test_are(tmp_path):
    """At 20, 40 and 80 ms 40, 50 and 30 on test, 50, 40 and 30 on validation: r = 0.5 over all,
    -1 over the first two."""
    assert "concepts" not in results.splits_table(tmp_path)
    write_any(tmp_path, "any", (40.0, 50.0, 30.0), task="pool", seed=0)
    (path,) = tmp_path.glob("any/*.json")
    point = json.loads(path.read_text())
    for row, valid in zip(point["rows"], (50.0, 40.0, 30.0)):
        row["valid"] = valid
    path.write_text(json.dumps(point))
    text = re.sub(" +", " ", results.splits_table(tmp_path))
    assert "| concepts (pooling) | 20.0 | 0.50 | 10.0 | -1.00 |" in text


def test_every_encoder_of_a_model_with_several_has_a_row(tmp_path):
    assert results.encoders_table(tmp_path) == ""
    for encoder, seed, test in (("a", 0, 40.0), ("a", 1, 42.0), ("b", 0, 50.0)):
        folder = "none" if encoder == "a" else "none-seed1"
        path = write_point(tmp_path, folder, test, 20, task="pool", seed=seed, lam=0.0)
        point = json.loads(path.read_text())
        point["config"]["checkpoint_sha1"] = encoder
        path.with_name(f"pool-{encoder}{seed}.json").write_text(json.dumps(point))
        path.unlink()
        if encoder == "a":
            assert results.encoders_table(tmp_path) == ""
    text = re.sub(" +", " ", results.encoders_table(tmp_path))
    assert "| no compression | a | | | 41.0 ± 1.4 |" in text
    assert "| no compression | b | | | 50.0 |" in text


def test_figures(points, monkeypatch):
    make(points, monkeypatch)
    for name in ("tradeoff.png", "lambda.png"):
        assert (points / name).stat().st_size > 10_000


def test_figures_leave_out_what_paid_a_price(points):
    starts = select(load_points(points), "learned-autograd", "ctc")
    assert [summary.period for summary in starts.values()] == [27]


def lines_drawn(folder, task, x):
    """{label: line} of a panel of the trade-off figure."""
    figure, axis = plt.subplots()
    curves.draw_tradeoff(axis, load_points(folder), folder, task, x)
    plt.close(figure)
    return axis, {line.get_label(): line for line in axis.lines}


@pytest.mark.parametrize("x", ["period", "gflops"])
def test_every_panel_runs_from_dear_to_cheap(points, x):
    axis, lines = lines_drawn(points, "ctc", x)
    at = lines["once-for-all, a head for each rate"].get_xdata()
    left, right = axis.transData.transform([[at[0], 50], [at[1], 50]])[:, 0]
    assert left < right


def test_every_mark_means_one_thing():
    label_of = {}
    for peer in PEERS:
        marker, label = curves.peer_mark(peer)
        assert label_of.setdefault(marker, label) == label


def test_heads_for_all_rates_are_curves(points):
    for seed, better in ((0, 0), (1, 2)):
        tests = [30 - better, 40 - better, 60 - better]
        write_any(points, "any", tests, task="ctc", seed=seed)
        write_any(points, "rivals", [50, 60, 70], "average", task="ctc", seed=seed)
    ours = "once-for-all, one head for all rates"
    theirs = "no compression, frames averaged"
    for x, xs in (("period", [20, 40, 80]), ("gflops", [0.1, 0.05, 0.025])):
        _, lines = lines_drawn(points, "ctc", x)
        assert {ours, theirs} <= lines.keys()
        assert lines[ours].get_xdata().tolist() == pytest.approx(xs)
        assert lines[ours].get_ydata().tolist() == [29, 39, 59]
        assert lines[theirs].get_ydata().tolist() == [50, 60, 70]
    _, lines = lines_drawn(points, "pool", "period")
    assert ours not in lines


def test_heads_for_all_rates_of_other_configurations_are_not_averaged(tmp_path):
    write_any(tmp_path, "any", [30, 40, 60], task="ctc", seed=0, epochs=90)
    write_any(tmp_path, "any", [30, 40, 60], task="ctc", seed=1, epochs=150)
    with pytest.raises(ValueError, match=r"any-seed1.json is of another .*epochs differ"):
        load_heads(tmp_path, "any", "ctc", "any")


def test_other_configurations_are_not_averaged(tmp_path):
    write_point(tmp_path, "ofa", 40.0, 20, task="pool", seed=0, lam=0.0, lr=1)
    write_point(tmp_path, "ofa", 41.0, 20, task="pool", seed=1, lam=0.0, lr=2)
    with pytest.raises(ValueError, match=r"1.json is of another configuration .*lr differ"):
        load_points(tmp_path)


def test_other_precisions_are_not_averaged(tmp_path):
    """--precision auto is bf16 on CUDA and float32 elsewhere."""
    for seed, bf16 in enumerate((False, True)):
        path = write_point(tmp_path, "ofa", 40.0, 20, task="pool", seed=seed, lam=0.0)
        point = json.loads(path.read_text())
        path.write_text(json.dumps({**point, "bf16": bf16}))
    with pytest.raises(ValueError, match=r"1.json is of another configuration .*bf16 differ"):
        load_points(tmp_path)


def test_committed_tables_are_those_of_the_committed_points(tmp_path, monkeypatch):
    shutil.copytree(REPO / "results", tmp_path / "results")
    text = make(tmp_path / "results", monkeypatch)
    committed = (REPO / "results/results.md").read_text()
    assert text == committed, "run `python -m extras.results results`"


def test_committed_claims_are_those_of_the_committed_points():
    committed = json.loads((REPO / "results/claims.json").read_text())
    made = json.loads(json.dumps(claims.all_claims(REPO / "results")))
    assert committed == made, "run `python -m extras.claims`"
