"""Whether a request may run on this card, and what smaller one would: told before a weight is loaded.

What its profile cannot run is refused on any card (see `svi_request`).

Two bounds. Memory: what stays on the card by the placement that leaves most room, and what this size needs beside it
(see `residency` and `activations`); a placement counts if the host has room for what does not stay on the card. Work:
WORKER_MAX_WORK, so that no request holds a card for hours.

A refusal names requests that pass. Each was put to the same test before it is named, and differs in one respect only,
so that the caller chooses what to give up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from engine import smaller
from engine.activations import usual_shape, work_bytes
from engine.demand import Demand, Size, demand
from engine.profile import EIGHT_BITS, Profile
from engine.residency import GIB, least_card_bytes, least_host_bytes, room_bytes, runs_in
from engine.smaller import Ask
from engine.svi_request import check_inputs, check_plan
from schemas.errors import RequestTooLarge
from schemas.image_schema import ImageRequest
from schemas.request import Request
from schemas.svi_schema import SviEndframeRequest

EASIER = 0.75
"""After the card has run out of memory, what is named needs at most this share of what was asked for."""

NOTHING: Mapping[str, Any] = MappingProxyType({})
LESS: tuple[smaller.Way, ...] = (
    smaller.fewer_frames,
    smaller.more_clips,
    smaller.smaller_sizes,
    smaller.fewer_pictures,
)


@dataclass(frozen=True)
class Limits:
    """What this worker takes. `budget_bytes`: of the card. `precision`: as WORKER_PRECISION has it."""

    budget_bytes: int
    precision: str | None = None
    max_work_gpx: float | None = None
    """See Demand.work_gpx; None: no bound."""
    host_bytes: int | None = None
    """Of page-locked host memory, for what does not stay on the card; None: no bound."""


@dataclass(frozen=True)
class Gate:
    """One profile on one card."""

    profile: Profile
    limits: Limits

    @cached_property
    def room_bytes(self) -> int:
        """The most that a request may need beside the weights."""
        limits = self.limits
        return room_bytes(self.profile, limits.budget_bytes, limits.precision, limits.host_bytes)

    @cached_property
    def is_narrow(self) -> bool:
        return runs_in(self.profile, self.limits.precision) in EIGHT_BITS

    def admit(self, request: Request, pictures: Mapping[str, Any] = NOTHING) -> Demand | None:
        """Let the request pass, or refuse it. Returns what it asks for; None if that cannot be told yet.

        `pictures`: decoded, by field; empty before they are fetched.

        Raises:
            RequestTooLarge: with the numbers, and what would pass.
            InvalidInput: it cannot run with this profile, whatever the card.
        """
        if isinstance(request, SviEndframeRequest):
            check_inputs(request, self.profile, pictures)
        wanted = demand(request, self.profile, _given(request, pictures))
        if wanted is None:
            return None
        if not self.fits(wanted):
            raise RequestTooLarge(self._memory_sentence(_ask(request, wanted, pictures), wanted))
        if not self.is_little_work(wanted):
            raise RequestTooLarge(self._work_sentence(_ask(request, wanted, pictures), wanted))
        if isinstance(request, SviEndframeRequest):
            check_plan(request, self.profile)  # last, for it may import torch
        return wanted

    def needed_bytes(self, wanted: Demand) -> int:
        """Of the card, beside the weights."""
        return work_bytes(self.profile, wanted.shape, wanted.images, is_narrow=self.is_narrow)

    def fits(self, wanted: Demand) -> bool:
        return self.needed_bytes(wanted) <= self.room_bytes

    def is_little_work(self, wanted: Demand) -> bool:
        return self.limits.max_work_gpx is None or wanted.work_gpx <= self.limits.max_work_gpx

    def is_admitted(self, wanted: Demand) -> bool:
        return self.fits(wanted) and self.is_little_work(wanted)

    def planned(self, wanted: Demand | None) -> Demand:
        """What to load the profile for: this request or the usual one, whichever needs more.

        Where the card has no room for the usual one, this request.
        """
        usual = Demand(usual_shape(self.profile), 0)
        if wanted is None:
            return usual
        return max(usual, wanted, key=self.needed_bytes) if self.fits(usual) else wanted

    def advice(self, request: Request, pictures: Mapping[str, Any] = NOTHING) -> str:
        """What to try after the card ran out of memory although the request was admitted."""
        wanted = demand(request, self.profile, _given(request, pictures))
        if wanted is None:
            return "ask for less"
        most_bytes = EASIER * self.needed_bytes(wanted)
        ask = _ask(request, wanted, pictures)
        passing = self._passing(ask, lambda one: self.is_admitted(one) and self.needed_bytes(one) <= most_bytes)
        return f"try {', or '.join(passing)}" if passing else "there is no smaller size of this request to try"

    def _memory_sentence(self, ask: Ask, wanted: Demand) -> str:
        limits, needed_bytes = self.limits, self.needed_bytes(wanted)
        where, there_bytes = "host", limits.host_bytes
        peak_bytes = least_host_bytes(self.profile, limits.precision, needed_bytes, limits.budget_bytes)
        if peak_bytes is None or there_bytes is None:  # no placement fits the card, whatever the host has
            where, there_bytes = "card", limits.budget_bytes
            peak_bytes = least_card_bytes(self.profile, limits.precision, needed_bytes)
        return (
            f"{ask.words()} would take {peak_bytes / GIB:.1f} GiB of {where} memory, and this {where} has "
            f"{there_bytes / GIB:.1f} GiB; {_what_fits(self._passing(ask, self.is_admitted))}"
        )

    def _work_sentence(self, ask: Ask, wanted: Demand) -> str:
        passing = self._passing(ask, self.is_admitted)
        fewer = self._largest(smaller.fewer_steps, ask, self.is_admitted)
        if fewer is not None:
            field, steps = smaller.steps_of(fewer.request, self.profile)
            passing.append(f"{field} {steps}")
        return (
            f"{ask.words()} would be {wanted.work_gpx:.3g} gigapixels of work (pixels x frames x forwards), and this "
            f"worker takes {self.limits.max_work_gpx:g} (WORKER_MAX_WORK); {_what_fits(passing)}"
        )

    def _passing(self, ask: Ask, passes: Callable[[Demand], bool]) -> list[str]:
        """For each way to ask for less, the largest request that passes, in words."""
        found = (self._largest(way, ask, passes) for way in LESS)
        return [one.words() for one in found if one is not None]

    def _largest(self, way: smaller.Way, ask: Ask, passes: Callable[[Demand], bool]) -> Ask | None:
        def is_passing(one: Ask) -> bool:
            wanted = demand(one.request, self.profile, one.given)
            return wanted is not None and passes(wanted)

        # One after the other: a film in more clips needs less memory and is more work, so neither side of it is sorted.
        legal = (one for one in way(ask, self.profile) if not any(one.request.broken_rules()))
        return next((one for one in legal if is_passing(one)), None)


def _what_fits(passing: Sequence[str]) -> str:
    return f"what fits: {', or '.join(passing)}" if passing else "no smaller size of this request fits"


def _given(request: Request, pictures: Mapping[str, Any]) -> Size | None:
    picture = pictures.get("image_url") if isinstance(request, ImageRequest) else None
    return None if picture is None else Size(picture.height, picture.width)


def _ask(request: Request, wanted: Demand, pictures: Mapping[str, Any]) -> Ask:
    return Ask(request, Size(wanted.shape.height, wanted.shape.width), _given(request, pictures))
