"""Two bf16 experts on one card: what changing between them costs, and that the pixels do not notice.

The reference holds both on the card and needs no cap; the others must run below one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.timing import begin_peak, between, mark, median
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


def compare(
    load: Callable[[str], nn.Module],
    given: Mapping[str, Any],
    device: str = "cuda",
    backend: str = "inductor",
    repeats: int = 3,
) -> list[Swap]:
    """`load`: expert's name -> transformer in host memory. Fixed, rolling, and changing without hints."""
    fixed = {name: load(name).to(device) for name, _ in PHASES}
    reference, first = _measure("both on the card", FixedExperts(fixed), list(fixed.values()), given, backend, repeats)
    fixed.clear()
    begin_peak()
    rolling = RollingExperts({name: load(name) for name, _ in PHASES}, device)
    results = [first]
    for is_hinted, name in ((True, "rolling swap"), (False, "blocking swap")):
        outputs, result = _measure(name, rolling, [rolling.model], given, backend, repeats, is_hinted)
        equal = all(torch.equal(a, b) for a, b in zip(outputs, reference, strict=True))
        results.append(replace(result, equal=equal))
    rolling.unload()
    return results


def _measure(
    name: str,
    experts: Experts,
    models: list[nn.Module],
    given: Mapping[str, Any],
    backend: str,
    repeats: int,
    is_hinted: bool = True,
) -> tuple[list[torch.Tensor], Swap]:
    device = given["hidden_states"].device.type
    kernel = attention.choose(device).name
    for model in models:
        attention.install(model, kernel)
    blocks = CompiledBlocks(models, backend=backend)
    _job(experts, is_hinted, given)
    blocks.wait()
    _, first_s = _job(experts, is_hinted, given)
    before = experts.bytes_moved
    runs = [_job(experts, is_hinted, given) for _ in range(repeats)]
    moved = (experts.bytes_moved - before) / repeats
    blocks.remove()
    return runs[-1][0], Swap(name, first_s, median([spent for _, spent in runs]), moved / 1e9, equal=True)


@torch.inference_mode()
def _job(experts: Experts, hinted: bool, given: Mapping[str, Any]) -> tuple[list[torch.Tensor], float]:
    """Six forwards, each on the output before it as a sampler would have it; the outputs and the seconds."""
    latents, outputs = given["hidden_states"], []
    begin = mark()
    for i, (expert, forwards) in enumerate(PHASES):
        then = PHASES[(i + 1) % len(PHASES)][0]
        with experts.use(expert, forwards if hinted else 0, then if hinted else None) as model:
            for _ in range(forwards):
                out = model(**{**given, "hidden_states": latents})[0]
                latents = torch.cat([out, latents[:, 16:]], dim=1)
                outputs.append(out)
    return [out.cpu() for out in outputs], between(begin, mark())
