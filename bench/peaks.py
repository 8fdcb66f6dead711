"""How much memory a job's parts need beyond what stays on the card: what the planner must leave free.

A planner that counts too little runs out of memory in the middle of a job; one that counts too much sends a model to
the host for nothing. So each span of a job is measured on its own: text, encode, a forward, decode, and what lies
between them. The plan is that of a capped card, the cap itself is lifted: the figures are wanted just where it breaks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.jobs import GIB
from bench.ours import Arm
from bench.say import say
from bench.watch import FORWARDS, Watch
from engine.backends import Backend, load_backend
from engine.card import Card
from engine.profile import Profile
from engine.progress import Update
from engine.settings import Settings

SHORT = 2  # steps: a forward of each expert
LATER_JOBS = 2  # after the first; the last is the one that counts, all its blocks compiled

Gauge = Callable[[], tuple[int, int]]
"""Peaks since it was last read: (allocated, reserved) bytes."""


@dataclass(frozen=True)
class Peak:
    """The most that a span of a job took."""

    precision: str
    forwards: str
    layout: str
    job: str
    """first: it loads, and compares the memoised encode with the stock one. later: warm."""
    span: str
    above_gib: float
    """Allocated beyond what stays on the card between jobs."""
    reserved_gib: float
    """By the allocator in all, what stays included."""


class PeakWatch(Watch):
    """Notes the peaks of every stage, of every model's call inside it, and of what lies between those."""

    def __init__(self, gauge: Gauge) -> None:
        super().__init__()
        self.peaks: dict[str, tuple[int, int]] = {}
        self._gauge = gauge
        self._now = self._stage = "load"

    def begin(self, name: str) -> None:
        if name not in self._open:
            self._turn_to(_span(name))
        super().begin(name)

    def end(self, name: str) -> None:
        super().end(name)
        self._turn_to(f"{self._stage}, after {_span(name)}")

    def hear(self, update: Update) -> None:
        """What the job says of itself: a stage that begins."""
        if update.step == 0:
            self._stage = update.stage
            self._turn_to(update.stage)

    def take_peaks(self) -> dict[str, tuple[int, int]]:
        """Span -> peaks of the job that ends here."""
        self._turn_to("load")
        taken, self.peaks = self.peaks, {}
        return taken

    def _turn_to(self, span: str) -> None:
        seen, before = self._gauge(), self.peaks.get(self._now, (0, 0))
        self.peaks[self._now] = (max(before[0], seen[0]), max(before[1], seen[1]))
        self._now = span


def measure(
    mode: str, settings: Settings, twins: Path, layouts: Sequence[str], *, is_small: bool = False
) -> list[Peak]:
    """The peaks of each layout's first and later jobs. About 2 minutes for two layouts compiled, 1 eager."""
    watch = PeakWatch(card_peaks)
    arm = Arm(mode, settings, twins, watch, is_small=is_small, load=_without_cap, send=watch.hear)
    seen: list[tuple[str, str, dict[str, tuple[int, int]]]] = []
    stays = 0
    for layout in layouts:
        for number in range(1 + LATER_JOBS):
            # With compiling, the first job is long enough for the compiler to finish behind it.
            steps = None if number == 0 and settings.compile else SHORT
            arm.run(layout, steps)
            seen.append((layout, "first" if number == 0 else f"later {number}", watch.take_peaks()))
            stays = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            say(f"work, {settings.precision}, {layout}: job {number + 1}, {stays / GIB:.2f} GiB stay")
    precision = arm.in_effect()["precision"]
    arm.close()
    forwards = {"first": "eager, then compiled", "later": "compiled"} if settings.compile else {}
    return list(_peaks(precision, forwards, seen, stays))


def card_peaks() -> tuple[int, int]:
    """Read the allocator's peaks, and let them count anew."""
    if not torch.cuda.is_available():
        return 0, 0
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def _peaks(
    precision: str, forwards: Mapping[str, str], seen: Sequence[tuple[str, str, dict[str, tuple[int, int]]]], stays: int
) -> Iterator[Peak]:
    for layout, which, spans in seen:
        if which not in ("first", f"later {LATER_JOBS}"):
            continue
        job = which.split()[0]
        for span, (allocated, reserved) in spans.items():
            above_gib = (allocated - stays) / GIB
            yield Peak(precision, forwards.get(job, "eager"), layout, job, span, above_gib, reserved / GIB)


def _span(name: str) -> str:
    return "forward" if name in FORWARDS else name


def _without_cap(profile: Profile, parts: Any, card: Card) -> Backend:
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
    return load_backend(profile, parts, card)
