"""Clocks and counters around a job: seconds of each call of a model, stages, memory, bytes over the bus."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.jobs import GIB
from engine.geometry import LatentShape

WATCHED = ("transformer", "transformer_2", "unet", "refiner_unet", "text_encoder", "image_encoder")


@dataclass
class Sample:
    """One job."""

    seconds: float
    stages_s: dict[str, float] = field(default_factory=dict)
    calls_s: dict[str, list[float]] = field(default_factory=dict)
    peak_reserved_gib: float = 0.0
    notes: tuple[str, ...] = ()

    def forwards_s(self) -> list[float]:
        """Seconds of every forward of a transformer or UNet."""
        return [s for name, calls in self.calls_s.items() if name not in WATCHED[4:] for s in calls]


class Watch:
    """Seconds of every call of the modules it follows, on the card's own clock; on the CPU's where there is none."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of the last forward of a video transformer: what it really worked on, not what the request looks like."""
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def follow(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args, kwargs: self._begin(name, args, kwargs), with_kwargs=True)
        module.register_forward_hook(lambda *_: self._end(name))

    def take(self) -> dict[str, list[float]]:
        """What was seen since the last time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls: dict[str, list[float]] = {}
        for name, begin, end in self._marks:
            calls.setdefault(name, []).append(between(begin, end))
        self._marks.clear()
        return calls

    def _begin(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(shown, torch.Tensor) and shown.dim() == 5:  # (1, c, T, h, w)
            self.tokens = LatentShape(*shown.shape[2:]).tokens
        self._open[name] = mark()

    def _end(self, name: str) -> None:
        self._marks.append((name, self._open.pop(name), mark()))


@dataclass(frozen=True)
class WatchedParts:
    """Parts whose models are followed from the moment they are loaded, and kept to be looked at."""

    parts: Any
    watch: Watch
    models: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def profile(self) -> Any:
        return self.parts.profile

    def load(self, name: str, device: str = "cpu") -> Any:
        part = self.parts.load(name, device)
        if name in WATCHED:
            self.watch.follow(name, part)
            self.models[name] = part
        return part


def sample(run: Callable[[], dict[str, float]], watch: Watch) -> Sample:
    """Run one job; `run` returns its stages."""
    watch.take()
    begin_peak()
    started = time.perf_counter()
    stages = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Sample(seconds, stages, watch.take(), peak_reserved_gib())


def peak_reserved_gib() -> float:
    """The most that torch's allocator held since `begin_peak`; what the card really gave away."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def bytes_to_device(run: Callable[[], object]) -> int:
    """Host-to-device bytes of one run, read from the profiler's record of copies. The run is slower for it."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return copied_bytes(json.loads(trace.read_text()))


def copied_bytes(trace: dict[str, Any]) -> int:
    """Host-to-device bytes in a profiler trace (chrome format)."""
    return sum(
        int(event["args"]["bytes"])
        for event in trace["traceEvents"]
        if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]
    )


def begin_peak() -> None:
    """What the allocator holds from here on counts for `peak_reserved_gib`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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
