"""ModelHandler: loads a profile when the first job needs it, keeps what fits the card, runs one job at a time."""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from engine import video
from engine.backends import Backend, Task, load_backend
from engine.card import Card, Levers
from engine.outputs import Frames, Images, MediaFile
from engine.pictures import write_picture
from engine.profiles import Profile
from engine.progress import Progress
from engine.settings import Settings
from engine.weights import Parts
from schemas.errors import GpuFault, OutOfMemory, WorkerError
from schemas.image_schema import ImageRequest

log = logging.getLogger(__name__)

GIB = 2**30
CARD_GIB = 44.5  # what a 48 GB card leaves to us with ECC on; also the budget pretended on a machine without a card


@dataclass(frozen=True)
class Generated:
    """What one task left in the work folder, and what it has to say about it."""

    files: tuple[MediaFile, ...]
    notes: tuple[str, ...] = ()
    state: str | None = None


class ModelHandler:
    """The card's only door. Everything that touches the card happens inside `generate`, under its lock."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Profile, Parts, Card], Backend] = load_backend,
    ) -> None:
        self._settings = settings
        self._load = load
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, tuple[Profile, Backend]] = OrderedDict()
        self.loads = 0  # profiles loaded since the start; a warm job adds none

    def generate(self, task: Task, parts: Parts, folder: Path, progress: Progress) -> Generated:
        """Run one task and leave its verified files in `folder`.

        If the card runs out of memory, everything but this profile is unloaded and the task runs once more.

        Raises:
            WorkerError: the most specific one. Of memory, only loaded profiles keep theirs.
        """
        with self._lock:
            try:
                return self._attempt(task, parts, folder, progress)
            except OutOfMemory:
                log.warning("out of memory; once more with the card to itself")
            # Out here the exception is gone, and with it the tensors that its frames held.
            self._evict_all_but(task.profile)
            return self._attempt(task, parts, folder, progress)

    def _attempt(self, task: Task, parts: Parts, folder: Path, progress: Progress) -> Generated:
        failed = True
        try:
            with progress.stage("load"):
                backend = self._backend(task.profile, parts)
            made = self._write(backend.generate(task, progress), task, folder)
            failed = False
            return made
        except RuntimeError as error:
            fault = card_error(error)
            failed = not isinstance(fault, GpuFault)  # a poisoned context must not be touched again
            if fault is None:
                raise
            raise fault from error
        finally:
            if failed:
                _give_back_cache()

    def unload_all(self) -> None:
        """Drop every loaded profile."""
        with self._lock:
            while self._loaded:
                self._evict_oldest()

    def _backend(self, profile: Profile, parts: Parts) -> Backend:
        if profile.folder in self._loaded:
            self._loaded.move_to_end(profile.folder)
            return self._loaded[profile.folder][1]
        budget = self._budget_gib()
        self._cap_memory()
        while self._loaded and self._used_gib() + profile.vram_gib > budget:
            self._evict_oldest()
        backend = self._load(profile, parts, self._card(int((budget - self._used_gib()) * GIB)))
        self.loads += 1
        self._loaded[profile.folder] = (profile, backend)
        log.info("loaded %s", profile.name)
        return backend

    def _evict_all_but(self, profile: Profile) -> None:
        for _ in range(len(self._loaded)):
            if next(iter(self._loaded)) == profile.folder:
                self._loaded.move_to_end(profile.folder)
            else:
                self._evict_oldest()
        _give_back_cache()

    def _evict_oldest(self) -> None:
        _, (profile, backend) = self._loaded.popitem(last=False)
        backend.unload()
        del backend
        _give_back_cache()
        log.info("unloaded %s", profile.name)

    def _used_gib(self) -> float:
        return sum(profile.vram_gib for profile, _ in self._loaded.values())

    def _card(self, budget_bytes: int) -> Card:
        settings = self._settings
        levers = Levers(settings.attention, settings.compile, settings.cache_dir)
        return Card(device(), budget_bytes, settings.precision, levers)

    def _cap_memory(self) -> None:
        """Hold the process to WORKER_VRAM_GIB, so that a shared or emulated card is not overrun."""
        import torch

        if self._settings.vram_gib is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._settings.vram_gib / card_gib()))

    def _budget_gib(self) -> float:
        return self._settings.vram_gib or card_gib()

    def _write(self, output: Images | Frames, task: Task, folder: Path) -> Generated:
        if isinstance(output, Frames):
            file = video.write_mp4(output, folder / "video.mp4")
            return Generated((file,), output.notes, output.state())
        request = cast(ImageRequest, task.request)  # only `image` makes pictures
        files = [
            write_picture(picture, folder / f"image-{i}", request.output_format, request.quality)
            for i, picture in enumerate(output.pictures)
        ]
        return Generated(tuple(files), output.notes)


def device() -> str:
    """`cuda` if this machine has a card, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def card_gib() -> float:
    """Total memory of the card in GiB; the budget of a 48 GB card where there is none."""
    import torch

    if not torch.cuda.is_available():
        return CARD_GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB


def card_error(error: RuntimeError) -> WorkerError | None:
    """What a RuntimeError of torch says about the card: OutOfMemory, GpuFault, or None for neither.

    Source of the words: PyTorch's c10/cuda/CUDAException and the cuBLAS and cuDNN status names. After any of them but
    out-of-memory every later call in the process fails too.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("the card has not enough memory for this request; ask for fewer frames or a smaller size")
    words = (
        "CUDA error",
        "CUBLAS_STATUS",
        "CUDNN_STATUS",
        "cuDNN error",
        "device-side assert",
        "illegal memory access",
    )
    if isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in words):
        return GpuFault("the card failed; the worker is being replaced, send the request again")
    return None


def _give_back_cache() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
