"""RunPod's own worker loop, with what it lacks put in at four places.

The SDK (1.12.0) loses a job that it is handed around SIGTERM, gives up posting a result after five seconds,
leaves a heartbeat behind that speaks for a killed worker, and prints jobs and results. Each place is a name
of the SDK that `install` replaces; tests/apps/test_runpod_sdk.py fails if the code behind one changes.
"""

import asyncio
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from apps.runpod_jobs import Jobs
from apps.runpod_watch import Limits
from engine.log import for_job

log = logging.getLogger(__name__)

POST_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
"""What RunPod's API expects of a result, although it is JSON; as in the SDK's rp_http.py."""

PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that a process gets when its parent dies."""

HAND_OUT_LOOKS = 15
"""How often a request for a job is looked at within Limits.hand_out_s."""


def take_jobs(
    jobs: Jobs, checks: Sequence[Callable[[], None]], limits: Limits, ahead: Callable[[], None] | None = None
) -> None:
    """Take and answer jobs until the platform ends the worker or the card is lost. `ahead`: see `serve`.

    The SDK's own checks come before `checks`: by itself it would put them behind, and the last of ours may have filled
    card and host.
    """
    import runpod.serverless
    from runpod.serverless.modules import rp_fitness

    install(jobs, limits, ahead)
    rp_fitness._ensure_gpu_check_registered()
    rp_fitness._ensure_system_checks_registered()
    for check in checks:
        runpod.serverless.register_fitness_check(fitness_check(check, jobs))
    runpod.serverless.start({"handler": jobs.answer})


def fitness_check(check: Callable[[], None], jobs: Jobs) -> Callable[[], None]:
    """Return the check as the SDK takes it: in the card's thread, and with the `__name__` that a `partial` lacks."""

    def run() -> None:
        jobs.in_card_thread(check)

    run.__name__ = getattr(getattr(check, "func", check), "__name__", "check")
    return run


def install(jobs: Jobs, limits: Limits, ahead: Callable[[], None] | None = None) -> None:
    """Replace the SDK's log, heartbeat, post of results and job scaler."""
    from runpod.serverless.modules import rp_http, rp_ping, rp_scale

    quiet_sdk_log()
    scaler = rp_scale.JobScaler
    rp_scale.JobScaler = lambda config: Drain(scaler(config), jobs, limits, ahead).scaler
    rp_http._transmit = partial(post_result, limits)
    rp_ping.Heartbeat.process_loop = staticmethod(ping_while_parent_lives)


def quiet_sdk_log() -> None:
    """Send what the SDK prints to our log, without levels DEBUG and TRACE, which show jobs and results."""
    from runpod.serverless.modules import rp_logger

    levels = {"INFO": logging.INFO, "TIP": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}
    ranks = rp_logger.LOG_LEVELS

    def write(self: Any, message: object, message_level: str = "INFO", job_id: object = None) -> None:
        wanted = message_level == "TIP" or ranks.index(self.level) <= ranks.index(message_level)
        if message_level in levels and wanted and self.level != "NOTSET":
            with for_job("" if job_id is None else str(job_id)):
                logging.getLogger("runpod").log(levels[message_level], "%s", message)

    rp_logger.RunPodLogger.log = write


class Drain:
    """Keeps one of the SDK's job scalers going until every job it was handed is answered.

    The stock scaler stops running jobs at the signal, while its request for the next one is still open; what
    that request brings is lost. Here the signal only ends the taking, and the scaler is told to stop once
    nothing can come any more. The end after a fault goes the same way.
    """

    def __init__(self, scaler: Any, jobs: Jobs, limits: Limits, ahead: Callable[[], None] | None = None) -> None:
        """`ahead`: see `apps.runpod_worker.serve`."""
        self.scaler = scaler
        self._jobs = jobs
        self._limits = limits
        self._ahead = ahead
        self._fetch = scaler.jobs_fetcher
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = asyncio.Event()
        scaler.jobs_fetcher = self.take
        scaler.handle_shutdown = self.on_signal
        scaler.run = self.run

    async def run(self) -> None:
        """Take and run jobs until the end; obey stop signals to the last."""
        from runpod.http_client import AsyncClientSession

        self._loop = asyncio.get_running_loop()
        if self._ahead is not None:
            threading.Thread(target=self._ahead, name="ahead").start()
        async with AsyncClientSession() as session:
            self._jobs.post = progress_post(session)
            stops = asyncio.create_task(self.scaler.monitor_stop_signals(session))
            try:
                await asyncio.gather(self.scaler.get_jobs(session), self.scaler.run_jobs(session))
            finally:
                stops.cancel()
                await asyncio.gather(stops, return_exceptions=True)

    async def take(self, session: Any, wanted: int) -> list[dict[str, Any]] | None:
        """Ask for a job, and at a signal keep asking just long enough for one that is on its way."""
        if self._leaving.is_set() or self._jobs.is_faulty:
            self.scaler.kill_worker()
            return None
        request = asyncio.create_task(self._fetch(session, wanted))
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({request, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for _ in range(HAND_OUT_LOOKS):  # a loop that stood still meanwhile has not read what came
                await asyncio.wait({request}, timeout=self._limits.hand_out_s / HAND_OUT_LOOKS)
            return request.result() if request.done() else None
        finally:
            request.cancel()
            leaving.cancel()

    def on_signal(self, _number: int, _frame: object) -> None:
        if self._loop is None:
            self._leave()
        else:  # a signal interrupts the loop anywhere, and does not wake it
            with suppress(RuntimeError):  # the loop has ended, since this is not the first signal
                self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        log.info("told to leave: no further jobs; what was taken is answered")
        self._leaving.set()


def progress_post(session: Any) -> Callable[[str, dict[str, Any]], Any] | None:
    """Return what posts one update of a job over the loop's session, or None without an address for it."""
    from runpod.serverless.modules import rp_http

    if rp_http.JOB_DONE_URL_TEMPLATE == "JOB_DONE_URL":  # the SDK's placeholder for a variable that is not set
        return None

    async def post(job_id: str, update: dict[str, Any]) -> None:
        url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": update})
        headers = POST_HEADERS | {"X-Request-ID": job_id}
        async with session.post(url, data=body, headers=headers, raise_for_status=True) as response:
            await response.read()

    return post


async def post_result(limits: Limits, session: Any, url: str, body: str) -> None:
    """Post a result, and try again for minutes while the other side is out; a refusal is final.

    Raises:
        aiohttp.ClientError: refused, or still out at the last attempt. The SDK logs it.
    """
    from aiohttp import ClientConnectionError, ClientError, ClientResponseError, ClientTimeout

    job_id = session.headers.get("X-Request-ID", "")  # set by the SDK for each result
    timeout = ClientTimeout(total=limits.post_timeout_s)
    for wait_s in (*limits.post_waits_s, None):
        try:
            async with session.post(url, data=body, headers=POST_HEADERS, timeout=timeout) as response:
                response.raise_for_status()
                with suppress(ClientError, TimeoutError):  # it was taken, whatever becomes of what is said about it
                    await response.read()
            return
        except TimeoutError as error:
            failure: ClientError = ClientConnectionError("the result was not taken in time")
            failure.__cause__ = error
        except ClientError as error:
            failure = error
        status = failure.status if isinstance(failure, ClientResponseError) else 503
        if wait_s is None or (status < 500 and status not in (408, 429)):
            raise failure
        with for_job(job_id):
            log.warning("the result could not be posted (%s); again in %.1f s", type(failure).__name__, wait_s)
        await asyncio.sleep(wait_s)


def ping_while_parent_lives(mirror: Any = None, test: bool = False) -> None:
    """Run the SDK's heartbeat in its child process, and end with the worker, however that ends."""
    from runpod.serverless.modules import rp_ping

    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:  # it died before it could take this child along
        return
    heartbeat = rp_ping.Heartbeat()
    heartbeat._mirror = mirror
    heartbeat.ping_loop(test)
