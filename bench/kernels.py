"""Where the time of one forward goes, kernel by kernel: what to make faster next."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine import attention
from engine.compiling import CompiledBlocks
from engine.linear8_check import self_test
from engine.speed import narrow

SHOWN = 16


@dataclass(frozen=True)
class KernelTime:
    kernel: str
    calls: int
    milliseconds: float
    share: float
    """Of all kernels' time in the forward."""


@torch.inference_mode()
def profile(model: nn.Module, given: dict[str, Any]) -> list[KernelTime]:
    """One warm forward with every lever pulled; the dearest kernels and the rest as one line."""
    for kind in self_test("cuda").passed[:1]:
        narrow(model, kind, "cuda")
    attention.install(model, attention.choose("cuda").name)
    blocks = CompiledBlocks([model])
    model(**given)
    blocks.wait()
    for _ in range(2):
        model(**given)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        model(**given)
        torch.cuda.synchronize()
    blocks.remove()
    times = [(event.key, event.count, event.self_device_time_total / 1000) for event in seen.key_averages()]
    return table(times)


def table(times: list[tuple[str, int, float]]) -> list[KernelTime]:
    """(kernel, calls, milliseconds) of everything, as the dearest `SHOWN` and the rest."""
    times = sorted((line for line in times if line[2] > 0), key=lambda line: -line[2])
    total = sum(spent for _, _, spent in times)
    lines = [KernelTime(name[:60], calls, spent, spent / total) for name, calls, spent in times[:SHOWN]]
    rest = times[SHOWN:]
    if rest:
        spent = sum(line[2] for line in rest)
        lines.append(KernelTime(f"{len(rest)} others", sum(line[1] for line in rest), spent, spent / total))
    return [*lines, KernelTime("all", sum(line[1] for line in times), total, 1.0)]
