"""What the profiler saw of one run: bytes over the bus, and how long the card had nothing to do."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace
# Looked up in this order: fused kernels are named after what they fuse, flash-attn-4's kernels are cutlass's too.
SORTS: Mapping[str, str] = {
    "fused": r"^triton_",
    "attention": r"flash|fmha|attention|sdpa|sage",
    "product": r"gemm|cutlass|nvjet|xmma|splitk|matmul|_mm_",
    "copy": r"^mem(cpy|set)",
}
OTHER = "elementwise"
START_S = 0.3  # of a video: its pictures and words are encoded by then


@dataclass(frozen=True)
class Trace:
    """One run under the profiler, which makes it a little slower."""

    seconds: float
    busy_s: float
    """With a kernel or a copy at work on the card, in any stream."""
    idle_s: dict[str, float]
    """The rest: `around` its first and last work, at the `start`, which is the first START_S, and `later`."""
    bytes_to_device: int
    kernels: dict[str, str]
    """Sort -> the kernel of that sort that took most of the time: what really ran."""


def trace(run: Callable[[], object]) -> Trace:
    """Run once under the profiler."""
    seconds, events = record(run)
    return Trace(seconds, busy_s(events), idle_s(events, seconds), copied_bytes(events), dearest(events))


def record(run: Callable[[], object], *, with_shapes: bool = False) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of `run` and the profiler's events in chrome's format. `with_shapes`: also what the host launched."""
    kinds = torch.profiler.ProfilerActivity
    on_card = [kinds.CUDA] if torch.cuda.is_available() else []
    activities = [*on_card, kinds.CPU] if with_shapes or not on_card else on_card
    with torch.profiler.profile(activities=activities, record_shapes=with_shapes) as profile:
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return seconds, list(json.loads(path.read_text())["traceEvents"])


def sort_of(kernel: str) -> str:
    """What a kernel does, told from its name."""
    return next((sort for sort, pattern in SORTS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def dearest(events: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Sort -> its dearest kernel."""
    spent: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "kernel":
            key = sort_of(event["name"]), event["name"]
            spent[key] = spent.get(key, 0.0) + event["dur"]
    return {sort: name for (sort, name), _ in sorted(spent.items(), key=lambda item: item[1])}


def copied_bytes(events: Iterable[dict[str, Any]]) -> int:
    """Host-to-device bytes."""
    return sum(
        int(event["args"]["bytes"]) for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]
    )


def busy_s(events: Iterable[dict[str, Any]]) -> float:
    """Seconds with something on the card; what runs side by side counts once."""
    return sum(end - begin for begin, end in _busy_spans_s(events))


def idle_s(events: Iterable[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Seconds of a run of `seconds` with nothing on the card, see `Trace`; empty if it never had anything."""
    spans = _busy_spans_s(events)
    if not spans:
        return {}
    first, last = spans[0][0], spans[-1][1]
    waits = [(end, begin) for (_, end), (begin, _) in pairwise(spans)]
    early = sum(max(0.0, min(end, first + START_S) - begin) for begin, end in waits)
    whole = sum(end - begin for begin, end in waits)
    return {"around": seconds - (last - first), "start": early, "later": whole - early}


def _busy_spans_s(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Begin and end of each stretch with something on the card."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_CARD
    ):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return [(begin / 1e6, end / 1e6) for begin, end in merged]
