"""What diffusers and transformers are told is not installed, since they need it for no job.

Both import what they find. scipy, 0.6 s of a first job, serves them for losses and noise levels that no profile has,
and for KLMS, which fetches it itself (engine.backends.sdxl). The others are not in the worker's image; where another
program brought them they cost as much again, scale a picture by other code than the image has (torchvision), or end
the import because they were built for another torch. Both libraries ask once and keep the answer. So a name is hidden
while they ask, and there again before models, samplers and pipelines are imported: what else is installed finds it.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.answers import packages_by_name, whole_caches

UNUSED = ("peft", "scipy", "sklearn", "torchaudio", "torchvision")


def answer_for_unused() -> None:
    """Have both libraries ask. What has asked before, or been imported, is not changed."""
    with hidden(*UNUSED), packages_by_name():
        importlib.import_module("diffusers.utils.import_utils")  # asks as it is imported
        with whole_caches():
            transformers = importlib.import_module("transformers.utils")
        for name in UNUSED:
            getattr(transformers, f"is_{name}_available")()


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Inside the block these packages cannot be found, not even one that is imported."""
    modules: dict[str, Any] = sys.modules
    seen = {name: modules[name] for name in names if name in modules}
    modules.update(dict.fromkeys(names))  # None is the import system's own mark for "not there"
    try:
        yield
    finally:
        for name in names:
            del modules[name]
        modules.update(seen)
