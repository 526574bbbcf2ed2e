"""benchmark.py on tiny sizes: every section runs, and its numbers are finite and fit together.

What a clock says is never asserted.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import finetune
from cif import cif
from extras import benchmark, benchmark_heads, clock
from extras.benchmark import busy_process, idle_and_busy, run_pretrain
from extras.clock import interleaved, peak_bytes
from ofa_encoder import PRESETS, frames_of

REPO = Path(__file__).parent.parent
CPU = torch.device("cpu")
SPEEDS = {"idle": 100, "busy": 40}


@pytest.fixture
def tiny(tmp_path, tmp_path_factory, folder, monkeypatch):
    """Sizes that take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "CIF_SIZES", [(2, 30, 8), (1, 60, 4)])
    monkeypatch.setattr(benchmark, "LENGTHS", [20, 40])
    monkeypatch.setattr(benchmark, "ENCODERS", {"tiny": PRESETS["tiny"]})
    monkeypatch.setattr(benchmark, "SECONDS", [1, 2])
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "RUN_STEPS", 2)
    root = tmp_path_factory.getbasetemp() / "root"
    flags = ["--data", str(folder), "--root", str(root), "--batch-seconds", "4"]
    monkeypatch.setattr(benchmark, "FLAGS", flags)
    monkeypatch.setattr(benchmark, "STEP", (PRESETS["tiny"], 2, 1))


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """run("cif") -> all numbers, as they are in the JSON, and what was printed."""

    def run(*flags):
        fixed = ["--device", "cpu", "--repeats", "2", "--json", "out/numbers.json"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *fixed, *flags])
        benchmark.main()
        content = json.loads((tmp_path / "out/numbers.json").read_text(encoding="utf-8"))
        assert "1 thread, cpu" in content["machine"]
        assert all(math.isfinite(number) for number in numbers(content))
        return content, capsys.readouterr().out

    return run


def numbers(content):
    """All numbers in nested lists and dictionaries."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [content] if isinstance(content, (int, float)) else []


def test_cif(run, monkeypatch):
    monkeypatch.setattr(benchmark, "funasr_cif", lambda: None)  # as where it is not installed
    content, printed = run("cif")
    assert "encoder" not in content
    sizes = [tuple(row[k] for k in ("B", "S", "C", "alpha")) for row in content["cif"]["sizes"]]
    assert sizes == [(2, 30, 8, 0.25), (2, 30, 8, 0.9), (1, 60, 4, 0.25), (1, 60, 4, 0.9)]
    for row in content["cif"]["sizes"]:
        assert set(row["forward_s"]) == {"cif", "torch-cif", "clone"}
        assert min(numbers([row["forward_s"], row["both_s"]])) > 0
        # At least the tokens and the gradient of x, in float32.
        at_least = 4 * row["B"] * row["C"] * (row["S"] + int(row["alpha"] * row["S"] * 0.7))
        assert min(row["peak_bytes"].values()) >= at_least
        assert set(row["error"]) == {"cif", "torch-cif"}
        assert max(row["error"].values()) < 1e-4
    assert "cif_v1" not in printed
    assert [row["S"] for row in content["cif"]["lengths"]] == [20, 40]
    assert min(numbers(content["cif"]["lengths"])) > 0
    for goal in ("(≥ 6)", "(≥ 5)", "(≤ 1.5)", "(≤ 1.2)"):
        assert goal in printed


def test_cif_beside_a_second_peer(run, monkeypatch):
    """It takes part if it is there. This one is 0.25 off, and says more tokens than there are."""

    def peer(x, alpha):
        tokens = cif(x, alpha, tail_threshold=0.0).tokens
        return torch.cat([tokens - 0.25, tokens], 1)

    monkeypatch.setattr(benchmark, "funasr_cif", lambda: peer)
    content, printed = run("cif")
    assert "of cif_v1" in printed
    for row in content["cif"]["sizes"]:
        assert row["forward_s"]["cif_v1"] > 0 and row["both_s"]["cif_v1"] > 0
        assert row["error"]["cif_v1"] == pytest.approx(0.25, abs=1e-5)


def test_encoder(run):
    content, printed = run("encoder")
    assert [(r["encoder"], r["seconds"]) for r in content["encoder"]] == [("tiny", 1), ("tiny", 2)]
    for row in content["encoder"]:
        assert row["tokens"][0] == frames_of(16_000 * row["seconds"])
        assert 0 < row["tokens"][1] < row["tokens"][0] / 2
        s, peak = row["s"], row["peak_bytes"]
        assert min(numbers(s)) > 0
        assert row["measured"] == pytest.approx(s["whole_0"] / s["whole_1"])
        share = {lam: s[f"transformer_{lam}"] / s["whole_0"] for lam in (0, 1)}
        assert 1 / row["bound"] == pytest.approx(1 - share[0] + share[1])
        assert peak["transformer_1"] < peak["transformer_0"] <= peak["whole_0"]
    assert "within 10 % of the bound" in printed


def test_pretraining(run, monkeypatch):
    monkeypatch.setattr(benchmark, "idle_and_busy", dict)  # has tests of its own below
    content, printed = run("pretraining")
    result = content["pretraining"]
    parts = ["data", "teacher", "CNN", "α, CIF", "Transformer", "backward", "optimiser", "other"]
    assert sorted(result["split"]) == sorted(parts)
    assert sum(result["split"].values()) == pytest.approx(1)
    assert min(result["split"].values()) > 0
    assert len(result["of_rounds"]) == 2
    assert min(result["of_rounds"]) <= result["audio_s_per_s"] <= max(result["of_rounds"])
    lams = result["lams_per_step"]
    assert lams["ratio"] == pytest.approx(lams["step_s"]["3"] / lams["step_s"]["1"])
    step = result["against_peer"]
    assert set(step["s"]) == {"teacher", "λ = 0", "λ = 1", step["peer"]}
    assert min(numbers(step["s"])) > 0
    assert step["peer"] in printed
    assert "held-out" not in printed


def test_a_step_of_k_lams_encodes_at_k(tiny, monkeypatch):
    """The loop that is timed is pretrain.py's own, with the number of λ that was asked for."""
    pretraining = benchmark.prepare(CPU)
    encode = pretraining.model.encoder.encode
    lams = []

    def counted(x, frames, lam, ends):
        lams.append(lam)
        return encode(x, frames, lam, ends)

    monkeypatch.setattr(pretraining.model.encoder, "encode", counted)
    for K in (1, 3):
        lams.clear()
        pretraining.args.lams_per_step = K
        assert benchmark.run_steps(pretraining, first=0)["audio"] > 0
        assert len(lams) == benchmark.STEPS * K


def test_heads(run, folder, monkeypatch):
    """Each way's time is put together from epochs, tests and encodings that were timed."""
    rows = ["path\tlabel\tsplit"]
    for n, path in enumerate(sorted(folder.glob("*.wav"))):
        rows.append(f"{path}\t{path.name[:2]}\t{('train', 'valid', 'test')[n % 3]}")
    Path("spoken.tsv").write_text("\n".join(rows) + "\n")
    flags = ["--data", "spoken.tsv", "--epochs", "3", "--lam-epochs", "2"]
    flags += ["--checkpoint", str(REPO / "checkpoints/ofa-tiny.pt")]
    monkeypatch.setattr(benchmark_heads, "HEADS", {"pool": flags})
    # So many epochs that hidden states no longer count beside them.
    monkeypatch.setattr(benchmark_heads, "LONGER", {"pool": 10_000})
    monkeypatch.setattr(benchmark_heads, "SECONDS", 0.03)
    asked = []  # for how long each call is repeated
    measured = []  # splits that the curve is measured on
    measure = finetune.measure

    def noted(calls, repeats, at_least):
        asked.append(at_least)
        return interleaved(calls, repeats, at_least)

    def noting(lesson, split, states):
        measured.append(split)
        return measure(lesson, split, states)

    monkeypatch.setattr(benchmark_heads, "interleaved", noted)
    monkeypatch.setattr(finetune, "measure", noting)
    content, printed = run("heads")
    (row,) = content["heads"]
    seconds, epoch_s = row["seconds"], row["epoch_s"]
    assert min(numbers([seconds, epoch_s, row["rates_s"]])) > 0
    assert seconds["grid"] > 3 * sum(epoch_s[str(lam)] for lam in benchmark_heads.GRID)
    assert seconds["any"] > 10_000 * epoch_s["any"]
    assert asked == [0.03]
    assert measured == ["valid"] * (finetune.RATES // benchmark_heads.SHARE)
    assert seconds["search"] == pytest.approx(seconds["any"] + row["rates_s"])
    for way, at_it in {"differences": 10_000, "autograd": 3}.items():
        counted = 2 * epoch_s[way] + at_it * epoch_s[str(benchmark_heads.AT)]
        assert counted < seconds[way] < counted + seconds["grid"]
        assert row["of_grid"][way] == pytest.approx(seconds[way] / seconds["grid"])
    assert f"{row['of_grid']['any']:.2f} ({row['of_grid']['search']:.2f})" in printed


def test_a_run_of_pretrain(tiny):
    result = run_pretrain({})
    assert result["audio_s_per_s"] > 0
    assert 0.1 < result["memory_gb"] < 10


def test_a_run_that_fails_says_why(tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "FLAGS", ["--steps", "none"])
    with pytest.raises(ValueError, match="has failed(.|\n)*invalid int value"):
        run_pretrain({})


def test_idle_and_busy(monkeypatch, capsys):
    """Four runs, with a busy process beside every other one. The runs are pretended."""
    beside = []
    runs = []

    class Pretended:
        def __enter__(self):
            beside.append("busy")

        def __exit__(self, *error):
            beside.pop()

    def run(environment):
        state = beside[0] if beside else "idle"
        runs.append((state, environment))
        return {"audio_s_per_s": SPEEDS[state], "memory_gb": 1.5}

    monkeypatch.setattr(benchmark, "busy_process", Pretended)
    monkeypatch.setattr(benchmark, "run_pretrain", run)
    idle_and_busy()
    assert runs == [
        ("idle", {}),
        ("busy", {}),
        ("idle", benchmark.LIBRARY_DEFAULTS),
        ("busy", benchmark.LIBRARY_DEFAULTS),
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("| 100 | 40 | 2.5 (≤ 2) | 1.50 (≤ 1.6) |") == 2


def test_busy_process_ends():
    with pytest.raises(KeyError), busy_process() as process:
        assert process.poll() is None
        raise KeyError
    assert process.poll() is not None


def test_wrong_sections_are_named(run):
    with pytest.raises(ValueError, match="nonsense.*cif, encoder, pretraining, heads"):
        run("nonsense")


def test_a_call_is_repeated_for_as_long_as_asked(monkeypatch):
    asked = []

    class Clock:
        median = 1.0

        def __init__(self, *args, **kwargs):
            pass

        def blocked_autorange(self, min_run_time):
            asked.append(min_run_time)
            return self

    monkeypatch.setattr(clock, "Timer", Clock)
    assert interleaved({"a": print, "b": print}, 2, at_least=3.0) == {"a": 1.0, "b": 1.0}
    assert asked == [3.0] * 4


def test_rounds_are_interleaved_in_varying_order():
    """Each round times all; a short call is made many times in a row."""
    order = []

    def called(name):
        if order[-1:] != [name]:
            order.append(name)

    seconds = interleaved({name: lambda name=name: called(name) for name in "ab"}, 8)
    assert list(seconds) == ["a", "b"]
    assert min(seconds.values()) > 0
    assert set(order) == {"a", "b"}
    # In one fixed order all calls would alternate, 16 runs of equal names in 8 rounds.
    assert len(order) < 16


def test_peak_memory():
    def call():  # 4 MB, then 8, then 4, then 12, of which 8 are left
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        return b, torch.empty(1000, 2000)

    before = torch.empty(3000, 1000)
    assert peak_bytes(call, CPU) == 12_000_000
    assert len(before) == 3000
    assert peak_bytes(lambda: None, CPU) == 0
