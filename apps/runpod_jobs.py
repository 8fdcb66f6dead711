"""RunPod's handler: one job at a time, in the one thread that may touch the card."""

import asyncio
import faulthandler
import gc
import logging
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
from engine import host_memory
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
    listens. After a fault `is_faulty` stays set: whoever takes jobs must stop, and the process ends soon.
    """

    def __init__(self, run: Run, settings: Settings, limits: Limits = PRODUCTION) -> None:
        self.post: Post | None = None
        self.is_faulty = False
        self._run = run
        self._settings = settings
        self._limits = limits
        self._turn = asyncio.Lock()
        self._card = ThreadPoolExecutor(max_workers=1, thread_name_prefix="card")
        self._first_answers = FirstAnswers(max_age_s=settings.bucket_url_expiry_s / 2)  # its URLs live as long again

    def in_card_thread(self, work: Callable[[], object]) -> None:
        """Run `work` where jobs will run, and wait for it: what a library keeps for a thread is then there for them.

        Raises:
            Exception: what `work` raises.
        """
        self._card.submit(work).result()

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
        try:
            # First, for the job's thread may run, and freeze, before this one runs again.
            self._end_unless_back_in(self._limits.frozen_s)
            work = asyncio.get_running_loop().run_in_executor(self._card, self._work, job, progress)
            return await self._wait(work, pulse, cancelled)
        finally:
            if not self.is_faulty:  # a thread that was left behind may still freeze the rest
                faulthandler.cancel_dump_traceback_later()
            if reporter:
                await reporter.close()

    async def _wait(self, work: asyncio.Future[Answer], pulse: Pulse, cancelled: threading.Event) -> Answer:
        """Wait until the thread is really out. A thread that hangs is left behind, and soon the process."""
        answer = None
        while answer is None:
            try:
                await asyncio.wait({work}, timeout=TICK_S)
            except asyncio.CancelledError:
                cancelled.set()  # the job raises at its next step
            self._end_unless_back_in(self._limits.frozen_s)
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

    def _end_unless_back_in(self, seconds: float) -> None:
        """Write every thread's stack and end the process with code 1, unless this is called or cancelled by then.

        Native code may hold the interpreter's lock, and with it every Python thread; this timer needs neither.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)

    def _work(self, job: dict[str, Any], progress: Progress) -> Answer:
        """Turn whatever the job does into an answer. Runs in the card's thread; nothing escapes from here."""
        started = time.monotonic()
        with for_job(str(job["id"])):
            try:
                answer = seal(self._run(job, progress), self._settings.response_limit_bytes)
            except BaseException as error:  # noqa: BLE001 - the process boundary: also SystemExit and MemoryError
                _log_failure(error, job)
                answer = seal_error(error)
            if job.get("s3Config"):
                gc.collect()  # a store that was not reached leaves botocore's failure holding itself, and the keys
            host_memory.give_back_freed()
            seconds = round(time.monotonic() - started, 2)
            facts = {"seconds": seconds, "size_bytes": len(answer.body)}
            log.info("ended after %.2f s with %d bytes", seconds, len(answer.body), extra=facts)
            return answer

    def _retire(self) -> None:
        """Take no further job, and be gone soon even if nothing else works any more."""
        log.error("the card is lost; this worker answers and leaves")
        self.is_faulty = True
        self._end_unless_back_in(self._limits.exit_s)


def deadline_s(job: dict[str, Any], settings: Settings) -> float | None:
    """Return the sooner of the operator's limit and the request's `policy.executionTimeout` (in ms)."""
    policy = job.get("policy")
    timeout_ms = policy.get("executionTimeout") if isinstance(policy, dict) else None
    if not isinstance(timeout_ms, int) or timeout_ms <= 2000 * PLATFORM_MARGIN_S:
        return settings.deadline_s
    platform_s = min(timeout_ms, 10**12) / 1000 - PLATFORM_MARGIN_S  # JSON's integers may be too large to divide
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
