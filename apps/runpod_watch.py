"""How long things may take before the worker stops believing in them, and the watch on a job's steps."""

import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.progress import Update


@dataclass(frozen=True)
class Limits:
    """Patience, in seconds. The defaults are for a card in production; a test is less patient."""

    step_s: float = 60.0
    """Least time a step may take after its stage's first one."""
    step_factor: float = 8.0
    """A step may also take this many times the stage's median step."""
    stage_s: float = 900.0
    """A stage's first step, which may load 45 GB from a network volume or compile kernels."""
    frozen_s: float = 300.0
    """The event loop itself: only native code that keeps the interpreter's lock can hold it up."""
    exit_s: float = 30.0
    """From a fault to the end of the process, with or without an answer."""
    hand_out_s: float = 1.5
    """From SIGTERM to giving up the request for a job, which the platform may be answering just then."""
    progress_interval_s: float = 1.0
    progress_timeout_s: float = 2.0
    post_timeout_s: float = 60.0
    """One attempt to post a result."""
    post_waits_s: tuple[float, ...] = (0.5, 1, 2, 4, 8, 15, 15, 15, 15, 15, 15)
    """Waits between the attempts to post a result: about two minutes; the SDK gives up after five seconds."""


PRODUCTION = Limits()

# These two wait for other machines, within wall-clock budgets of their own that an operator may set to hours.
UNWATCHED = frozenset({"fetch", "upload"})


class _Beat(NamedTuple):
    """The last one: when, in which stage, and the seconds of each of its steps so far."""

    at: float
    stage: str
    steps_s: tuple[float, ...] = ()


class Pulse:
    """The time since a job's last step, and whether that is too long.

    The job's own thread calls `beat` and the loop `overdue`: what the one tells the other is replaced as a whole,
    since a mixture of two beats would give up a job that does well.
    """

    def __init__(self, limits: Limits, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._now = now
        self._last = _Beat(now(), "start")

    def beat(self, update: Update) -> None:
        now = self._now()
        steps_s = (*self._last.steps_s, now - self._last.at) if update.step else ()
        self._last = _Beat(now, update.stage, steps_s)

    def overdue(self) -> str | None:
        """Return what hangs, for the log, or None."""
        last = self._last
        waited_s = self._now() - last.at
        if last.stage in UNWATCHED or waited_s <= self._limit_s(last.steps_s):
            return None
        return f"no step for {waited_s:.1f} s in stage {last.stage} after {len(last.steps_s)} steps"

    def _limit_s(self, steps_s: tuple[float, ...]) -> float:
        if not steps_s:
            return self._limits.stage_s
        return max(self._limits.step_s, self._limits.step_factor * statistics.median(steps_s))


def stacks() -> str:
    """Return where every thread stands: files, lines and names, no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
