"""Our arm: the request through ModelHandler, as the worker runs it; or the whole worker, from JSON to a file."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.jobs import JOBS, Job, as_real, located
from bench.random_parts import RandomParts
from bench.watch import Watch, WatchedParts
from engine.attention import WanProcessor
from engine.backends import Backend, load_backend
from engine.card import Card
from engine.compiling import graph_count
from engine.inputs import CHILDREN
from engine.linear8 import Linear8
from engine.profile import Profile
from engine.progress import Progress, Update
from engine.settings import Settings
from engine.spares import SPARES
from engine.speed import precision_of
from handler import Worker, run
from model_handler import ModelHandler


class CardParts(RandomParts):
    """Drawn on the card also where they are wanted on the host: drawing 14 billion numbers there takes minutes."""

    def load(self, name: str, device: str = "cpu") -> Any:
        part = super().load(name, "cuda" if torch.cuda.is_available() else device)
        return part.to(device) if isinstance(part, torch.nn.Module) else part


@dataclass(frozen=True)
class Whole:
    """One job through handler.run. What `generate_s` does not cover is the worker's own: parse, fetch, deliver."""

    seconds: float
    generate_s: float
    stages_s: dict[str, float]


class Arm:
    """A worker with `settings`, warm after the first `run`."""

    def __init__(
        self,
        mode: str,
        settings: Settings,
        twins: Path,
        watch: Watch,
        *,
        is_small: bool = False,
        load: Callable[[Profile, Any, Card], Backend] = load_backend,
        send: Callable[[Update], None] | None = None,
    ) -> None:
        """`is_small`: the twin's weights and sizes, for a CPU. `load` as ModelHandler takes it, `send` as Progress."""
        self.job: Job = JOBS[mode]
        profile, rest = located(mode, twins)
        self._parts = WatchedParts(rest if is_small else CardParts(profile, rest), watch)
        self._profile = self._parts.profile
        self._is_small = is_small
        self._number = 0
        self._settings, self._twins = settings, twins
        self._send = send
        self._films = tempfile.TemporaryDirectory(prefix="bench-")
        self._models = _TimedModels(settings, load)
        SPARES.keep(CHILDREN)  # as handler.main does
        self.notes: tuple[str, ...] = ()

    def draw(self) -> None:
        """The next job's pictures; the last one's film goes, and what it left to be compiled is there.

        Nobody should count these as its work: 20 ms, 10, and seconds once.
        """
        self._models.finish()
        self.job.given(self._number + 1)
        for folder in Path(self._films.name).iterdir():
            shutil.rmtree(folder)

    def run(self, layout: str | None = None, steps: int | None = None) -> dict[str, float]:
        """One job; its stages, the file's writing in `decode` because it is written as it is decoded."""
        progress = Progress(self._send)
        self._number += 1
        task = self.job.task(self._profile, self._number, self._changes(layout, steps))
        folder = Path(self._films.name) / str(self._number)
        folder.mkdir()
        made = self._models.generate(task, self._parts, folder, progress)
        self.notes = made.notes
        return progress.timings_s

    def run_whole(self, layout: str | None = None, steps: int | None = None) -> Whole:
        """One job from JSON with data-URI pictures to a verified file on the disk. The models must be loaded.

        Raises:
            RuntimeError: they were not, and the tiny twin's took the job.
        """
        self._number += 1
        payload = self.job.whole(self._number, self._changes(layout, steps))
        progress, loads = Progress(), self._models.loads
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as found:
            weights_dir = self._twins if self._is_small else as_real(self._profile, self._twins, Path(found))
            # No precision: the folder holds the bf16 bake that the models were drawn from.
            here = replace(self._settings, weights_dir=weights_dir, output_dir=Path(made), precision=None)
            worker = Worker(here, self._models)
            started = time.perf_counter()
            run(payload, job_id=f"bench-{self._number}", worker=worker, progress=progress)
            seconds = time.perf_counter() - started
        if self._models.loads != loads:
            raise RuntimeError("the models were not loaded: this was a job of the tiny twin")
        return Whole(seconds, self._models.last_s, progress.timings_s)

    def in_effect(self) -> dict[str, Any]:
        """What really ran, read from the models: settings may ask for more than a card can do."""
        model = self._parts.models.get("transformer")
        if model is None:
            return {"precision": "fp16", "attention": "native", "linear8": "", "graphs": graph_count()}
        processor = model.get_submodule("blocks.0.attn1").processor
        kinds = {layer.kind for layer in model.modules() if isinstance(layer, Linear8)}
        return {
            "precision": precision_of(model),
            "attention": processor.kernel if isinstance(processor, WanProcessor) else "diffusers' own",
            "linear8": "+".join(sorted(kinds)),
            "graphs": graph_count(),
            "compiling": self._models.compiling(),
        }

    def close(self) -> None:
        self._films.cleanup()
        self._parts.models.clear()
        self._models.unload_all()

    def _changes(self, layout: str | None, steps: int | None) -> dict[str, Any]:
        return self.job.changes(layout, steps, is_small=self._is_small)


class _TimedModels(ModelHandler):
    """Knows how long its last job took."""

    last_s = 0.0

    def compiling(self) -> dict[str, float]:
        """What compiling has cost since the load: seconds behind, seconds waited, forwards without and with a graph."""
        for loaded in self._loaded.values():
            accelerated = loaded.backend._placed.accelerated
            if accelerated is not None and accelerated.account is not None:
                return accelerated.account._asdict()
        return {}

    def generate(self, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return super().generate(*args)
        finally:
            self.last_s = time.perf_counter() - started
