"""What a worker does while it waits for its first job: the imports that job would wait for."""

import logging
import time

from engine.backends import import_backend, import_common
from engine.fitness import baked
from engine.readahead import ReadAhead
from engine.settings import Settings
from model_handler import ModelHandler

log = logging.getLogger(__name__)


def get_ready(settings: Settings, models: ModelHandler) -> None:
    """Import what a first job computes with, and read its files ahead and try its kernels, where they are one model's.

    No model is loaded: which one, and for what, a request says. What goes wrong is left to the first job, which meets
    it too and has somebody to tell.
    """
    started = time.monotonic()
    try:
        found = baked(settings)
        if len(found) == 1:
            found[0].parts()
            models.wake(found[0].profile)
            import_backend(found[0].profile)
            models.try_kernels(found[0].profile)
        else:
            ReadAhead.owe()
            import_common()
    except Exception as error:  # noqa: BLE001 a library that is installed badly may raise anything
        log.warning("nothing is imported ahead of the first job (%s)", type(error).__name__)
    else:
        log.info("imported ahead of the first job in %.1f s", time.monotonic() - started)
