"""A worker with the fake job, as a script: `python fake_worker.py [handler.py's arguments]`.

FAKE_CHECK=fail makes its fitness check fail. FAKE_HASTE=1 shortens the SDK's sleep of 1 s between two jobs.
FAKE_WITHOUT names a guard to run without, which shows that its test would notice: drain, latch, heartbeat,
quiet, wait, watch, patience or texts.
"""

import asyncio
import os
import sys
from functools import partial
from types import SimpleNamespace

from apps import runpod_loop
from apps.runpod_answers import seal
from apps.runpod_jobs import Jobs
from apps.runpod_watch import Limits, Pulse
from apps.runpod_worker import serve
from engine.settings import Settings
from schemas.errors import WeightsCorrupt
from tests.apps.fake_job import run

LIMITS = Limits(  # each longer than a crowded machine may keep a process from running, or what did well is given up
    step_s=5.0,
    step_factor=4.0,
    stage_s=60.0,
    frozen_s=10.0,
    exit_s=15.0,
    progress_interval_s=0.1,
    progress_timeout_s=2.0,
    post_timeout_s=5.0,
    post_waits_s=(0.05,) * 11,
)


def check_weights() -> None:
    if os.environ.get("FAKE_CHECK") == "fail":
        raise WeightsCorrupt("the manifest does not match")


def without_drain() -> None:
    """Let the SDK's scaler end as it does, and say on stdout when it runs no more jobs."""

    def leave_alone(scaler, _jobs, _limits, _ahead):
        run_jobs = scaler.run_jobs

        async def run_and_tell(session):
            await run_jobs(session)
            sys.stdout.write("no more jobs are run\n")
            sys.stdout.flush()

        scaler.run_jobs = run_and_tell
        return SimpleNamespace(scaler=scaler)

    runpod_loop.Drain = leave_alone


def without_latch() -> None:
    def answer_only(_self):
        return None

    Jobs._retire = answer_only


def without_heartbeat() -> None:
    from runpod.serverless.modules import rp_ping

    runpod_loop.ping_while_parent_lives = rp_ping.Heartbeat.process_loop


def without_quiet() -> None:
    def leave_alone():
        return None

    runpod_loop.quiet_sdk_log = leave_alone


def without_wait() -> None:
    """Leave a cancelled job's thread alone, as a handler on asyncio.to_thread does."""

    async def run_in_a_thread(self, job):
        from engine.progress import Progress

        return await asyncio.to_thread(self._work, job, Progress())

    Jobs._generate = run_in_a_thread


def without_watch() -> None:
    def see_nothing(_self):
        return None

    Pulse.overdue = see_nothing


def without_texts() -> None:
    """Let what a job raises out of the thread, to the SDK and its answer to exceptions."""

    def work(self, job, progress):
        return seal(self._run(job, progress), self._settings.response_limit_bytes)

    Jobs._work = work


def without_patience() -> None:
    """Post a result as the SDK does: three times, within seconds."""
    from runpod.serverless.modules import rp_http

    transmit = rp_http._transmit
    install = runpod_loop.install

    def install_all_but_the_post(jobs, limits, ahead):
        install(jobs, limits, ahead)
        rp_http._transmit = transmit

    runpod_loop.install = install_all_but_the_post


def hurry() -> None:
    """Cut the SDK's sleeps to 50 ms. Nothing depends on their length, and many jobs take minutes less."""
    from runpod.serverless.modules import rp_scale

    async def nap(delay_s: float) -> None:
        await asyncio.sleep(min(delay_s, 0.05))

    rp_scale.asyncio = SimpleNamespace(**vars(asyncio) | {"sleep": nap})


if __name__ == "__main__":
    if os.environ.get("FAKE_HASTE"):
        hurry()
    if guard := os.environ.get("FAKE_WITHOUT"):
        globals()[f"without_{guard}"]()
    sys.exit(serve(run, Settings.from_env(os.environ), sys.argv[1:], [partial(check_weights)], LIMITS))
