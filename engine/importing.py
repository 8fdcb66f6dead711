"""Libraries that come once and stay: one thread brings them at a time, and nothing looks for garbage among them.

Diffusers, transformers and torch make 760,000 objects that Python's collector follows. It went through all of them
seven times while they were imported and once more while a first job's models were built: 1.5 of 6 seconds and 0.3 to
0.5, in which no other thread gets the interpreter either. Next to nothing of them becomes garbage in a worker.
"""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TURN = threading.RLock()


@contextmanager
def importing() -> Iterator[None]:
    """For the block that imports them: no collection inside, and what is there at its end is left out of later ones.

    Only before diffusers is there, which is in a process that has loaded no model: what is left out is never freed
    where its parts hold each other. Who comes while another thread imports waits for it, for modules that import each
    other must not be begun at two ends.
    """
    with _TURN:
        if "diffusers" in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()
