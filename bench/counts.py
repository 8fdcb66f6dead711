"""What a job does, counted on the tiny twins: for machines without a card, where seconds say nothing.

Forwards, encoder calls, VAE stage runs, graphs and bytes moved are the same numbers at any size, so that a change
which makes jobs dearer shows here first.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.jobs import JOBS, Job, located
from bench.timing import WATCHED
from engine.compiling import Artefacts, CompiledBlocks, graph_count
from engine.experts import RollingExperts
from engine.progress import Progress
from engine.settings import Settings
from model_handler import ModelHandler

SMALL_LATENT = (2, 4, 4)


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
        if name in WATCHED:
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


class _Warm(Artefacts):
    """As if kept graphs were there: every size is compiled when it is met."""

    def load(self) -> bool:
        return True


def count_experts(twins: Path) -> dict[str, float]:
    """Graphs and experts' worth of bytes moved by a warm two-phase job, when the experts take turns."""
    _, rest = located("svi_endframe", twins)
    models = {"high": rest.load("transformer"), "low": rest.load("transformer_2")}
    config = models["high"].config
    given = {
        "hidden_states": torch.randn(1, config.in_channels, *SMALL_LATENT, dtype=models["high"].dtype),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, dtype=models["high"].dtype),
    }
    experts = RollingExperts(models, "cpu")
    size_bytes = experts.repair("high")
    torch._dynamo.utils.counters.clear()
    blocks = CompiledBlocks([experts.model], _Warm(Path(), "counts"), backend="eager")
    moved = []
    for _ in range(2):
        before = experts.bytes_moved
        for name, forwards, then in (("high", 2, "low"), ("low", 4, "high")):
            with torch.inference_mode(), experts.use(name, forwards, then) as model:
                for _ in range(forwards):
                    model(**given)
        moved.append((experts.bytes_moved - before) / size_bytes)
    blocks.remove()
    return {"graphs": graph_count(), "experts moved, warm job": moved[-1]}


def count_all(twins: Path) -> dict[str, Any]:
    """Every count, by mode."""
    counts: dict[str, Any] = {mode: count_jobs(mode, twins) for mode in JOBS}
    counts["experts taking turns"] = count_experts(twins)
    return counts
