"""RunPod's handler: one job at a time, in the one thread that may touch the card."""

import asyncio
import faulthandler
import logging
import os
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from apps.runpod_answers import Answer, FirstAnswers, seal, seal_error
from apps.runpod_progress import Reporter
from apps.runpod_watch import PRODUCTION, Limits, Pulse, stacks
from engine.log import for_job, mask
from engine.progress import Progress, Update
from engine.settings import Settings
from schemas.errors import GpuFault, InvalidInput, WorkerError, WorkerShutdown

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often a running job is looked at."""

PLATFORM_MARGIN_S = 10.0
"""What a job needs to say that it ran out of time, before the platform ends it without a word."""

STDERR = 2
"""As a file descriptor, which stays what it is."""

Run = Callable[[dict[str, Any], Progress], dict[str, Any]]
Post = Callable[[str, dict[str, Any]], Awaitable[None]]


class Jobs:
    """Answers jobs, each with exactly one response, or with none if it was cancelled.

    `run` is called in the card's thread and may raise anything. `post` sends progress; None where nobody
    listens. After a fault `is_faulty` stays set: whoever takes jobs must stop, and `leave` ends the process.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        limits: Limits = PRODUCTION,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.post: Post | None = None
        self.is_faulty = False
        self._run = run
        self._settings = settings
        self._limits = limits
        self._leave = leave
        self._turn = asyncio.Lock()
        self._card = ThreadPoolExecutor(max_workers=1, thread_name_prefix="card")
        self._first_answers = FirstAnswers()

    async def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the response to one RunPod job; errors are responses too.

        Raises:
            asyncio.CancelledError: the job was stopped, and its thread is out.
        """
        async with self._turn:
            if self.is_faulty:
                shutdown = WorkerShutdown("this worker is being replaced; send the request again")
                return seal_error(shutdown).response()
            with for_job(str(job["id"])):
                answer = self._first_answers.recall(job)
                if answer is None:
                    answer = await self._generate(job)
                    self._first_answers.remember(job, answer)
                else:
                    log.info("delivered again; answered from the first result")
            return answer.response()

    async def _generate(self, job: dict[str, Any]) -> Answer:
        """Run the job in the card's thread, report its progress, and stop reporting before it is answered."""
        cancelled = threading.Event()
        pulse = Pulse(self._limits)
        reporter = Reporter(partial(self.post, job["id"]), self._limits) if self.post else None

        def send(update: Update) -> None:
            pulse.beat(update)
            if update.step == 0:
                log.info("stage %s, %d steps", update.stage, update.total, extra={"stage": update.stage})
            if reporter:
                reporter.offer(update)

        progress = Progress(send, cancelled=cancelled, deadline_s=deadline_s(job, self._settings))
        self._dump_if_frozen()  # first: the job's thread may run, and freeze, before this one runs again
        work = asyncio.get_running_loop().run_in_executor(self._card, self._work, job, progress)
        try:
            answer = await self._wait(work, pulse, cancelled)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if reporter:
                await reporter.close()
        return answer

    async def _wait(self, work: asyncio.Future[Answer], pulse: Pulse, cancelled: threading.Event) -> Answer:
        """Wait until the thread is really out. A thread that hangs is left behind, and soon the process."""
        answer = None
        while answer is None:
            try:
                await asyncio.wait({work}, timeout=TICK_S)
            except asyncio.CancelledError:
                cancelled.set()  # the job raises at its next step
            self._dump_if_frozen()
            if work.done():
                answer = work.result()
            elif hang := pulse.overdue():
                log.error("the job hangs: %s\n%s", hang, stacks())
                answer = seal_error(GpuFault("the card stopped answering; the worker is being replaced"))
        if answer.is_fault:
            self._retire()
        if cancelled.is_set():
            raise asyncio.CancelledError
        return answer

    def _dump_if_frozen(self) -> None:
        """Give this loop `frozen_s` to come here again, else every thread's stack is written and the process ends.

        Native code may hold the interpreter's lock, and with it this loop; the timer needs neither.
        """
        faulthandler.dump_traceback_later(self._limits.frozen_s, exit=True, file=STDERR)

    def _work(self, job: dict[str, Any], progress: Progress) -> Answer:
        """Turn whatever the job does into an answer. Runs in the card's thread; nothing escapes from here."""
        started = time.monotonic()
        with for_job(str(job["id"])):
            try:
                answer = seal(self._run(job, progress), self._settings.response_limit_bytes)
            except BaseException as error:  # noqa: BLE001 - the process boundary: also SystemExit and MemoryError
                _log_failure(error, job)
                answer = seal_error(error)
            seconds = round(time.monotonic() - started, 2)
            facts = {"seconds": seconds, "size_bytes": len(answer.body)}
            log.info("ended after %.2f s with %d bytes", seconds, len(answer.body), extra=facts)
            return answer

    def _retire(self) -> None:
        """Take no further job, and be gone soon even if nothing else works any more."""
        log.error("the card is lost; this worker answers and leaves")
        self.is_faulty = True
        deadline = threading.Timer(self._limits.exit_s, self._leave, (1,))
        deadline.daemon = True
        deadline.start()


def deadline_s(job: dict[str, Any], settings: Settings) -> float | None:
    """Return the sooner of the operator's limit and the request's `policy.executionTimeout` (in ms)."""
    policy = job.get("policy")
    timeout_ms = policy.get("executionTimeout") if isinstance(policy, dict) else None
    if not isinstance(timeout_ms, int) or timeout_ms <= 2000 * PLATFORM_MARGIN_S:
        return settings.deadline_s
    platform_s = timeout_ms / 1000 - PLATFORM_MARGIN_S
    return platform_s if settings.deadline_s is None else min(platform_s, settings.deadline_s)


def _log_failure(error: BaseException, job: dict[str, Any]) -> None:
    """Write down why a job failed, without what it asked for: a foreign exception may quote the prompt."""
    if isinstance(error, InvalidInput):
        log.warning("failed: invalid_input, %d problems", len(error.problems))
        return
    asked = [job.get("input"), job.get("s3Config"), job.get("webhook")]
    if isinstance(error, WorkerError) and error.http_status < 500:
        chain = [error, error.__cause__] if error.__cause__ else [error]
        texts = [line.rstrip() for cause in chain for line in traceback.format_exception_only(cause)]
        log.warning("failed: %s", mask(", from ".join(texts), asked))
    else:
        log.error("failed:\n%s", mask("".join(traceback.format_exception(error)), asked))
