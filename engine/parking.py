"""Profiles that have made room for another on the card: their weights wait in page-locked host memory.

Why. Where a card cannot hold two profiles at once, a request for the other one used to drop the first, and the way
back read 30 GB and more from the disk. From page-locked memory 36 GB are back in 0.7 s at 55 GB/s, 1.4 s at 25.

How. Each part of a profile parks in its own way (`Parkable`): what stands on the card is copied to the host once and
has its memory there given back (see `standing`); what swaps, streams or visits has its host copy anyway. The models
stay the objects they are, so nothing is compiled or planned again. The host copy is kept afterwards: weights never
change, so parking a second time copies nothing.

Bounds. A profile is parked only if the host has room for it, MARGIN_BYTES apart; those parked longest are dropped for
that. Whatever goes wrong on the way out or back, the profile is unloaded and loaded anew by the next job that needs
it: a model is on the card whole, or not at all.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from engine import host_memory
from engine.card_errors import card_error
from schemas.errors import GpuFault

log = logging.getLogger(__name__)

GIB = 2**30
MARGIN_BYTES = 4 * GIB
"""Left to the rest of the worker: a decoding child may take 1.1 GiB, and there is one at a time; a job's own frames,
latents and file stay below 1 GiB; as much again for the compiler's processes, which come up with a first video."""


class NotLocked(Exception):
    """Host memory could not be page-locked. No error of the card: it goes on working."""


class Parkable(Protocol):
    """Weights that can leave the card and come back. After an exception only `unload` is left."""

    @property
    def is_whole(self) -> bool:
        """Whether all of it has been read. What is still coming cannot be parked."""

    @property
    def needed_bytes(self) -> int:
        """Of host memory that parking would take, beyond what is held already."""

    @property
    def held_bytes(self) -> int:
        """Of host memory that unloading would give back."""

    def park(self) -> int:
        """Give the card's memory back; returns the bytes copied to the host.

        Raises:
            NotLocked, MemoryError, RuntimeError
        """

    def bring_back(self) -> int:
        """Take it up again; returns the bytes copied to the card, all there when this returns. Raises RuntimeError."""

    def unload(self) -> None:
        """Give everything back, host and card."""


class Owner(Protocol):
    """A loaded profile, as far as the lot is concerned."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> Parkable: ...

    def unload(self) -> None:
        """Its weights and all else that it holds."""


T = TypeVar("T", bound=Owner)


class ParkingLot(Generic[T]):
    """Profiles beside the card. Its counters run from the start of the process."""

    def __init__(self, free_bytes: Callable[[], int] = host_memory.free_bytes) -> None:
        """`free_bytes`: of host memory, asked anew before each parking."""
        self._free_bytes = free_bytes
        self._parked: OrderedDict[str, T] = OrderedDict()
        self.parkings = 0
        self.returns = 0
        self.bytes_to_host = 0
        self.bytes_to_card = 0

    def __contains__(self, key: str) -> bool:
        return key in self._parked

    def park(self, key: str, one: T, reserve_bytes: int = 0) -> bool:
        """Take it off the card and keep it, or unload it and say why. `reserve_bytes`: soon needed by somebody else.

        Raises:
            GpuFault: the card is beyond use; nothing was touched after that.
        """
        weights = one.weights
        problem = self._obstacle(weights, reserve_bytes)
        if problem is None:
            try:
                self.bytes_to_host += weights.park()
            except (NotLocked, MemoryError, RuntimeError) as error:
                problem = _problem(error)
        if problem is not None:
            log.info("%s is unloaded, not parked: %s", one.name, problem)
            one.unload()
            return False
        self._parked[key] = one
        self.parkings += 1
        log.info("parked %s: %.2f GiB in host memory", one.name, weights.held_bytes / GIB)
        return True

    def room_bytes(self) -> int:
        """Of host memory that weights may still take; below 0 where less than the margin is left."""
        return self._free_bytes() - MARGIN_BYTES

    def take(self, key: str) -> T:
        """Out of the lot, as it is. Raises KeyError: it is not there."""
        return self._parked.pop(key)

    def bring_back(self, one: T) -> bool:
        """Put what was taken out of the lot on the card again. False: that failed, and it is unloaded.

        Raises:
            GpuFault: as `park`.
        """
        try:
            moved_bytes = one.weights.bring_back()
        except (MemoryError, RuntimeError) as error:
            log.warning("%s could not come back and is loaded anew: %s", one.name, _problem(error))
            one.unload()
            return False
        self.returns += 1
        self.bytes_to_card += moved_bytes
        log.info("%s is back: %.2f GiB copied to the card", one.name, moved_bytes / GIB)
        return True

    def make_room(self, wanted_bytes: int) -> None:
        """Drop those parked longest until the host has room for so much, or none is left."""
        while wanted_bytes and self._parked and wanted_bytes > self.room_bytes():
            _, oldest = self._parked.popitem(last=False)
            log.info("%s is dropped from host memory to make room there", oldest.name)
            oldest.unload()

    def clear(self) -> None:
        """Unload all that is parked."""
        while self._parked:
            self._parked.popitem(last=False)[1].unload()

    def _obstacle(self, weights: Parkable, reserve_bytes: int) -> str | None:
        if not weights.is_whole:
            return "not all of its weights have come yet"
        wanted_bytes = weights.needed_bytes + reserve_bytes
        held_bytes = sum(one.weights.held_bytes for one in self._parked.values())
        if wanted_bytes <= self.room_bytes() + held_bytes:  # else dropping them would be of no use
            self.make_room(wanted_bytes)
        if not wanted_bytes or wanted_bytes <= self.room_bytes():
            return None
        return f"host memory has no room for {wanted_bytes / GIB:.2f} GiB and a margin of {MARGIN_BYTES / GIB:.0f} GiB"


def _problem(error: Exception) -> str:
    """What to say of a failure that the process survives.

    Raises:
        GpuFault: it does not.
    """
    fault = card_error(error) if isinstance(error, RuntimeError) else None
    if isinstance(fault, GpuFault):
        raise fault from error
    return f"{type(error).__name__}: {error}"
