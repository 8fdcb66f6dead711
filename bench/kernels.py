"""Where the time of one forward goes, kernel by kernel: what to make faster next.

Each kernel is told with what it achieved. The profiler says which operator launched it and the shapes of that
operator's tensors: products and attention give operations from these, fused elementwise kernels give bytes, each
tensor counted once. Where the profiler says nothing there is no rate, rather than a guess.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from bench.ladder import LATENT
from bench.say import say
from bench.trace import ON_CARD, record, sort_of
from bench.work import TERA, forward_work
from engine.card import Levers
from engine.linear8_check import passing
from engine.speed import accelerate, narrow, precision_of

SHOWN = 15
NO_RATES: Mapping[str, str] = MappingProxyType({})
WIDTHS = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "long": 8, "int": 4, "c10::Float8_e4m3fn": 1,
          "signed char": 1, "unsigned char": 1, "bool": 1}  # fmt: skip


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel in a run."""

    kernel: str
    sort: str
    calls: int
    milliseconds: float
    share: float
    """Of all kernels' time."""
    rate: str
    """Operations or bytes a second; '' where they are not known."""


@dataclass(frozen=True)
class SortTime:
    """All kernels of a sort. `tflop`: what a forward must do of it, 0 where nothing is counted."""

    sort: str
    calls: int
    milliseconds: float
    tflop: float
    precision: str


@dataclass(frozen=True)
class Launch:
    """One kernel on the card, and what the operator that launched it had to do."""

    kernel: str
    milliseconds: float
    operations: float
    size_bytes: float


@dataclass(frozen=True)
class Profile:
    kernels: list[KernelTime]
    sorts: list[SortTime]


@torch.inference_mode()
def profile(model: nn.Module, given: dict[str, Any]) -> Profile:
    """One warm forward with every lever pulled; the dearest kernels and the rest as one line."""
    for kind in passing("cuda")[:1]:
        narrow(model, kind, "cuda")
    accelerated = accelerate([model], "cuda", Levers())
    assert accelerated.blocks is not None, "it compiles on a card"
    model(**given)
    accelerated.end_job()
    accelerated.finish()
    say(f"kernels: compiled, attention by {accelerated.attention}")
    for _ in range(2):
        model(**given)
    _, events = record(lambda: model(**given), with_shapes=True)
    accelerated.blocks.remove()
    seen = launches(events)
    return Profile(by_kernel(seen), by_sort(seen, precision_of(model)))


def launches(events: Iterable[dict[str, Any]]) -> list[Launch]:
    """Kernels and copies of a chrome trace with the work of their operators."""
    events = list(events)
    operators = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    on_card = [event for event in events if event.get("cat") in ON_CARD]
    shared: dict[Any, int] = {}
    for event in on_card:
        launcher = event["args"].get("External id")
        shared[launcher] = shared.get(launcher, 0) + (event["cat"] == "kernel")
    found = []
    for event in on_card:
        launcher = event["args"].get("External id")
        # An operator with several kernels (a split product and its sum) tells nothing about one of them.
        operator = operators.get(launcher) if shared[launcher] == 1 else None
        operations, size_bytes = _work(operator, sort_of(event["name"])) if operator else (0.0, 0.0)
        found.append(Launch(event["name"], event["dur"] / 1000, operations, size_bytes))
    return found


def table(times: Iterable[tuple[str, int, float]], rates: Mapping[str, str] = NO_RATES) -> list[KernelTime]:
    """(kernel, calls, milliseconds) of everything, as the dearest `SHOWN`, the rest as one line, and all."""
    times = sorted((line for line in times if line[2] > 0), key=lambda line: -line[2])
    total = sum(spent for _, _, spent in times)
    lines = [
        KernelTime(name[:60], sort_of(name), calls, spent, spent / total, rates.get(name, ""))
        for name, calls, spent in times[:SHOWN]
    ]
    rest = times[SHOWN:]
    if rest:
        spent = sum(line[2] for line in rest)
        lines.append(KernelTime(f"{len(rest)} others", "", sum(line[1] for line in rest), spent, spent / total, ""))
    return [*lines, KernelTime("all", "", sum(line[1] for line in times), total, 1.0, "")]


def by_kernel(seen: Iterable[Launch]) -> list[KernelTime]:
    """The table of what was launched, with what each kernel achieved."""
    named: dict[str, list[Launch]] = {}
    for launch in seen:
        named.setdefault(launch.kernel, []).append(launch)
    times = [(name, len(each), sum(launch.milliseconds for launch in each)) for name, each in named.items()]
    return table(times, {name: rate_of(each) for name, each in named.items()})


def rate_of(launches: Iterable[Launch]) -> str:
    """Operations or bytes a second of launches of one kernel; '' if those of any are not known."""
    launches = list(launches)
    spent = sum(launch.milliseconds for launch in launches)
    if all(launch.operations for launch in launches):
        return f"{sum(launch.operations for launch in launches) / spent / 1e9:.0f} TFLOP/s"
    if all(launch.size_bytes for launch in launches):
        return f"{sum(launch.size_bytes for launch in launches) / spent / 1e6:.0f} GB/s"
    return ""


def by_sort(seen: Iterable[Launch], precision: str) -> list[SortTime]:
    """Time by sort, with the operations that a forward must do: those are counted from the model, not the kernels."""
    work = forward_work(LATENT.tokens)
    must = {"product": work.linear / TERA, "attention": work.attention / TERA}
    grouped: dict[str, list[Launch]] = {}
    for launch in seen:
        grouped.setdefault(sort_of(launch.kernel), []).append(launch)
    lines = [
        SortTime(sort, len(each), sum(launch.milliseconds for launch in each), must.get(sort, 0.0), precision)
        for sort, each in grouped.items()
    ]
    return sorted(lines, key=lambda line: -line.milliseconds)


def _work(operator: Mapping[str, Any], sort: str) -> tuple[float, float]:
    """(operations, bytes) of an operator, 0 for what its shapes do not tell."""
    args = operator["args"]
    shapes, types = args.get("Input Dims", []), args.get("Input type", [])
    tensors = [shape for shape in shapes if shape and isinstance(shape[0], int)]
    if sort == "product":
        return _product_work(tensors), 0.0
    if sort == "attention":
        return _attention_work(tensors), 0.0
    pairs = zip(shapes, types, strict=False)
    sizes = [math.prod(shape) * WIDTHS.get(kind, 0) for shape, kind in pairs if shape and isinstance(shape[0], int)]
    return 0.0, float(sum(sizes)) if sort == "fused" else 0.0


def _product_work(tensors: list[list[int]]) -> float:
    flat = [shape for shape in tensors if len(shape) == 2]
    for a, b in itertools.pairwise(flat):
        if a[1] == b[0]:
            return 2.0 * a[0] * a[1] * b[1]
    return 0.0


def _attention_work(tensors: list[list[int]]) -> float:
    """4-dimensional query and key, tokens before or after the heads: there are more tokens than heads."""
    wide = [shape for shape in tensors if len(shape) == 4]
    return 4.0 * math.prod(wide[0]) * max(wide[1][1:3]) if len(wide) > 1 else 0.0
