"""How to time honestly, in a few short functions: benchmark.py uses them, and any project can.

*One run*: what is compared runs in one process on the same tensors; ratios travel to other machines, seconds don't.
*Warm-up*: first calls compile and fill caches; they are made, and not counted.
*Interleaved*: each round times all competitors, each round in another order, so that a slow moment, or memory just freed, favours none.
*Medians* over rounds: one interruption does not move them.
*Waiting*: a GPU works on while Python goes ahead, so the clock is read when it is done.

Memory is the most held at once, over what was held before: counted by the allocator on CUDA; on a CPU the running sum of all that
tensors allocate and free, which torch.profiler lists (not what oneDNN sets aside inside a call).

What time holds besides arithmetic: on a CPU, also the system's work for new memory. Linux' C library gives large blocks back at once,
so that a large result can cost more to map than to compute, a copy's too. With MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=17179869184 in the environment it keeps them.

`python timing.py` times a sum against a loop.
"""

import json
import os
import random
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # the profiler reports every start and stop, read when it is first used
import torch
from torch.profiler import ProfilerActivity, profile


def wait(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def interleaved(calls, repeats, device) -> dict:
    """Median seconds of each call: {name: function} -> {name: seconds}. What takes little time is called several times in a row."""

    def seconds(call, number=1):
        wait(device)
        start = time.perf_counter()
        for _ in range(number):
            call()
        wait(device)
        return (time.perf_counter() - start) / number

    for call in calls.values():
        call()
    numbers = {name: 1 + int(0.02 / seconds(call)) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for round in range(repeats):
        for name in random.Random(round).sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], numbers[name]))
    return {name: median(t) for name, t in times.items()}


def peak_bytes(call, device) -> float:
    """The most held at once during a call, over what was held before; nan where nobody counts (MPS)."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if device.type == "mps":
        return float("nan")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"
    )
    return max(accumulate((size for _, size in changes), initial=0))


def show(title, header, rows):
    """Prints a table that is also Markdown."""
    widths = [max(len(str(row[k])) for row in [header, *rows]) for k in range(len(header))]
    print(f"\n{title}\n")
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(str(cell).rjust(w) for cell, w in zip(row, widths)) + " |")


def ms(seconds) -> str:
    return f"{1e3 * seconds:.{0 if seconds > 0.1 else 2}f}"


def mib(size) -> str:
    return f"{size / 2**20:.{0 if size > 2**27 else 1}f}"


if __name__ == "__main__":
    x, device = torch.randn(1000, 1000), torch.device("cpu")
    calls = {"torch.sum": lambda: x.sum(), "Python's sum": lambda: sum(x.flatten().tolist())}
    seconds = interleaved(calls, 5, device)
    show(
        "The sum of a million numbers",
        ["", "ms", "peak MiB"],
        [[k, ms(s), mib(peak_bytes(calls[k], device))] for k, s in seconds.items()],
    )
