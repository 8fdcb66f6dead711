"""What must hold before a worker takes its first job. Each check raises with one sentence, or says nothing."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from engine import profiles, weights
from engine.settings import Settings
from engine.store_check import check_store
from schemas.errors import CardUnfit, WeightsMissing

MIN_CARD_GIB = 40.0  # a 48 GB card shows 44.5 to 47.5


def checks(settings: Settings) -> list[Callable[[], None]]:
    """The checks of this worker, in the order in which a person would fix what they find."""
    return [partial(check, settings) for check in (check_weights, check_card, check_store)]


def check_weights(settings: Settings) -> None:
    """At least one profile is baked, and every baked one is whole by its file sizes.

    Raises:
        WeightsMissing: none is baked. WeightsCorrupt: one is incomplete.
    """
    if not baked(settings):
        weights.locate(profiles.PROFILES[profiles.BAKES[0]], settings)


def baked(settings: Settings) -> list[weights.Baked]:
    """Every profile that is baked where this worker looks.

    Raises:
        WeightsCorrupt: one is incomplete.
    """
    found = []
    for name in profiles.BAKES:
        with suppress(WeightsMissing):
            found.append(weights.locate(profiles.PROFILES[name], settings))
    return found


def check_card(settings: Settings) -> None:
    """A card is there and has the memory that the profiles were planned for; WORKER_VRAM_GIB overrides the size.

    Tiny twins need no card: they are how a machine without one runs the whole worker.

    Raises:
        CardUnfit: no card, or too small a one.
    """
    found = baked(settings)
    if found and all(each.profile.is_twin for each in found):
        return
    import torch

    if not torch.cuda.is_available():
        raise CardUnfit("no CUDA card is visible to this worker")
    card_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if settings.vram_gib is None and card_gib < MIN_CARD_GIB:
        raise CardUnfit(f"the card has {card_gib:.1f} GiB; {MIN_CARD_GIB:.0f} are needed, or set WORKER_VRAM_GIB")
