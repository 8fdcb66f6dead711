"""What the profiler saw of one run: bytes over the bus, and how long the card had nothing to do."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Trace:
    """One run under the profiler, which makes it a little slower."""

    seconds: float
    busy_s: float
    """With a kernel or a copy at work on the card, in any stream."""
    bytes_to_device: int
    kernels: dict[str, str]
    """Sort -> the kernel of that sort that took most of the time: what really ran."""


def trace(run: Callable[[], object]) -> Trace:
    """Run once under the profiler."""
    seconds, events = record(run)
    return Trace(seconds, busy_s(events), copied_bytes(events), dearest(events))


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
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_CARD)
    busy_us, until = 0.0, float("-inf")
    for begin, end in spans:
        busy_us += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy_us / 1e6
