"""Packages whose modules are imported without the code of the package itself, which would import all of them.

Diffusers' folders of models import every model there is, to list them; two are needed. Diffusers and transformers also
import torch's compiler, to mark functions of theirs for it that are in no graph of this worker; what it does compile,
it compiles behind a job (engine.compiling). On a card's host that is 0.8 of the 4 s that a first job waits for imports.
"""

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

MODELS = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
COMPILER = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of it. torch.compiler.disable is the last one."""
_REPLACING = threading.Lock()


class Unopened(ModuleType):
    """Stands for a package until somebody asks it for anything: then the package itself is imported in its place.

    By the import system, whose locks see to it that no thread meets half of it. Who holds the stand-in is answered by
    the package. While it has a __path__, modules of the package are imported without it.
    """

    marks: tuple[str, ...] = ()
    """What is answered without the package: decorators that return the function as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.marks:
            return _unchanged
        with _REPLACING:
            if sys.modules.get(self.__name__) is self:
                log.debug("%s is imported as a whole, for its %s", self.__name__, name)
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def leave_unopened(*names: str) -> None:
    """Have these packages imported without their own code, but for those that somebody has imported."""
    for name in names:
        if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
            continue
        module = Unopened(name)
        module.__spec__, module.__package__ = spec, name
        module.__path__ = spec.submodule_search_locations or []
        sys.modules[name] = module


@contextmanager
def compiler_unopened() -> Iterator[None]:
    """Inside the block functions may be marked for torch's compiler without it. Afterwards nothing stands for it: who
    asks for a module of it then imports it whole, and first, as its modules want it."""
    if COMPILER in sys.modules:
        yield
        return
    leave_unopened(COMPILER)
    compiler: Any = sys.modules[COMPILER]
    compiler.marks = MARKS
    try:
        yield
    finally:
        compiler.marks = ()
        if sys.modules.get(COMPILER) is compiler:
            del sys.modules[COMPILER]


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    return _unchanged if function is None else function
