"""claims.py on points made here, whose differences and intervals can be worked out by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from extras import claims
from extras.claims import verdict_better, verdict_within
from extras.points import METRIC_OF, draws_at, load_heads, score_at


def point(folder, name, task="pool", encoder="a", seed=0, lam=0.0, period=20.0, test=50.0, **more):
    """A point in folder/name.json. Its draws scatter around its score by a point."""
    noise = np.random.default_rng(0).standard_normal(200)
    bootstrap = [round(test + n, 2) for n in noise]
    features = more.pop("features", "encoder")
    config = {"task": task, "features": features, "seed": seed, "checkpoint_sha1": encoder}
    content = {
        "config": {**config, "lam": lam, "start": lam},  # λ, or where learning it starts
        "lam": (period - 20) / 70,  # that was found or learned
        "metric": METRIC_OF[task],
        "test": test,
        "valid": test,
        "frame_period_ms": period,
        "transformer_gflops_per_s": 1.0,
        "epochs": 1,
        "train_s": 1.0,
        "infeasible_test": 0,
        "test_utterances": 10,
        "bootstrap": bootstrap,
        "machine": "m",
        "date": "2026-01-01",
        **more,
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def row(period, test):
    noise = np.random.default_rng(0).standard_normal(200)
    bootstrap = [test + n for n in noise]
    costs = {"frame_period_ms": period, "transformer_gflops_per_s": 2 / period}
    return {**costs, "lam": (period - 20) / 70, "test": test, "valid": test, "bootstrap": bootstrap}


def test_heads_are_gathered_by_encoder_and_seed(tmp_path):
    """Heads of their own at two λ make one curve; a head for all rates is one already."""
    point(tmp_path, "ofa/pool-1", lam=1.0, period=90.0, test=40.0)
    point(tmp_path, "ofa/pool-0", lam=0.0, period=20.0, test=50.0)
    point(tmp_path, "ofa/pool-2", seed=1)
    point(tmp_path, "ofa-seed1/pool-0", encoder="b")
    point(tmp_path, "ofa/ctc-0", task="ctc")
    point(tmp_path, "ofa/pool-any", lam="any", rows=[row(20.0, 51.0), row(90.0, 41.0)])
    heads = load_heads(tmp_path, "ofa", "pool")
    assert [(h.encoder, h.periods.tolist()) for h in heads] == [
        ("a", [20.0, 90.0]),
        ("a", [20.0]),
        ("b", [20.0]),
    ]
    (one,) = load_heads(tmp_path, "ofa", "pool", "any")
    assert score_at([one], 55.0).tolist() == [46.0]
    assert score_at([one], [20.0, 55.0]).tolist() == [[51.0, 46.0]]
    draws = draws_at([one], 55.0)
    assert draws.shape == (1, 200)
    assert draws.mean() == pytest.approx(46, abs=0.2)


@pytest.mark.parametrize(
    "apart, verdict",
    [
        ([], "not measured"),
        ([(0.5, -1, 2), (-0.9, -2, 1)], "yes"),
        ([(0.5, -1, 2), (-1.5, -3, 1)], "not shown"),
        ([(0.5, -1, 2), (-3.0, -4, -2)], "no"),
    ],
)
def test_verdicts(apart, verdict):
    """As good to within a point: yes; worse, but perhaps by chance: not shown; surely worse: no."""
    differences = [claims.Difference("pool", "x", 20, 0, 0, *three, 1, 1) for three in apart]
    assert verdict_within(differences) == verdict


def test_better_everywhere_or_not():
    surely = claims.Difference("pool", "x", 20, 0, 0, 2.0, 0.1, 4.0, 1, 1)
    perhaps = claims.Difference("pool", "x", 20, 0, 0, 2.0, -0.1, 4.0, 1, 1)
    assert verdict_better([]) == "not measured"
    assert verdict_better([surely, surely]) == "yes"
    assert verdict_better([surely, perhaps]) == "not everywhere"
    assert verdict_better([perhaps, perhaps]) == "no"


def test_claims_of_a_folder(tmp_path, monkeypatch, capsys):
    rows = [row(20.0, 51.0), row(90.0, 41.0)]
    point(tmp_path, "any/pool-any-seed0", lam="any", rows=rows)
    point(tmp_path, "ofa/pool-0", lam=0.0, period=20.0, test=50.5)
    point(tmp_path, "ofa/pool-1", lam=1.0, period=90.0, test=44.0)
    point(tmp_path, "none/pool-0", encoder="b", test=58.0)
    monkeypatch.setattr(sys, "argv", ["claims.py", str(tmp_path)])
    claims.main()
    found = json.loads(Path(tmp_path / "claims.json").read_text())
    assert [entry["verdict"] for entry in found] == ["no", "no", *["not measured"] * 6]
    printed = capsys.readouterr().out
    assert "mAP -7.0 (-7.0 to -7.0) at 20 ms" in printed
    assert "mAP -3.0 (-3.0 to -3.0) at 90 ms" in printed


def test_segments_are_compared_with_as_many_steps_of_regression(tmp_path):
    rows = [row(20.0, 51.0), row(200.0, 41.0)]
    point(tmp_path, "segments/pool-any-seed0", lam="any", rows=rows)
    assert claims.against_regression(tmp_path)["verdict"] == "not measured"
    rows = [row(20.0, 50.5), row(200.0, 43.5)]
    point(tmp_path, "k3/pool-any-seed0", encoder="b", lam="any", rows=rows)
    entry = claims.against_regression(tmp_path)
    assert [number["period"] for number in entry["numbers"]] == [33, 50, 90, 180]
    assert entry["numbers"][0]["better"] == pytest.approx(0.5 - 3 * 13 / 180)
    assert entry["verdict"] == "no"


def test_rivals_are_compared_with_as_many_steps_of_compression(tmp_path):
    """Those are better than merged frames, and worse than averages."""
    for model, features, encoder, test in (
        ("any", "encoder", "a", 60.0),
        ("k3", "encoder", "b", 49.5),
        ("rivals", "average", "c", 50.0),
        ("rivals", "merge", "c", 48.5),
    ):
        rows = [row(20.0, test), row(200.0, test)]
        name = f"{model}/pool-{features}-any-seed0"
        point(tmp_path, name, encoder=encoder, features=features, lam="any", rows=rows)
    entry = claims.against_rivals(tmp_path)
    better = [(n["beside"], n["period"], n["better"]) for n in entry["numbers"]]
    assert better == [
        ("averaged frames", 50, pytest.approx(-0.5)),
        ("averaged frames", 90, pytest.approx(-0.5)),
        ("merged frames", 50, pytest.approx(1.0)),
        ("merged frames", 90, pytest.approx(1.0)),
    ]
    assert entry["verdict"] == "not everywhere"


def test_a_rate_is_compared_with_the_heads_that_have_it(tmp_path):
    """A sweep that is not at its end. Rates are matched by λ: the periods of heads of their own are
    over all utterances, those of a head for all rates over a sample."""
    rows = [row(20.0, 51.0), row(90.0, 41.0)]
    point(tmp_path, "any/pool-any-seed0", lam="any", rows=rows)
    for seed, lams in ((0, (0.0, 1.0)), (1, (0.0,))):
        for lam in lams:
            name = f"ofa/pool-lam{lam}-seed{seed}"
            point(tmp_path, name, lam=lam, seed=seed, period=20 + 60 * lam, test=50 + 10 * seed)
    numbers = claims.against_own_heads(tmp_path)["numbers"]
    found = [(n["period"], n["ours"], n["theirs"]) for n in numbers]
    assert found == [(20, 51, 55), (90, 41, 50)]


def test_tasks_share_a_row_of_the_table_if_their_rates_are_alike():
    """Translation lacks a rate, and has the others at slightly other periods."""
    numbers = []
    for task, periods in (("ctc", (20.0, 33.5, 52.0)), ("seq2seq", (20.0, 51.0))):
        for period in periods:
            d = claims.Difference(task, "x", period, 0, 0, period, 0.0, 0.0, 1, 1)
            numbers.append(d._asdict())
    lines = claims.numbers_table({"numbers": numbers}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[2:5]] for line in lines]
    assert cells == [
        ["20 ms", "+20.0 (+0.0 to +0.0)", "+20.0 (+0.0 to +0.0)"],
        ["34 ms", "+33.5 (+0.0 to +0.0)", ""],
        ["51 to 52 ms", "+52.0 (+0.0 to +0.0)", "+51.0 (+0.0 to +0.0)"],
    ]


def write_times(folder, **of_grid):
    """What the benchmark says of the tasks: {task: seconds, where the grid takes 1}."""
    rows = []
    for task, seconds in of_grid.items():
        rows.append({"task": task, "of_grid": {"search": seconds, "differences": seconds / 2}})
    (folder / "benchmark-heads.json").write_text(json.dumps({"heads": rows}))


def test_lam_is_found_if_it_is_good_and_cheap(tmp_path):
    rows = [row(20.0, 51.0), row(90.0, 41.0)]
    found = {"lam": "any", "rows": rows}
    for seed, period in enumerate((20.0, 21.0, 21.5)):
        point(tmp_path, f"any/pool-any-seed{seed}", seed=seed, **found)
        name = f"any/pool-search-metric-price0-seed{seed}"
        point(tmp_path, name, seed=seed, period=period, test=50.5, **found)
    assert claims.lam_is_found(tmp_path)["verdict"] == "not measured"  # how long did it take?
    write_times(tmp_path, pool=0.75, ctc=1.1)
    entry = claims.lam_is_found(tmp_path)
    (numbers,) = entry["numbers"]
    assert numbers["period_ms"] == pytest.approx(62.5 / 3)
    assert numbers["apart"] == pytest.approx(1 / 21)
    assert numbers["best"]["better"] == pytest.approx(-0.5)
    assert numbers["best"]["period"] == 20
    assert numbers["time_of_grid"] == 0.75
    assert entry["verdict"] == "yes"
    assert entry["shown"] == ("mAP -0.5 (-0.5 to -0.5) at 21 ± 1 ms, 0.8 × the time")
    # On a flat curve another head may find another rate.
    name = "any/pool-search-metric-price0-seed3"
    point(tmp_path, name, seed=3, period=30.0, test=50.5, **found)
    assert claims.lam_is_found(tmp_path)["verdict"] == "yes"
    point(tmp_path, name, seed=3, period=30.0, test=44.5, **found)
    assert claims.lam_is_found(tmp_path)["verdict"] == "no"
    found["rows"] = [row(20.0, 29.0), row(90.0, 41.0)]
    point(tmp_path, "any/ctc-any-seed0", task="ctc", **found)
    point(tmp_path, "any/ctc-search-metric-price0-seed0", task="ctc", test=29.5, **found)
    assert claims.lam_is_found(tmp_path)["verdict"] == "no"
    write_times(tmp_path, pool=0.75, ctc=0.9)
    entry = claims.lam_is_found(tmp_path)
    assert entry["verdict"] == "not everywhere"
    json.dumps(entry, allow_nan=False)  # of one run there is no standard deviation


def test_encoders_count_alike_where_lam_is_found(tmp_path):
    """Three heads on one encoder and one on another: the mean is over the two encoders."""
    rows = [row(20.0, 51.0), row(90.0, 41.0)]
    found = {"lam": "any", "rows": rows}
    for encoder, seed, period in (("a", 0, 20.0), ("a", 1, 20.0), ("a", 2, 20.0), ("b", 0, 30.0)):
        folder = "any" if encoder == "a" else "any-seed1"
        point(tmp_path, f"{folder}/pool-any-seed{seed}", encoder=encoder, seed=seed, **found)
        name = f"{folder}/pool-search-metric-price0-seed{seed}"
        test = 50.0 if encoder == "a" else 48.0
        point(tmp_path, name, encoder=encoder, seed=seed, period=period, test=test, **found)
    # An encoder on which no λ was looked for.
    found["rows"] = [row(20.0, 91.0), row(90.0, 81.0)]
    point(tmp_path, "any-seed2/pool-any-seed0", encoder="c", **found)
    (numbers,) = claims.lam_is_found(tmp_path)["numbers"]
    assert numbers["period_ms"] == 25
    assert numbers["sd_ms"] == pytest.approx(50**0.5)
    assert numbers["best"]["better"] == pytest.approx(-2)
    assert numbers["encoders"] == 2


def test_lam_is_learned_if_starts_meet(tmp_path):
    rows = [row(20.0, 51.0), row(90.0, 41.0)]
    point(tmp_path, "any/pool-any-seed0", lam="any", rows=rows)
    for k, period in enumerate((30.0, 31.0, 32.0)):
        name = f"learned-differences/pool-differences-price0-from{k}-seed0"
        point(tmp_path, name, lam=float(k), period=period, test=50.5)
    write_times(tmp_path, pool=0.8)
    entry = claims.lam_is_learned(tmp_path)
    assert entry["verdict"] == "yes"
    assert entry["shown"] == ("mAP -0.5 (-0.5 to -0.5) at 31 ± 1 ms, 0.4 × the time")
    # Less than three starts, and one that leads elsewhere.
    (tmp_path / "learned-differences/pool-differences-price0-from2-seed0.json").rename(
        tmp_path / "x"
    )
    assert claims.lam_is_learned(tmp_path)["verdict"] == "not measured"
    (tmp_path / "x").rename(tmp_path / "learned-differences/pool-differences-price0-from2.json")
    assert claims.lam_is_learned(tmp_path)["verdict"] == "yes"
    name = "learned-differences/pool-differences-price0-from3-seed0"
    point(tmp_path, name, lam=3.0, period=36.0, test=50.5)
    assert claims.lam_is_learned(tmp_path)["verdict"] == "no"


@pytest.mark.parametrize("r_value, verdict", [(0.76, "yes"), (0.7, "no")])
def test_tokens_end_with_sounds(tmp_path, r_value, verdict):
    rows = []
    for lam in (0.9, 0.95, 1.0):
        rows.append({"lam": lam, "what": "tokens", "r_value": r_value})
        rows.append({"lam": lam, "what": "equal spacing", "r_value": 0.5})
    (tmp_path / "firing").mkdir()
    (tmp_path / "firing/segments.json").write_text(json.dumps({"rows": rows}))
    entry = claims.tokens_end_with_sounds(tmp_path)
    assert entry["verdict"] == verdict
    assert entry["shown"].startswith(f"R {r_value:.2f} at λ = 0.95, equal spacing 0.50; ")
