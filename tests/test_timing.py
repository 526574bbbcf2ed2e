"""timing.py with a clock that is told how long everything takes, and with allocations counted by hand."""

import runpy
from pathlib import Path

import pytest
import torch

from extras import timing
from extras.timing import interleaved, peak_bytes

CPU = torch.device("cpu")


def test_median_without_warm_up_each_round_in_another_order(monkeypatch):
    now, order, first = 0.0, [], {"a": 100.0, "b": 100.0}  # the first call of each takes long
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def takes(name, usual):
        def call():
            nonlocal now
            order.append(name)
            interrupted = order.count(name) == 5
            now += first.pop(name, 50.0 if interrupted else usual)

        return call

    assert interleaved({"a": takes("a", 1.0), "b": takes("b", 2.0)}, 9, CPU) == {"a": 1.0, "b": 2.0}
    rounds = [
        tuple(order[k : k + 2]) for k in range(4, len(order), 2)
    ]  # after warm-up, and the call that says how many in a row
    assert len(rounds) == 9 and set(rounds) == {("a", "b"), ("b", "a")}


def test_short_calls_are_made_several_times_in_a_row(monkeypatch):
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def call():
        nonlocal now, calls
        now, calls = now + 0.001, calls + 1

    calls = 0
    assert interleaved({"short": call}, 3, CPU)["short"] == pytest.approx(0.001)
    assert calls == pytest.approx(2 + 3 * 21, abs=3)


def test_peak_memory():
    def call():  # 4 MB, then 8, then 4, then 12, of which 8 are left
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        return b, torch.empty(1000, 2000)

    before = torch.empty(3000, 1000)
    assert peak_bytes(call, CPU) == 12_000_000 and len(before)
    assert peak_bytes(lambda: None, CPU) == 0


def test_example_runs(capsys):
    runpy.run_path(str(Path(timing.__file__)), run_name="__main__")
    assert "Python's sum" in capsys.readouterr().out
