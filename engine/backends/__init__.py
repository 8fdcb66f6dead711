"""One file a model family. A backend turns a task into frames or pictures; it knows no RunPod, no S3, no file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from engine.answers import no_other_process, packages_by_name
from engine.card import Card
from engine.importing import importing
from engine.namesake import import_diffusers
from engine.outputs import Frames, Images
from engine.parking import Parkable
from engine.profiles import Profile
from engine.progress import Progress
from engine.unopened import compiler_unopened
from engine.weights import Parts
from schemas.input_schema import Request

BACKENDS = {
    "sdxl": "engine.backends.sdxl:Sdxl",
    "wan": "engine.backends.wan:Wan",
    "wan_lightning": "engine.backends.wan_lightning:WanLightning",
    "wan_svi": "engine.backends.wan_svi:WanSvi",
}
"""Name in the profile -> class. Strings, so that a request for a picture never imports the video models."""


@dataclass(frozen=True)
class Task:
    """One request as it will run: nothing is None that the backend needs, every picture is decoded."""

    profile: Profile
    request: Request
    seed: int
    pictures: dict[str, Any] = field(default_factory=dict)
    """Field name of the request -> PIL RGB picture, or a list of them for a list field."""
    saves_memory: bool = False
    """The second run after the card ran out of memory: decode in tiles, see engine.tiled_decode."""


class Backend(Protocol):
    """A loaded profile. Nothing a task does may change what the next one gets."""

    def generate(self, task: Task, progress: Progress) -> Images | Frames:
        """Run one task. Video frames may be decoded lazily while the caller writes them."""

    @property
    def weights(self) -> Parkable:
        """All tensors of its models that are on the card between jobs: what leaves it when another profile needs it."""

    def finish(self) -> None:
        """Return once nothing works behind the last job: a graph may take longer than the job it was begun for."""

    def unload(self) -> None:
        """Give every byte back: host, card and caches."""


def load_backend(profile: Profile, parts: Parts, card: Card) -> Backend:
    """Build the profile's backend from its parts, within the card's budget."""
    backend: Backend = import_backend(profile)(profile, parts, card)
    return backend


def import_backend(profile: Profile) -> Any:
    """The class of the profile's backend. The first call takes seconds: it imports what the backend computes with."""
    with importing(), _lightly():
        import_common()
        module, name = BACKENDS[profile.backend].split(":")
        return getattr(import_module(module), name)


def import_common() -> None:
    """Import what every backend and every load computes with: most of the seconds of `import_backend`."""
    with importing(), _lightly():
        import_diffusers()
        import_module("engine.parts")


@contextmanager
def _lightly() -> Iterator[None]:
    """For imports: what only a compiler, a shared model or a look at the disk would need is left out."""
    with compiler_unopened(), no_other_process(), packages_by_name():
        yield
