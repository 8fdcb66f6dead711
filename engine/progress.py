"""Where a job stands: stages, steps, seconds, and the one place where a cancel takes hold."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from schemas.errors import Cancelled, JobTimeout


@dataclass(frozen=True)
class Update:
    """What the caller sees while the job runs. `percent` never falls within a job; `eta_s` is None until measurable."""

    stage: str
    step: int
    total: int
    percent: float
    eta_s: float | None


# Rough share of a job's time, in the order in which stages come: enough for a percentage that moves and never falls.
SHARES: Mapping[str, int] = MappingProxyType(
    {"fetch": 2, "load": 8, "encode": 5, "denoise": 70, "decode": 12, "upload": 3}
)


class Progress:
    """One job's clock and conscience: stages are timed, steps are reported, a cancel or deadline is raised at a step.

    `send` receives each Update from the thread that generates. `cancelled` may be set from any thread.
    """

    def __init__(
        self,
        send: Callable[[Update], None] | None = None,
        *,
        cancelled: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.cancelled = cancelled or threading.Event()
        self.timings_s: dict[str, float] = {}
        self._send = send
        self._started = time.monotonic()
        self._deadline = None if deadline_s is None else self._started + deadline_s
        self._percent = 0.0

    def check(self, ahead_s: float = 0.0) -> None:
        """Raise Cancelled or JobTimeout if the job must stop here. Called between steps, never inside one.

        `ahead_s`: what follows takes so long before the next check; a job whose time ends within it stops now, while
        it can still be answered.
        """
        if self.cancelled.is_set():
            raise Cancelled("the job was cancelled")
        if self._deadline is not None and time.monotonic() + ahead_s > self._deadline:
            raise JobTimeout("the job passed its time limit; ask for fewer frames or steps, or raise the limit")

    def pause(self, seconds: float) -> None:
        """Wait, but not past a cancel or the deadline: raises as `check` does."""
        left = seconds if self._deadline is None else min(seconds, max(0.0, self._deadline - time.monotonic()) + 0.001)
        self.cancelled.wait(left)
        self.check()

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[], None]]:
        """Time a stage and yield `step`, to be called after each of its `total` steps."""
        started = last = time.monotonic()
        done, fastest_s = 0, float("inf")

        def step() -> None:
            nonlocal done, last, fastest_s
            done += 1
            fastest_s, last = min(fastest_s, time.monotonic() - last), time.monotonic()
            self._report(name, done, total, started)
            self.check(fastest_s if 1 < done < total else 0.0)  # the first step may compile, and says nothing

        self.check()
        self._report(name, 0, total, started)
        try:
            yield step
        finally:
            self.add(name, time.monotonic() - started)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block's seconds under `name`, beside the stage that it is in."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under `name`: a stage, or something that runs within or beside the stages."""
        self.timings_s[name] = round(self.timings_s.get(name, 0.0) + seconds, 4)

    def _report(self, name: str, done: int, total: int, started: float) -> None:
        if self._send is None:
            return
        names = list(SHARES)
        before = sum(SHARES[stage] for stage in names[: names.index(name)]) if name in SHARES else 0
        share = before + SHARES.get(name, 0) * (done / total if total else 1.0)
        self._percent = max(self._percent, round(100 * share / sum(SHARES.values()), 1))
        eta_s = (time.monotonic() - started) / done * (total - done) if done and total > 1 else None
        self._send(Update(name, done, total, self._percent, None if eta_s is None else round(eta_s, 1)))
