"""Our arm: the request through ModelHandler, as the worker runs it."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.jobs import JOBS, Job, located
from bench.random_parts import RandomParts
from bench.timing import Watch, WatchedParts
from engine.attention import WanProcessor
from engine.compiling import graph_count
from engine.progress import Progress
from engine.settings import Settings
from engine.speed import precision_of
from model_handler import ModelHandler


class CardParts(RandomParts):
    """Drawn on the card also where they are wanted on the host: drawing 14 billion numbers there takes minutes."""

    def load(self, name: str, device: str = "cpu") -> Any:
        part = super().load(name, "cuda" if torch.cuda.is_available() else device)
        return part.to(device) if isinstance(part, torch.nn.Module) else part


class Arm:
    """A worker with `settings`, warm after the first `run`."""

    def __init__(self, mode: str, settings: Settings, twins: Path, watch: Watch) -> None:
        self.job: Job = JOBS[mode]
        profile, rest = located(mode, twins)
        self._parts = WatchedParts(CardParts(profile, rest), watch)
        self._profile = profile
        self._number = 0
        self._models = ModelHandler(settings)
        self.notes: tuple[str, ...] = ()

    def run(self) -> dict[str, float]:
        """One job; its stages, the file's writing in `decode` because it is written as it is decoded."""
        progress = Progress()
        self._number += 1
        task = self.job.task(self._profile, self._number)
        with tempfile.TemporaryDirectory() as folder:
            made = self._models.generate(task, self._parts, Path(folder), progress)
        self.notes = made.notes
        return progress.timings_s

    def in_effect(self) -> dict[str, Any]:
        """What really ran, read from the models: settings may ask for more than a card can do."""
        model = self._parts.models.get("transformer")
        if model is None:
            return {"precision": "fp16", "attention": "native", "graphs": graph_count()}
        processor = model.get_submodule("blocks.0.attn1").processor
        kernel = processor.kernel if isinstance(processor, WanProcessor) else "diffusers' own"
        return {"precision": precision_of(model), "attention": kernel, "graphs": graph_count()}

    def close(self) -> None:
        self._parts.models.clear()
        self._models.unload_all()
