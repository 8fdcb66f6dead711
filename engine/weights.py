"""Where a profile's weights are, and whether they are whole. Loads nothing; see engine/parts.py for that."""

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.importing import importing
from engine.profile import EIGHT_BITS, PRECISIONS, Component, Profile
from engine.settings import ROOT, Settings
from schemas.errors import SettingsError, WeightsCorrupt, WeightsMissing

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # in the profile's folder: with it the profile counts as baked
LORAS = "loras"  # in the profile's folder, where the bake was asked to keep them
FORMAT = 1  # of the manifest; a worker refuses what another version has baked
TWIN_MIN_SIDE = 32  # pixels: the smallest side the twins' three downsamplings survive
TWIN_AREA = 96 * 96  # pixels of a twin's default video: 81 frames in seconds on two cores


class Parts(Protocol):
    """The components of one profile, ready to be loaded one by one."""

    @property
    def profile(self) -> Profile:
        """The profile these parts belong to."""

    def load(self, name: str, device: str = "cpu") -> Any:
        """The component `name` on `device`, in eval mode and without gradients; each call loads anew.

        Models have their stored dtype, except that fp16 becomes fp32 on a CPU. Of a component that was baked in
        8 bits no wide copy is ever made. Tokenizers, image processors and schedulers ignore `device`.

        Raises:
            KeyError: the profile has no such component.
            WeightsCorrupt: the files do not fit the class.
        """


@dataclass(frozen=True)
class Place:
    """Somewhere weights may be. `layout`: as our bake writes them, or as a Hugging Face cache keeps them."""

    name: str
    path: Path
    layout: Literal["baked", "hub"] = "baked"


IMAGE = Place("the image (weights/baked)", ROOT / "weights" / "baked")
PLACES = (
    IMAGE,
    Place("RunPod's cached model", Path("/runpod-volume/huggingface-cache/hub"), "hub"),
    Place("the network volume (/runpod-volume/weights)", Path("/runpod-volume/weights")),
)
"""In RunPod's order of speed. WORKER_WEIGHTS_DIR, when set, stands instead of all of them."""


@dataclass(frozen=True)
class Baked:
    """A profile's weights, found."""

    profile: Profile
    """What runs: a twin's is renamed tiny/... and takes small sizes."""
    place: Place
    folders: Mapping[str, Path]
    """Component name -> the folder with its files."""
    files: tuple["File", ...] = ()
    """What the manifest lists; empty for a cached model, which has no manifest."""

    def parts(self) -> Parts:
        """The components. A process's first call has libraries to import: files and card are got ready meanwhile."""
        from engine.readahead import ReadAhead, order_of_need
        from engine.waking import begin_driver

        begin_driver()
        names = order_of_need(list(self.folders))
        files = [path for name in names for path in sorted(self.folders[name].glob("*.safetensors"))]
        with importing():
            is_first = "diffusers" not in sys.modules and self.place.layout == "baked"
            ahead = ReadAhead.of(files, begins=is_first)
            from engine.parts import FolderParts

        kept = f"{self.profile.folder}/{LORAS}"
        is_listed = any(file.path.startswith(f"{kept}/") for file in self.files)  # else an older bake left them
        return FolderParts(self.profile, self.folders, self.place.path / kept if is_listed else None, ahead)

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest. Seconds a GB; at start sizes are enough.

        Raises:
            WeightsCorrupt: names the first file that differs.
        """
        for file in self.files:
            if sha256(self.place.path / file.path) != file.sha256:
                raise WeightsCorrupt(f"{file.path} of {self.profile.name} is damaged; bake it again")


@dataclass(frozen=True)
class File:
    """A line of the manifest. `path` is relative to the weights folder, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str


def locate(profile: Profile, settings: Settings, places: Sequence[Place] = PLACES) -> Baked:
    """Find the profile's weights: WORKER_WEIGHTS_DIR if set, else the first of `places` that holds them.

    WORKER_PRECISION fp8 or int8 takes the bake of that precision wherever it is, else a bf16 bake, which is rounded
    as it is loaded. Unset takes what is there, bf16 before 8 bits in one place. Only file sizes are compared here.
    A tiny twin counts only where WORKER_WEIGHTS_DIR points at it.

    Raises:
        WeightsMissing: names the places searched.
        WeightsCorrupt: the first place that holds the profile holds it incomplete or for another version.
        SettingsError: it is baked in 8 bits only, and not those that WORKER_PRECISION asks for.
    """
    for bakes in _preferred(profile, settings.precision):
        found = find(bakes, settings, places)
        if found is not None:
            beside = _beside(profile, found)
            log.info("%s: %s weights from %s%s", profile.name, found.profile.precision, found.place.name, beside)
            return found
    other = find([profile.baked_in(precision) for precision in EIGHT_BITS], settings, places)
    if other is not None:
        raise SettingsError(
            f"{profile.folder} is baked in {other.profile.precision}, and WORKER_PRECISION asks for "
            f"{settings.precision}: unset it, or bake with download_weights.py --precision {settings.precision}"
        )
    searched = ", ".join(place.name for place in _searched(settings, places))
    raise WeightsMissing(
        f"the weights of {profile.folder} are not there; searched {searched}. "
        f"Bake them with download_weights.py --profiles {profile.folder}, or set WORKER_WEIGHTS_DIR"
    )


def find(bakes: Sequence[Profile], settings: Settings, places: Sequence[Place] = PLACES) -> Baked | None:
    """The first of `bakes` in the first place that holds any of them. See locate, also for what it raises."""
    for place in _searched(settings, places):
        for profile in bakes:
            found = _cached(profile, place) if place.layout == "hub" else _baked(profile, place)
            if found is not None and (settings.weights_dir is not None or not found.profile.is_twin):
                return found
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        WeightsCorrupt: it is no manifest, or one of another format.
    """
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsCorrupt(f"the manifest of {path.parent.name} cannot be read; bake it again") from error
    if version != FORMAT:
        raise WeightsCorrupt(
            f"{path.parent.name} was baked in format {version}, this worker reads {FORMAT}; bake it again"
        )
    return dict(manifest)


def recipe(component: Component, profile: Profile) -> dict[str, Any]:
    """What decides a component's bytes, besides the published files: compared between bake and worker.

    `dtype` is its precision: fp8 and int8 are other components than bf16, in folders of their own.
    """
    loras = [
        {"repo": lora.source.repo, "file": lora.file, "strength": lora.strength} for lora in profile.loras_of(component)
    ]
    return {
        "class": component.class_name,
        "repo": component.source.repo,
        "subfolder": component.subfolder,
        "dtype": component.dtype,
        "loras": loras,
    }


def twin_of(profile: Profile) -> Profile:
    """The profile as its tiny twin runs it: renamed, taking sizes from 32 pixels up, with small videos."""
    twin = replace(profile, name=f"tiny/{profile.name}", min_side=TWIN_MIN_SIDE)
    return replace(twin, max_area=TWIN_AREA, height=64, width=112) if profile.frames > 1 else twin


def sha256(path: Path) -> str:
    """Hex digest of a whole file.

    Raises:
        WeightsCorrupt: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsCorrupt(f"{path.name} cannot be read; bake it again") from error


def _preferred(profile: Profile, precision: str | None) -> list[list[Profile]]:
    """The bakes that would do, in groups: a later group counts only where no place holds one of an earlier."""
    if precision is None:
        return [[profile.baked_in(each) for each in PRECISIONS]]
    return [[profile.baked_in(each)] for each in dict.fromkeys((precision, "bf16"))]


def _searched(settings: Settings, places: Sequence[Place]) -> Sequence[Place]:
    return places if settings.weights_dir is None else [Place("WORKER_WEIGHTS_DIR", settings.weights_dir)]


def _beside(profile: Profile, found: Baked) -> str:
    """A word on the bakes of other precisions that lie beside the one that was taken."""
    folders = {precision: profile.baked_in(precision).folder for precision in PRECISIONS}
    others = [
        precision
        for precision, folder in folders.items()
        if folder != found.profile.folder and (found.place.path / folder / MANIFEST).is_file()
    ]
    return f"; also baked: {', '.join(others)}, see WORKER_PRECISION" if others else ""


def _baked(profile: Profile, place: Place) -> Baked | None:
    path = place.path / profile.folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_manifest(path)
    try:
        recipes = {name: part["recipe"] for name, part in manifest["components"].items()}
        files = tuple(File(**line) for line in manifest["files"])
        is_twin = manifest["twin"]
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsCorrupt(f"the manifest of {profile.folder} cannot be read; bake it again") from error
    for component in profile.components:
        if recipes.get(component.name) != recipe(component, profile):
            raise WeightsCorrupt(f"{component.name} of {profile.folder} was baked to another recipe; bake it again")
    for file in files:
        if not _has_size(place.path / file.path, file.size_bytes):
            raise WeightsCorrupt(f"{file.path} of {profile.folder} is missing or cut short; bake it again")
    folders = {component.name: place.path / component.folder for component in profile.components}
    return Baked(twin_of(profile) if is_twin else profile, place, folders, files)


def _cached(profile: Profile, place: Place) -> Baked | None:
    """The repositories as published, in a Hugging Face cache; None for what only a bake does, LoRAs and 8 bits."""
    if profile.loras or profile.precision in EIGHT_BITS:
        return None
    folders = {}
    for component in profile.components:
        snapshot = _snapshot(place.path / f"models--{component.source.repo.replace('/', '--')}")
        if snapshot is None or not (snapshot / component.subfolder).is_dir():
            return None
        folders[component.name] = snapshot / component.subfolder
    return Baked(profile, place, folders)


def _snapshot(repository: Path) -> Path | None:
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except OSError:
        return False
