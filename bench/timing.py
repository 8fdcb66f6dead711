"""Clocks and gauges: seconds on the card's own clock, memory of the card and of the host."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.jobs import GIB

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Around one job. What torch's allocator took from the card (reserved) and gave to tensors (allocated)."""

    peak_reserved_gib: float
    peak_allocated_gib: float
    reserved_mib: float
    """After the job, like the next two."""
    allocated_mib: float
    host_mib: float
    """Of the process, resident in host memory."""


def memory() -> Memory:
    """Peaks are those since `restart_peak` or `begin_peak`; 0 for a card that is not there."""
    host = _resident_mib()
    if not torch.cuda.is_available():
        return Memory(0.0, 0.0, 0.0, 0.0, host)
    return Memory(
        torch.cuda.max_memory_reserved() / GIB,
        torch.cuda.max_memory_allocated() / GIB,
        torch.cuda.memory_reserved() / MIB,
        torch.cuda.memory_allocated() / MIB,
        host,
    )


def restart_peak() -> None:
    """Peaks count from here. The allocator keeps what it has, as it does between two jobs of a worker."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def begin_peak() -> None:
    """As `restart_peak`, and the allocator's unused memory goes back first: for a measurement that stands alone."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_reserved_gib() -> float:
    """The most that torch's allocator held since the peaks were last reset; what the card really gave away."""
    return memory().peak_reserved_gib


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def mark() -> Any:
    """A moment: in the card's own queue of work, or on the CPU's clock where there is no card."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Seconds between two marks; waits for the second."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def seconds(run: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> float:
    """Median seconds of `run`, after `warm_up` runs."""
    for _ in range(warm_up):
        run()
    spent = []
    for _ in range(repeats):
        begin = mark()
        run()
        spent.append(between(begin, mark()))
    return median(spent)


def _resident_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
