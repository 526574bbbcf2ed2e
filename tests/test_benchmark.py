"""benchmark.py on tiny sizes: every section runs, its numbers are finite and fit together. What a clock says is never asserted."""

import json
import math
import sys

import pytest

from extras import benchmark
from ofa_encoder import PRESETS, frames_of


@pytest.fixture
def run(tmp_path, tmp_path_factory, folder, monkeypatch, capsys):
    """run("cif") -> the section's numbers, as they are in the JSON, and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "CIF_SIZES", [(2, 30, 8), (1, 60, 4)])
    monkeypatch.setattr(benchmark, "LENGTHS", [20, 40])
    monkeypatch.setattr(benchmark, "ENCODERS", {"tiny": PRESETS["tiny"]})
    monkeypatch.setattr(benchmark, "SECONDS", [1, 2])
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(
        benchmark,
        "FLAGS",
        [
            "--data",
            str(folder),
            "--root",
            str(tmp_path_factory.getbasetemp() / "root"),
            "--batch-seconds",
            "4",
        ],
    )
    monkeypatch.setattr(benchmark, "STEP", (PRESETS["tiny"], 2, 1))

    def run(*flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "benchmark.py",
                "--device",
                "cpu",
                "--repeats",
                "2",
                "--json",
                "out/numbers.json",
                *flags,
            ],
        )
        benchmark.main()
        content = json.loads((tmp_path / "out/numbers.json").read_text(encoding="utf-8"))
        assert "1 threads, cpu" in content["machine"] and all(
            math.isfinite(n) for n in numbers(content)
        )
        return content, capsys.readouterr().out

    return run


def numbers(content):
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, (int, float)):
        yield content


def test_cif(run):
    content, printed = run("cif")
    sizes = [tuple(row[k] for k in ("B", "S", "C", "alpha")) for row in content["cif"]["sizes"]]
    assert sizes == [(2, 30, 8, 0.25), (2, 30, 8, 0.9), (1, 60, 4, 0.25), (1, 60, 4, 0.9)]
    for row in content["cif"]["sizes"]:
        assert (
            set(row["forward_s"]) == {"cif", "torch-cif", "clone"}
            and min(numbers(row["forward_s"])) > 0
            and min(numbers(row["both_s"])) > 0
        )
        for peak in row[
            "peak_bytes"
        ].values():  # at least the tokens and the gradient of x, in float32
            assert peak >= 4 * row["B"] * row["C"] * (row["S"] + int(row["alpha"] * row["S"] * 0.7))
    assert [r["S"] for r in content["cif"]["lengths"]] == [20, 40] and min(
        numbers(content["cif"]["lengths"])
    ) > 0
    assert (
        all(goal in printed for goal in ("(≥ 10)", "(≥ 5)", "(≤ 1.5)", "(≤ 1.2)"))
        and "encoder" not in content
    )


def test_encoder(run):
    content, printed = run("encoder")
    assert [(r["encoder"], r["seconds"]) for r in content["encoder"]] == [("tiny", 1), ("tiny", 2)]
    for row in content["encoder"]:
        assert (
            row["tokens"][0] == frames_of(16_000 * row["seconds"])
            and 0 < row["tokens"][1] < row["tokens"][0] / 2
        )
        s = row["s"]
        assert min(numbers(s)) > 0 and row["measured"] == pytest.approx(s["whole_0"] / s["whole_1"])
        assert 1 / row["bound"] == pytest.approx(
            1 - s["transformer_0"] / s["whole_0"] + s["transformer_1"] / s["whole_0"]
        )
        assert (
            row["peak_bytes"]["transformer_1"]
            < row["peak_bytes"]["transformer_0"]
            <= row["peak_bytes"]["whole_0"]
        )
    assert "within 10 % of the bound" in printed


def test_pretraining_splits_into_parts_that_add_up(run):
    content, printed = run("pretraining")
    result = content["pretraining"]
    assert set(result["split"]) == {
        "data",
        "teacher",
        "CNN",
        "α, CIF",
        "Transformer",
        "backward",
        "optimiser",
        "other",
    }
    assert sum(result["split"].values()) == pytest.approx(1) and min(result["split"].values()) > 0
    assert len(result["of_rounds"]) == 2 and min(result["of_rounds"]) <= result[
        "audio_s_per_s"
    ] <= max(result["of_rounds"])
    step = result["against_peer"]
    assert set(step["s"]) == {"teacher", "λ = 0", "λ = 1", step["peer"]} and min(numbers(step)) > 0
    assert (
        step["peer"] in printed and "s of audio a second" in printed and "held-out" not in printed
    )


def test_wrong_sections_are_named(run):
    with pytest.raises(ValueError, match="nonsense.*cif, encoder, pretraining"):
        run("nonsense")
