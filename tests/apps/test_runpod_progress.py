"""Progress: in order, seldom, never after the end."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from apps.runpod_progress import Reporter
from apps.runpod_watch import Limits
from engine.progress import Update

LIMITS = Limits(progress_interval_s=0.05, progress_timeout_s=30.0)


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


async def report(listener: Listener, steps: int) -> float:
    """Offer updates from another thread, one each 10 ms, and close. Returns the time of closing."""
    reporter = Reporter(listener, LIMITS)

    def work() -> None:
        for step in range(steps):
            reporter.offer(update(step))
            pause.wait(0.01)

    pause = threading.Event()
    await asyncio.to_thread(work)
    await reporter.close()
    closed = asyncio.get_running_loop().time()
    reporter.offer(update(999))
    return closed


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not holds():
            await asyncio.sleep(0.01)


def test_updates_arrive_in_order_with_the_interval_between_them() -> None:
    listener = Listener()
    asyncio.run(report(listener, steps=100))
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
    async def offer_three_during_a_post() -> None:
        reporter = Reporter(listener, LIMITS)
        reporter.offer(update(0))
        await until(lambda: listener.asked == 1)
        for step in (1, 2, 3):
            reporter.offer(update(step))
        await until(lambda: len(listener.taken) == 2)
        await reporter.close()

    listener = Listener(delay_s=0.1)
    asyncio.run(offer_three_during_a_post())
    assert listener.steps == [0, 3]


def test_a_post_in_flight_ends_before_the_close_and_none_comes_after_it() -> None:
    async def close_in_the_middle() -> float:
        reporter = Reporter(listener, LIMITS)
        reporter.offer(update(0))
        await until(lambda: listener.asked == 1)
        reporter.offer(update(1))
        await reporter.close()
        closed = asyncio.get_running_loop().time()
        reporter.offer(update(999))
        await asyncio.sleep(0.2)
        return closed

    listener = Listener(delay_s=0.1)
    closed = asyncio.run(close_in_the_middle())
    assert listener.steps == [0]
    assert listener.taken[-1][0] <= closed


def test_without_the_close_an_update_would_come_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave_alone(_self: Reporter) -> None:
        return None

    async def report_and_listen() -> float:
        closed = await report(listener, steps=10)
        await until(lambda: 999 in listener.steps)
        return closed

    monkeypatch.setattr(Reporter, "close", leave_alone)
    listener = Listener()
    closed = asyncio.run(report_and_listen())
    assert listener.taken[-1][0] > closed


def test_a_slow_listener_delays_the_close_by_its_timeout_at_most() -> None:
    async def close_with_a_post_in_flight() -> None:
        reporter = Reporter(listener, Limits(progress_timeout_s=0.2))
        reporter.offer(update(0))
        await until(lambda: listener.asked == 1)
        await reporter.close()

    listener = Listener(delay_s=3600.0)
    asyncio.run(asyncio.wait_for(close_with_a_post_in_flight(), 60.0))
    assert listener.taken == []


def test_close_without_any_update_is_immediate() -> None:
    listener = Listener()

    async def open_and_close() -> None:
        await Reporter(listener, Limits(progress_interval_s=3600.0)).close()

    asyncio.run(asyncio.wait_for(open_and_close(), 60.0))
    assert listener.asked == 0


def test_three_failures_in_a_row_end_the_posting() -> None:
    async def offer_until_it_gives_up() -> None:
        reporter = Reporter(listener, LIMITS)
        further = 10
        while listener.asked < 3 or further > 0:
            further -= listener.asked >= 3
            reporter.offer(update(1))
            await asyncio.sleep(0.03)
        await reporter.close()

    listener = Listener(fails=True)
    asyncio.run(offer_until_it_gives_up())
    assert listener.asked == 3


def test_an_update_from_a_thread_that_outlives_the_loop_is_ignored() -> None:
    async def leave() -> Reporter:
        reporter = Reporter(Listener(), LIMITS)
        await reporter.close()
        return reporter

    reporter = asyncio.run(leave())
    reporter.offer(update(1))
