"""Two bf16 experts on one card: what changing between them costs, and that the pixels do not notice.

The reference holds both on the card and needs no cap. Then the very same weights move to the host's page-locked
buffers, and one set of buffers on the card serves both, as below a cap. A line is said after every step.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.ceilings import copy_gb_s
from bench.say import say
from bench.timing import begin_peak, between, mark, median, peak_reserved_gib
from engine.card import Levers
from engine.compiling import CompiledBlocks
from engine.experts import Experts, FixedExperts, RollingExperts
from engine.speed import accelerate

PHASES = (("high", 2), ("low", 4))
SHORT = (("high", 1), ("low", 1))  # enough to compile, and to fill the host's pages
REPEATS = 2
PATIENCE_S = 300.0  # the first forward waits for its graph, where a job would go on eagerly


@dataclass(frozen=True)
class Swap:
    """Denoising seconds of a warm 6-forward job."""

    name: str
    seconds: float
    ratio: float
    """To the experts that stay."""
    visible_s: float
    """Beyond the experts that stay."""
    forwards_s: tuple[float, ...]
    """Of each forward, with the wait for its expert before it."""
    moved_gb: float
    """Host to device in one job."""
    equal: bool
    """torch.equal of every forward to the first arm's."""
    reserved_gib: float


class SlowBus(RollingExperts):
    """Rolling experts behind a slower bus: each piece is copied as often as makes its copy take that long.

    Real copies, so that the bus and the copy engine are as busy as they would be.
    """

    def __init__(self, experts: Mapping[str, nn.Module], device: str, slower: float) -> None:
        """`slower`: seconds of a copy over seconds of it on this machine, 1 or more."""
        super().__init__(experts, device)
        self._extra = slower - 1.0
        self.bytes_again = 0

    def _copy(self, expert: str, i: int) -> None:
        super()._copy(expert, i)
        card, host = self._card[self._slot(i)], self._host[expert].buffers[i]
        left = round(self._extra * host.numel())
        self.bytes_again += left
        while left > 0:
            part = min(left, host.numel())
            card[:part].copy_(host[:part], non_blocking=True)
            left -= part


def compare(
    load: Callable[[str], nn.Module],
    given: Mapping[str, Any],
    device: str = "cuda",
    backend: str = "inductor",
    bus_gb_s: float | None = None,
) -> list[Swap]:
    """`load`: expert's name -> transformer on the card, called once each. Fixed, rolling, and waiting for the copy.

    `bus_gb_s`: emulate a bus of that rate; None: this machine's own.
    """
    models = {}
    for name, _ in PHASES:
        models[name] = load(name)
        say(f"swap: drew the {name} expert")
    accelerate(list(models.values()), device, Levers(compile=False))
    reference, first = _measure("both on the card", FixedExperts(models), list(models.values()), given, backend, None)
    begin_peak()
    rolling = _rolling(models, device, bus_gb_s)
    models.clear()
    say("swap: both experts in page-locked host memory")
    results = [first]
    for waits, name in ((False, "rolling swap"), (True, "blocking swap")):
        runs = (name, rolling, [rolling.model], given, backend, first)
        _, result = _measure(*runs, reference, waits=waits)
        results.append(result)
    rolling.unload()
    return results


def _rolling(models: dict[str, nn.Module], device: str, bus_gb_s: float | None) -> RollingExperts:
    if bus_gb_s is None:
        return RollingExperts(models, device)
    own = copy_gb_s(device)
    say(f"swap: this bus has {own:.1f} GB/s, emulating {bus_gb_s:.1f}")
    return SlowBus(models, device, max(1.0, own / bus_gb_s))


def _measure(
    name: str,
    experts: Experts,
    models: list[nn.Module],
    given: Mapping[str, Any],
    backend: str,
    fixed: Swap | None,
    reference: list[torch.Tensor] | None = None,
    *,
    waits: bool = False,
) -> tuple[list[torch.Tensor], Swap]:
    blocks = CompiledBlocks(models, backend=backend, patience_s=PATIENCE_S)
    _job(experts, given, SHORT, waits=waits)
    say(f"swap: {name}, warm")
    begin_peak()
    moved, runs = experts.bytes_moved, []
    for _ in range(REPEATS):
        runs.append(_job(experts, given, PHASES, waits=waits))
        say(f"swap: {name}, {sum(runs[-1][1]):.3f} s, forwards {_short(runs[-1][1])}")
    blocks.remove()
    reference = reference or runs[0][0]
    seconds = median([sum(spent) for _, spent in runs])
    result = Swap(
        name,
        seconds,
        seconds / fixed.seconds if fixed else 1.0,
        seconds - fixed.seconds if fixed else 0.0,
        tuple(median(list(each)) for each in zip(*(spent for _, spent in runs), strict=True)),
        (experts.bytes_moved - moved) / REPEATS / 1e9,
        all(torch.equal(a, b) for outputs, _ in runs for a, b in zip(outputs, reference, strict=True)),
        peak_reserved_gib(),
    )
    said = f"{result.ratio:.3f} of both on the card, {result.moved_gb:.1f} GB a job, equal: {result.equal}"
    say(f"swap: {name}: {result.seconds:.3f} s, {said}")
    return reference, result


@torch.inference_mode()
def _job(
    experts: Any, given: Mapping[str, Any], phases: tuple[tuple[str, int], ...], *, waits: bool
) -> tuple[list[torch.Tensor], list[float]]:
    """Forwards, each on the output before it as a sampler would have it; the outputs and the seconds of each.

    `waits`: an expert is brought in whole before its first forward, and nothing hides the copy.
    """
    latents, outputs, marks = given["hidden_states"], [], [mark()]
    for i, (expert, forwards) in enumerate(phases):
        then = phases[(i + 1) % len(phases)][0]
        if waits:
            _bring(experts, expert)
        with experts.use(expert, 0 if waits else forwards, None if waits else then) as model:
            for _ in range(forwards):
                out = model(**{**given, "hidden_states": latents})[0]
                latents = torch.cat([out, latents[:, 16:]], dim=1)
                outputs.append(out)
                marks.append(mark())
    return [out.cpu() for out in outputs], [between(a, b) for a, b in itertools.pairwise(marks)]


def _bring(experts: RollingExperts, expert: str) -> None:
    experts.prefetch(expert)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _short(spent: list[float]) -> str:
    return " ".join(f"{one:.2f}" for one in spent)
