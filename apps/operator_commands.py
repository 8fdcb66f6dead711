"""What an operator asks of the worker beside jobs: what would run on this card, and graphs compiled ahead."""

import logging
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.card import Card, Levers
from engine.fitness import baked
from engine.plan_report import NothingFits, report
from engine.residency import is_transformer
from engine.settings import Settings
from model_handler import ModelHandler, capability, device
from schemas.errors import CardUnfit, WorkerError

log = logging.getLogger(__name__)


def show_plan(settings: Settings, models: ModelHandler) -> int:
    """Print the plan of every baked profile. Returns the exit code: 1 if one of them cannot run here."""
    try:
        text, code = report(settings, models.limits, capability()), 0
    except (NothingFits, WorkerError) as error:
        text, code = str(error), 1
    sys.stdout.write(f"{text}\n")
    return code


def check_plan(settings: Settings, models: ModelHandler) -> None:
    """Write the plan to the log, before the first job.

    Raises:
        CardUnfit: a baked profile cannot run on this card and host.
    """
    if capability() is None:  # no card, so nothing is placed
        return
    try:
        log.info("%s", report(settings, models.limits, capability()))
    except NothingFits as error:
        log.error("%s", error)
        raise CardUnfit("a baked profile does not fit this card and host; `handler.py --plan` shows which") from error


def compile_ahead(settings: Settings, models: ModelHandler) -> int:
    """Compile the usual sizes of every baked video profile into WORKER_CACHE_DIR; no weight is read.

    Returns the exit code: 1 if there was nothing to compile, or something could not be.
    """
    try:
        profiles = [one.profile for one in baked(settings)]
    except WorkerError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    videos = [profile for profile in profiles if any(is_transformer(c.name) for c in profile.components)]
    if not videos:
        sys.stdout.write("no video profile is baked where this worker looks\n")
        return 1
    from engine.warm_up import usual_latents, warm_up

    levers = Levers(settings.attention, settings.compile, settings.cache_dir)
    card = Card(device(), models.limits.budget_bytes, settings.precision, levers)
    for profile in videos:
        try:
            account = warm_up(profile, card, usual_latents(profile))
        except WorkerError as error:
            sys.stdout.write(f"{profile.name}: {error}\n")
            return 1
        sys.stdout.write(f"{profile.name}: compiled in {account.compile_s:.0f} s\n")
    return 0


COMMANDS: Mapping[str, Callable[[Settings, ModelHandler], int]] = MappingProxyType(
    {"--plan": show_plan, "--warm-up": compile_ahead}
)
"""Argument of handler.py -> what it does instead of taking jobs."""
