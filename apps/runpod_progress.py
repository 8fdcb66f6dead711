"""A job's progress on its way to the caller: in order, seldom enough, and never after the result."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from apps.runpod_watch import Limits
from engine.progress import Update

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""After so many posts in a row have failed, the job goes on in silence."""

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Reporter:
    """Carries updates from the job's thread to the loop, which posts the latest one at a time.

    Made and closed on the loop. After `close` nothing is posted any more, and nothing is in flight.
    """

    def __init__(self, send: Send, limits: Limits) -> None:
        self._send = send
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._latest: Update | None = None
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._pump = asyncio.create_task(self._post_all())

    def offer(self, update: Update) -> None:
        """Take an update, from any thread. A newer one replaces it if its turn has not come."""
        with suppress(RuntimeError):  # the loop has ended: this thread hung, and was given up
            self._loop.call_soon_threadsafe(self._put, update)

    async def close(self) -> None:
        """Let a post in flight end, within its timeout, and drop what waits."""
        self._closing.set()
        self._news.set()
        await self._pump

    def _put(self, update: Update) -> None:
        self._latest = update
        self._news.set()

    async def _post_all(self) -> None:
        failures = 0
        while failures < MAX_FAILURES:
            await self._news.wait()
            if self._closing.is_set() or self._latest is None:
                return
            self._news.clear()
            update, self._latest = self._latest, None
            failures = 0 if await self._post(update) else failures + 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._limits.progress_interval_s)
        log.warning("progress is no longer posted for this job: %d posts in a row failed", failures)

    async def _post(self, update: Update) -> bool:
        try:
            async with asyncio.timeout(self._limits.progress_timeout_s):
                await self._send(asdict(update))
        except Exception as error:  # noqa: BLE001 - no failure to report progress may touch the job
            log.warning("progress could not be posted (%s)", type(error).__name__)
            return False
        return True
