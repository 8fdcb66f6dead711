"""What diffusers and transformers look up on the disk as they are imported, answered without looking twice.

Which distribution brings which package. Both ask `importlib.metadata.packages_distributions`, to find versions. Python
goes through the list of files of each distribution that has no top_level.txt, and from 3.12 on asks the disk for every
one of them: 0.9 s, twice, of 6 s of imports on a card's host, 0.1 s in a worker's image. Here such a distribution
brings the package of its own name, which is under what name both would look anyway.

Which models there are. transformers reads the files of 550 folders for that, and again when the first model is
imported: its memory of the first time has 128 places. 0.4 s on that host, 0.27 on two cores.

Whether a model may be shared with other processes. Both import what would share it if torch can, and with it a library
of algebra: 0.8 s on two cores. No job of this worker is shared.
"""

import functools
import importlib
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def packages_by_name() -> Iterator[None]:
    """Inside the block `importlib.metadata.packages_distributions` is `packages`."""
    with _replaced(importlib.metadata, "packages_distributions", packages):
        yield


@contextmanager
def whole_caches() -> Iterator[None]:
    """Inside the block a function that `functools.lru_cache` decorates without a size remembers all it was asked.

    For the import of transformers alone: what others leave to that size may be asked without end.
    """
    bounded = functools.lru_cache

    def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
        return functools.cache(maxsize) if callable(maxsize) else bounded(maxsize, typed)

    with _replaced(functools, "lru_cache", lru_cache):
        yield


@contextmanager
def no_other_process() -> Iterator[None]:
    """Inside the block torch can share no model with other processes."""
    distributed = importlib.import_module("torch.distributed")
    with _replaced(distributed, "is_available", lambda: False):
        yield


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
