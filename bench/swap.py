"""Two bf16 experts on one card: what changing between them costs, and that the pixels do not notice.

The reference holds both on the card and needs no cap; the others must run below one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.ladder import inputs
from bench.timing import median
from engine import attention
from engine.compiling import CompiledBlocks
from engine.experts import Experts, FixedExperts, RollingExperts

PHASES = (("high", 2), ("low", 4))


@dataclass(frozen=True)
class Swap:
    """Denoising seconds of a 6-forward job, of its first run and warm."""

    name: str
    first_s: float
    warm_s: float
    moved_gb: float
    """Host to device in one warm job."""
    equal: bool
    """torch.equal of every forward to the first arm's."""


def compare(load: Callable[[str], nn.Module], device: str = "cuda", repeats: int = 3) -> list[Swap]:
    """`load`: expert's name -> transformer in host memory. Fixed, rolling, and changing without hints."""
    results: list[Swap] = []
    reference: list[torch.Tensor] = []
    fixed = FixedExperts({name: load(name).to(device) for name, _ in PHASES})
    results.append(_measure("both on the card", fixed, fixed._models.values(), True, reference, device, repeats))
    del fixed
    torch.cuda.empty_cache()
    rolling = RollingExperts({name: load(name) for name, _ in PHASES}, device)
    for hinted, name in ((True, "rolling swap"), (False, "blocking swap")):
        results.append(_measure(name, rolling, [rolling.model], hinted, reference, device, repeats))
    rolling.unload()
    return results


def _measure(
    name: str, experts: Experts, models: Any, hinted: bool, reference: list[torch.Tensor], device: str, repeats: int
) -> Swap:
    kernel = attention.choose(device).name
    for model in models:
        attention.install(model, kernel)
    blocks = CompiledBlocks(list(models))
    _job(experts, hinted, device)
    blocks.wait()
    _, first_s = _job(experts, hinted, device)
    before = experts.bytes_moved
    runs = [_job(experts, hinted, device) for _ in range(repeats)]
    moved = (experts.bytes_moved - before) / repeats
    outputs = runs[-1][0]
    reference.extend(outputs if not reference else [])
    equal = all(torch.equal(a, b) for a, b in zip(outputs, reference, strict=True))
    blocks.remove()
    return Swap(name, first_s, median([spent for _, spent in runs]), moved / 1e9, equal)


@torch.inference_mode()
def _job(experts: Experts, hinted: bool, device: str) -> tuple[list[torch.Tensor], float]:
    """Six forwards, each on the output before it as a sampler would have it; the outputs and the seconds."""
    given: Mapping[str, Any] = inputs(device)
    latents, outputs = given["hidden_states"], []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i, (expert, forwards) in enumerate(PHASES):
        then = PHASES[(i + 1) % len(PHASES)][0]
        with experts.use(expert, forwards if hinted else 0, then if hinted else None) as model:
            for _ in range(forwards):
                out = model(**{**given, "hidden_states": latents})[0]
                latents = torch.cat([out, latents[:, 16:]], dim=1)
                outputs.append(out.cpu())
    end.record()
    end.synchronize()
    return outputs, begin.elapsed_time(end) / 1000
