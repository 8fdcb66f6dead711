"""What a job does, counted on the tiny twins: for machines without a card, where seconds say nothing.

Forwards, encoder calls, VAE stage runs, graphs and bytes moved are the same numbers at any size, so that a change
which makes jobs dearer shows here first.
"""

import copy
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from bench.jobs import JOBS, VIDEO_480P, Job, located
from bench.swap import PATIENCE_S
from bench.watch import FORWARDS, PICTURE, TEXT
from engine.compiling import CompiledBlocks, graph_count
from engine.experts import FixedExperts, RollingExperts
from engine.memo_encode import MemoEncoder
from engine.progress import Progress
from engine.settings import Settings
from model_handler import ModelHandler

BLOCKS = 40  # of the 14B transformers
SMALL_LATENT = (2, 4, 4)
SIDE = 32  # pixels


@dataclass(frozen=True)
class CountedParts:
    """Parts that count the calls of what they load, under the component's name."""

    parts: Any
    calls: Counter[str]

    @property
    def profile(self) -> Any:
        return self.parts.profile

    def load(self, name: str, device: str = "cpu") -> Any:
        self.calls[f"load {name}"] += 1
        part = self.parts.load(name, device)
        if name in (*FORWARDS, *TEXT, *PICTURE):
            self._count(name, part)
        if name == "vae" and hasattr(part.encoder, "conv_in") and hasattr(part.encoder, "down_blocks"):
            self._count("vae.encoder first stage", part.encoder.conv_in)
            self._count("vae.encoder last stage", part.encoder.conv_out)
            self._count("vae.decoder", part.decoder)
        return part

    def _count(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.calls.update([name]))


def count_jobs(mode: str, twins: Path, **changes: Any) -> list[dict[str, int]]:
    """Calls made by the first and the second of two equal jobs; loads of the first are among them."""
    job: Job = JOBS[mode]
    _, rest = located(mode, twins)
    calls: Counter[str] = Counter()
    parts = CountedParts(rest, calls)
    models = ModelHandler(Settings(weights_dir=twins))
    task = job.task(rest.profile, 1, {**job.small, **changes})
    counted = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            models.generate(task, parts, Path(folder), Progress())
        counted.append(dict(sorted(calls.items())))
        calls.clear()
    models.unload_all()
    return counted


def count_experts(twins: Path) -> dict[str, Any]:
    """Two experts of 40 blocks over two warm jobs: graphs of each, experts' worth of bytes moved, and repair."""
    given, experts = _experts(twins)
    plain = {name: copy.deepcopy(model) for name, model in experts.items()}
    rolling = BreakingExperts(experts, "cpu")
    size_bytes = rolling.repair("high")
    torch._dynamo.utils.counters.clear()
    blocks = CompiledBlocks([rolling.model], backend="eager", patience_s=PATIENCE_S)
    graphs, moved = [], []
    for _ in range(2):
        before = graph_count(), rolling.bytes_moved
        _job(rolling, given)
        graphs.append(graph_count() - before[0])
        moved.append((rolling.bytes_moved - before[1]) / size_bytes)
    blocks.remove()
    expected = _job(FixedExperts(plain), given)
    rolling.breaks_at = ("low", BLOCKS // 2)
    broke = False
    try:
        _job(rolling, given)
    except InjectedFault:
        broke = True
    rolling.breaks_at = None
    equal = all(torch.equal(a, b) for a, b in zip(_job(rolling, given), expected, strict=True))
    return {
        "graphs, first job": graphs[0],
        "graphs, second job": graphs[1],
        "experts moved, second job": moved[1],
        "experts moved, both resident": _resident_moves(plain, given) / size_bytes,
        "a fault broke the swap": broke,
        "equal after the fault": equal,
    }


def count_encodes(twins: Path) -> dict[str, tuple[int, ...]]:
    """Runs of each stage of the memoised encode of 81 frames, of 21 chunks: with a start, with start and end."""
    vae = located("svi_endframe", twins)[1].load("vae")
    memo = MemoEncoder(vae)
    generator = torch.Generator().manual_seed(5)
    counted = {}
    for name, frames in (("start", (0,)), ("start and end", (0, -1))):
        pixels = torch.zeros(1, 3, VIDEO_480P.frames, SIDE, SIDE)
        for frame in frames:
            pixels[:, :, frame] = torch.rand(1, 3, SIDE, SIDE, generator=generator) * 2 - 1
        with torch.inference_mode():
            memo.encode(pixels)
        assert memo.last is not None
        counted[name] = memo.last.stage_runs
    return counted


def count_all(twins: Path) -> dict[str, Any]:
    """Every count, by mode."""
    counts: dict[str, Any] = {mode: count_jobs(mode, twins) for mode in JOBS}
    return {**counts, "experts taking turns": count_experts(twins), "stage runs of an encode": count_encodes(twins)}


class InjectedFault(Exception):
    """What `BreakingExperts` raises."""


class BreakingExperts(RollingExperts):
    """Experts whose copy of one piece fails half-way: neither expert's bytes are left in its slot."""

    breaks_at: tuple[str, int] | None = None
    """Expert and piece."""

    def _copy(self, expert: str, i: int) -> None:
        if (expert, i) == self.breaks_at:
            self._card[self._slot(i)].fill_(255)
            raise InjectedFault
        super()._copy(expert, i)


def _experts(twins: Path) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """An input, and two experts of the twin's class and width with as many blocks as the real ones."""
    config = located("svi_endframe", twins)[1].load("transformer").config
    models = {}
    for seed, name in enumerate(("high", "low")):
        torch.manual_seed(seed)
        model = WanTransformer3DModel.from_config({**config, "num_layers": BLOCKS})
        models[name] = model.eval().requires_grad_(False)
    given = {
        "hidden_states": torch.randn(1, config.in_channels, *SMALL_LATENT),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim),
    }
    return given, models


@torch.inference_mode()
def _job(experts: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Six forwards, announced as a sampler announces them."""
    outputs = []
    for name, forwards, then in (("high", 2, "low"), ("low", 4, "high")):
        with experts.use(name, forwards, then) as model:
            outputs += [model(**given)[0] for _ in range(forwards)]
    return outputs


def _resident_moves(models: dict[str, nn.Module], given: dict[str, torch.Tensor]) -> int:
    fixed = FixedExperts(models)
    _job(fixed, given)
    return fixed.bytes_moved
