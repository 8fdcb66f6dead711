"""ModelHandler: loads a profile when the first job needs it, keeps what fits the card, runs one job at a time.

What does not fit the card beside another profile is parked in host memory, and comes back from there.
"""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from engine import disk, host_memory, video, waking
from engine.admission import Gate, Limits
from engine.backends import Backend, Task, load_backend
from engine.card import Card, Levers
from engine.card_errors import card_error
from engine.demand import Demand
from engine.outputs import Frames, Images, MediaFile
from engine.parking import Parkable, ParkingLot
from engine.pictures import write_picture
from engine.profile import EIGHT_BITS
from engine.profiles import Profile
from engine.progress import Progress
from engine.residency import GIB, Plan, plan
from engine.settings import Settings
from engine.weights import Parts
from schemas.errors import GpuFault, OutOfMemory, RequestTooLarge, WeightsCorrupt
from schemas.image_schema import ImageRequest

log = logging.getLogger(__name__)

CARD_GIB = 44.5  # what a 48 GB card leaves to us with ECC on; also the budget pretended on a machine without a card

SAVED_MEMORY = (
    "the card ran out of memory, so this was made by a second run that decodes in tiles: where they meet, pixels may "
    "differ slightly from those of a run in one piece"
)


@dataclass(frozen=True)
class Generated:
    """What one task left in the work folder, and what it has to say about it."""

    files: tuple[MediaFile, ...]
    notes: tuple[str, ...] = ()
    state: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A profile on the card, and where its bytes are there (on a CPU: where they would be)."""

    profile: Profile
    backend: Backend
    plan: Plan

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def weights(self) -> Parkable:
        return self.backend.weights

    def unload(self) -> None:
        self.backend.unload()
        log.info("unloaded %s", self.name)


class ModelHandler:
    """The card's only door. What touches the card happens inside `generate`, under its lock; but for `wake`, before."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Profile, Parts, Card], Backend] = load_backend,
        free_host_bytes: Callable[[], int] = host_memory.free_bytes,
    ) -> None:
        self._settings = settings
        self._load = load
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.lot: ParkingLot[Loaded] = ParkingLot(free_host_bytes)  # profiles that have left the card for another
        self._is_awake = False
        self.loads = 0  # profiles loaded since the start; a warm job adds none, and one that comes back neither

    @cached_property
    def limits(self) -> Limits:
        """What this worker takes. Card and host are asked once, before anything of ours is there."""
        settings = self._settings
        host_bytes = max(0, self.lot.room_bytes()) if device() == "cuda" else None  # a CPU has nothing beside it
        return Limits(budget_bytes(settings.vram_gib), settings.precision, settings.max_work_gpx, host_bytes)

    def gate(self, profile: Profile) -> Gate:
        """Who may run `profile` on this card. Loads nothing."""
        return Gate(profile, self.limits)

    def wake(self, profile: Profile) -> None:
        """Begin what a first load of `profile` will ask of the card, in a thread beside the imports before it. Once."""
        if self._is_awake or device() != "cuda":
            return
        self._is_awake = True
        waking.begin(self._precision(profile), device(), self._levers)

    def try_kernels(self, profile: Profile) -> None:
        """Begin the self-tests that a load of `profile` will ask for, once its libraries are there."""
        if (precision := self._precision(profile)) is not None and device() == "cuda":
            from engine.speed import prove_ahead

            prove_ahead(precision, device(), self._levers)

    def _precision(self, profile: Profile) -> str | None:
        """Of a load's 8-bit products, or what was asked for; None without either."""
        rounded = [part.dtype for part in profile.components if part.dtype in EIGHT_BITS]
        return self._settings.precision or next(iter(rounded), None)

    def generate(self, task: Task, parts: Parts, folder: Path, progress: Progress) -> Generated:
        """Run one task and leave its verified files in `folder`.

        If the card runs out of memory, everything but this profile leaves it, and the task runs once more in the
        form that saves memory; the result says so.

        Raises:
            RequestTooLarge: it cannot run on this card, or is more work than the operator allows. Nothing was loaded.
            DiskFull: there is no room for its files.
            WorkerError: the most specific one. Of memory, only loaded and parked profiles keep theirs.
        """
        gate = self.gate(task.profile)
        wanted = gate.admit(task.request, task.pictures)
        if wanted is not None:
            disk.check_room(folder, wanted)
        with self._lock:
            for saves_memory in (False, True):
                try:
                    return self._attempt(replace(task, saves_memory=saves_memory), wanted, parts, folder, progress)
                except OutOfMemory:
                    log.warning("out of memory%s", " again, though saving it" if saves_memory else "; once more")
                # Out here the exception is gone, and with it the tensors that its frames held.
                with progress.timed("load"):
                    self._evict_all_but(task.profile, progress)
        raise OutOfMemory(
            f"the card has not enough memory for this request, also in tiles and with the card to itself; "
            f"{gate.advice(task.request, task.pictures)}"
        )

    def _attempt(self, task: Task, wanted: Demand | None, parts: Parts, folder: Path, progress: Progress) -> Generated:
        failed = True
        try:
            with progress.stage("load"):
                backend = self._backend(task.profile, parts, wanted, progress)
            made = self._write(backend.generate(task, progress), task, folder)
            failed = False
            return made
        except WeightsCorrupt:
            if task.profile.folder in self._loaded:
                self._unload(task.profile.folder)  # it is there in part, and the rest cannot be read: load it anew
            raise
        except GpuFault:
            failed = False  # a poisoned context must not be touched again
            raise
        except RuntimeError as error:
            fault = card_error(error)
            failed = not isinstance(fault, GpuFault)
            if fault is None:
                raise
            raise fault from error
        finally:
            if failed:
                _give_back_cache()

    def finish(self) -> None:
        """Return once nothing works behind the jobs that have been run."""
        with self._lock:
            for loaded in self._loaded.values():
                loaded.backend.finish()

    def unload_all(self) -> None:
        """Drop every loaded profile, the parked ones too."""
        with self._lock:
            for folder in list(self._loaded):
                self._unload(folder)
            self.lot.clear()

    def _backend(self, profile: Profile, parts: Parts, wanted: Demand | None, progress: Progress) -> Backend:
        """The profile's backend, with room on the card for what is wanted.

        As it is placed, if that leaves the room. Else it is loaded again, placed so that it does.
        """
        gate, budget_bytes = self.gate(profile), self.limits.budget_bytes
        work_bytes = 0 if wanted is None else gate.needed_bytes(wanted)
        loaded = self._loaded.get(profile.folder)
        if loaded is not None and loaded.plan.peak_bytes(work_bytes) > budget_bytes:
            log.info("%s as it is placed has no room for this size; it is loaded again", profile.name)
            self._unload(profile.folder)
            loaded = None
        if loaded is None:
            loaded = self._bring_back(profile, gate.planned(wanted), progress)
        if loaded is None:
            loaded = self._load_beside_others(profile, parts, gate.planned(wanted), progress)
        self._loaded[profile.folder] = loaded
        self._loaded.move_to_end(profile.folder)
        while self._others_bytes(profile) + loaded.plan.peak_bytes(work_bytes) > budget_bytes and len(self._loaded) > 1:
            self._evict_oldest(progress)
        return loaded.backend

    def _bring_back(self, profile: Profile, wanted: Demand, progress: Progress) -> Loaded | None:
        """The profile from the parking lot; None if it is not there, or is placed as it would not be placed now."""
        if profile.folder not in self.lot:
            return None
        budget_bytes = self.limits.budget_bytes
        alone = self._plan(profile, wanted, budget_bytes)
        parked = self.lot.take(profile.folder)
        peak_bytes = parked.plan.peak_bytes(self.gate(profile).needed_bytes(wanted))
        if parked.plan.kind != alone.kind or peak_bytes > budget_bytes:
            log.info("%s as it was parked does not fit this size; it is loaded again", profile.name)
            parked.unload()
            return None
        while self._loaded and self._others_bytes(profile) + peak_bytes > budget_bytes:
            self._evict_oldest(progress)
        with progress.timed("load_to_card"):
            if self.lot.bring_back(parked):
                return parked
        _give_back_cache()
        return None

    def _load_beside_others(self, profile: Profile, parts: Parts, wanted: Demand, progress: Progress) -> Loaded:
        """Load it beside what is there, as far as that costs it no speed; the oldest goes first."""
        self._cap_memory()
        alone = self._plan(profile, wanted, self.limits.budget_bytes)
        host_bytes = alone.host_bytes if device() == "cuda" else 0  # on a CPU nothing is placed beside the card
        while self._loaded and self._kind_beside_others(profile, wanted) != alone.kind:
            self._evict_oldest(progress, host_bytes)
        self.lot.make_room(host_bytes)
        left_bytes = self.limits.budget_bytes - self._others_bytes(profile)
        made = self._plan(profile, wanted, left_bytes)
        backend = self._load(profile, parts, self._card(left_bytes, wanted))
        self.loads += 1
        log.info("loaded %s", profile.name)
        return Loaded(profile, backend, made)

    def _plan(self, profile: Profile, wanted: Demand, bytes_left: int) -> Plan:
        limits = self.limits
        return plan(
            profile,
            bytes_left,
            precision=limits.precision,
            shape=wanted.shape,
            images=wanted.images,
            host_bytes=limits.host_bytes,
        )

    def _kind_beside_others(self, profile: Profile, wanted: Demand) -> str | None:
        try:
            return self._plan(profile, wanted, self.limits.budget_bytes - self._others_bytes(profile)).kind
        except RequestTooLarge:
            return None

    def _others_bytes(self, profile: Profile) -> int:
        return sum(one.plan.stays_bytes for folder, one in self._loaded.items() if folder != profile.folder)

    def _evict_all_but(self, profile: Profile, progress: Progress) -> None:
        for folder in list(self._loaded):
            if folder != profile.folder:
                self._evict(folder, progress)
        _give_back_cache()

    def _evict_oldest(self, progress: Progress, reserve_bytes: int = 0) -> None:
        self._evict(next(iter(self._loaded)), progress, reserve_bytes)

    def _evict(self, folder: str, progress: Progress, reserve_bytes: int = 0) -> None:
        """Off the card: parked, or unloaded where that cannot be. `reserve_bytes`: see ParkingLot.park."""
        with progress.timed("load_make_room"):
            is_parked = self.lot.park(folder, self._loaded.pop(folder), reserve_bytes)
            _give_back_cache(collects=not is_parked)  # what is parked leaves no object behind

    def _unload(self, folder: str) -> None:
        self._loaded.pop(folder).unload()
        _give_back_cache()

    def _card(self, bytes_left: int, wanted: Demand) -> Card:
        host_bytes = self.limits.host_bytes
        return Card(device(), bytes_left, self._settings.precision, self._levers, wanted.shape, host_bytes)

    @property
    def _levers(self) -> Levers:
        return Levers(self._settings.attention, self._settings.compile, self._settings.cache_dir)

    def _cap_memory(self) -> None:
        """Hold the process to WORKER_VRAM_GIB, so that a shared or emulated card is not overrun."""
        import torch

        if self._settings.vram_gib is not None and torch.cuda.is_available():
            total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._settings.vram_gib / total_gib))

    def _write(self, output: Images | Frames, task: Task, folder: Path) -> Generated:
        notes = (*output.notes, *([SAVED_MEMORY] if task.saves_memory else []))
        if isinstance(output, Frames):
            file = video.write_mp4(output, folder / "video.mp4")
            return Generated((file,), notes, output.state())
        request = cast(ImageRequest, task.request)  # only `image` makes pictures
        files = [
            write_picture(picture, folder / f"image-{i}", request.output_format, request.quality)
            for i, picture in enumerate(output.pictures)
        ]
        return Generated(tuple(files), notes)


def device() -> str:
    """`cuda` if this machine has a card, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def capability() -> tuple[int, int] | None:
    """Of the card; None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def budget_bytes(vram_gib: float | None) -> int:
    """Of the card: what is free now or already ours, and at most WORKER_VRAM_GIB. Without a card, a 48 GB card's."""
    import torch

    if not torch.cuda.is_available():
        return int((vram_gib or CARD_GIB) * GIB)
    free_bytes = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return free_bytes if vram_gib is None else min(free_bytes, int(vram_gib * GIB))


def _give_back_cache(*, collects: bool = True) -> None:
    """`collects`: first look for objects that hold each other and nobody else holds; a third of a second.

    Raises:
        GpuFault: a kernel of the job that has just ended has failed.
    """
    import torch

    if collects:
        gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # it waits for the card: a kernel that was still running may have failed
            fault = card_error(error)
            if fault is None:
                raise
            raise fault from error
