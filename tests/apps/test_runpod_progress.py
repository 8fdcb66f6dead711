"""Progress: in order, seldom, never after the end."""

import asyncio
import itertools
import threading
from typing import Any

import pytest

from apps.runpod_progress import Reporter
from apps.runpod_watch import Limits
from engine.progress import Update

LIMITS = Limits(progress_interval_s=0.05, progress_timeout_s=0.2)


def update(step: int) -> Update:
    return Update("denoise", step, 100, float(step), None)


class Listener:
    """Takes updates with their times; `delay_s` before each, and an error instead if `fails`."""

    def __init__(self, delay_s: float = 0.0, fails: bool = False) -> None:
        self.taken: list[tuple[float, dict[str, Any]]] = []
        self.asked = 0
        self._delay_s = delay_s
        self._fails = fails

    async def __call__(self, body: dict[str, Any]) -> None:
        self.asked += 1
        await asyncio.sleep(self._delay_s)
        if self._fails:
            raise ConnectionError
        self.taken.append((asyncio.get_running_loop().time(), body))

    @property
    def steps(self) -> list[int]:
        return [body["step"] for _, body in self.taken]


async def report(listener: Listener, steps: int, pause_s: float) -> float:
    """Offer updates from another thread, close, and wait for stragglers. Returns the time of closing."""
    reporter = Reporter(listener, LIMITS)

    def work() -> None:
        for step in range(steps):
            reporter.offer(update(step))
            pause.wait(pause_s)

    pause = threading.Event()
    await asyncio.to_thread(work)
    await reporter.close()
    closed = asyncio.get_running_loop().time()
    reporter.offer(update(999))
    await asyncio.sleep(0.1)
    return closed


def test_updates_arrive_in_order_with_the_interval_between_them() -> None:
    listener = Listener()
    asyncio.run(report(listener, steps=30, pause_s=0.01))
    assert listener.steps == sorted(set(listener.steps))
    assert len(listener.steps) >= 3
    assert all(b - a >= 0.049 for (a, _), (b, _) in itertools.pairwise(listener.taken))
    assert listener.taken[0][1] == {
        "stage": "denoise",
        "step": listener.steps[0],
        "total": 100,
        "percent": float(listener.steps[0]),
        "eta_s": None,
    }


def test_the_latest_update_wins() -> None:
    listener = Listener()
    asyncio.run(report(listener, steps=30, pause_s=0.01))
    assert listener.steps[1] > 1


def test_nothing_is_posted_after_close() -> None:
    listener = Listener(delay_s=0.03)
    closed = asyncio.run(report(listener, steps=10, pause_s=0.01))
    assert listener.taken[-1][0] <= closed
    assert 999 not in listener.steps


def test_without_the_close_an_update_would_come_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave_alone(_self: Reporter) -> None:
        return None

    monkeypatch.setattr(Reporter, "close", leave_alone)
    listener = Listener(delay_s=0.03)
    closed = asyncio.run(report(listener, steps=10, pause_s=0.01))
    assert listener.taken[-1][0] > closed


def test_a_slow_listener_delays_the_close_by_its_timeout_at_most() -> None:
    async def close_with_a_post_in_flight() -> float:
        reporter = Reporter(listener, LIMITS)
        reporter.offer(update(0))
        await asyncio.sleep(0.05)
        before = asyncio.get_running_loop().time()
        await reporter.close()
        return asyncio.get_running_loop().time() - before

    listener = Listener(delay_s=5.0)
    assert 0.1 < asyncio.run(close_with_a_post_in_flight()) < 2.0
    assert listener.taken == []


def test_close_without_any_update_is_immediate() -> None:
    listener = Listener()

    async def open_and_close() -> None:
        await Reporter(listener, LIMITS).close()

    asyncio.run(asyncio.wait_for(open_and_close(), 0.5))
    assert listener.asked == 0


def test_three_failures_in_a_row_end_the_posting() -> None:
    listener = Listener(fails=True)
    asyncio.run(report(listener, steps=60, pause_s=0.01))
    assert listener.asked == 3


def test_an_update_from_a_thread_that_outlives_the_loop_is_ignored() -> None:
    async def leave() -> Reporter:
        reporter = Reporter(Listener(), LIMITS)
        await reporter.close()
        return reporter

    reporter = asyncio.run(leave())
    reporter.offer(update(1))
