"""What diffusers and transformers look up on the disk as they are imported, answered without looking twice.

Which distribution brings which package. Both ask `importlib.metadata.packages_distributions`, to find versions. Python
goes through the list of files of each distribution that has no top_level.txt, and from 3.12 on asks the disk for every
one of them: 0.9 s, twice, of 6 s of imports on a card's host, 0.1 s in a worker's image. Here such a distribution
brings the package of its own name, which is under what name both would look anyway.

Which models there are. transformers reads the files of 550 folders for that, and again when the first model is
imported: its memory of the first time has 128 places. Once takes 0.4 s on that host, 0.14 to 0.27 on two cores. An
image holds the answer (builder/list_models.py).

Whether a model may be shared with other processes. Both import what would share it if torch can, and with it a library
of algebra: 0.8 s on two cores. No job of this worker is shared.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.settings import IMAGE_KERNELS

SEARCH = "create_import_structure_from_path"  # the function of transformers.utils.import_utils


@contextmanager
def packages_by_name() -> Iterator[None]:
    """Inside the block `importlib.metadata.packages_distributions` is `packages`."""
    with _replaced(importlib.metadata, "packages_distributions", packages):
        yield


@contextmanager
def whole_caches() -> Iterator[None]:
    """Inside the block a function that `functools.lru_cache` decorates without a size remembers all it was asked; and
    the one that looks for models knows what an image holds of that.

    For the import of transformers alone: what others leave to that size may be asked without end.
    """
    bounded = functools.lru_cache

    def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
        if not callable(maxsize):
            return bounded(maxsize, typed)
        return functools.cache(_knowing(maxsize) if maxsize.__name__ == SEARCH else maxsize)

    with _replaced(functools, "lru_cache", lru_cache):
        yield


@contextmanager
def no_other_process() -> Iterator[None]:
    """Inside the block torch can share no model with other processes."""
    distributed = importlib.import_module("torch.distributed")
    with _replaced(distributed, "is_available", lambda: False):
        yield


def keep_models(image: Path) -> Path:
    """Write what transformers finds, for `whole_caches` in later processes; returns the file."""
    from transformers.utils import import_utils

    folder = _models_folder()
    found = getattr(import_utils, SEARCH)(folder)
    path = _models_file(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([folder, _listed(found)]))
    return path


def _knowing(search: Callable[[str], Any]) -> Callable[[str], Any]:
    """`search`, but for what is kept. A file that is damaged, or of another place, is as good as none."""
    try:
        folder, listed = json.loads(_models_file(IMAGE_KERNELS).read_text())
        found = _found(listed)
    except (OSError, ValueError, TypeError, KeyError):
        return search
    asked = (folder, str(Path(folder) / "__init__.py"))  # once by the folder, once by its file
    return lambda path: found if str(path) in asked else search(path)


def _listed(found: Any) -> Any:
    """What the search finds, for JSON: folders of files of names, by what each needs, which are sets."""
    if isinstance(found, dict):
        return [[_listed(key), _listed(value)] for key, value in found.items()]
    return found if isinstance(found, str) else {"names": sorted(found)}


def _found(listed: Any) -> Any:
    """The other way. A set that is a key is a frozen one."""
    if isinstance(listed, list):
        return {key if isinstance(key, str) else frozenset(key["names"]): _found(value) for key, value in listed}
    return set(listed["names"])


def _models_file(image: Path) -> Path:
    return image / f"models-{importlib.metadata.version('transformers')}.json"


def _models_folder() -> str:
    """Spelled as transformers asks for it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "models")


def packages() -> dict[str, list[str]]:
    """Package -> the distributions that bring it, by their folders' names and what top_level.txt declares."""
    found = defaultdict[str, list[str]](list)
    for place in dict.fromkeys(sys.path):
        for about in Path(place or ".").glob("*.dist-info"):
            distribution = about.name.partition("-")[0]
            declared = about / "top_level.txt"
            for package in declared.read_text().split() if declared.exists() else [distribution]:
                found[package].append(distribution)
    return dict(found)


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, own)
