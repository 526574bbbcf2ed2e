"""What benchmark.py measures with: seconds, memory, and tables of them.

torch.utils.benchmark keeps the clock, and waits for a GPU.
"""

import os
import random
from collections import defaultdict
from itertools import accumulate
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from extras.firing import table

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports each of its starts


def interleaved(calls, repeats, at_least=0.02) -> dict[str, float]:
    """Median seconds of each call: {name: function} -> {name: seconds}.

    Each round times all of them, each round in another order, so that neither a slow moment nor
    memory that has just been freed favours one. Timer makes a call before it counts, repeats it for
    at_least so many seconds, and waits for a GPU.
    """
    threads = torch.get_num_threads()  # Timer would take one
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads)
        for name, call in calls.items()
    }
    times = defaultdict(list)
    for seed in range(repeats):
        for name in random.Random(seed).sample(list(timers), len(timers)):
            times[name].append(timers[name].blocked_autorange(min_run_time=at_least).median)
    return {name: median(times[name]) for name in calls}


def peak_bytes(call, device) -> float:
    """The most memory held at once during a call, beyond what was held before.

    On CUDA the allocator counts. On a CPU it is the running sum of what tensors allocate and free,
    as torch.profiler saw it, without what oneDNN sets aside inside a call. NaN on other devices.
    """
    call()  # what is cached for good is not counted
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return float("nan")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def show(title, header, rows):
    """Print a Markdown table below its title."""
    print(f"\n{title}\n\n{table(header, rows)}", flush=True)


def ms(seconds) -> str:
    return f"{1e3 * seconds:.{0 if seconds > 0.1 else 2}f}"


def mib(size) -> str:
    return f"{size / 2**20:.{0 if size > 2**27 else 1}f}"
