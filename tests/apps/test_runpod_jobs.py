"""RunPod's handler on its own: one job at a time, out of the thread before anything else happens."""

import asyncio
import faulthandler
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.credentials import Credentials

from apps.runpod_answers import FirstAnswers
from apps.runpod_jobs import Jobs, deadline_s
from apps.runpod_watch import Limits
from engine.progress import Progress
from engine.s3 import Objects, Patience
from engine.settings import Settings
from schemas.errors import GpuFault
from tests.servers.buckets import bucket_at

SETTINGS = Settings(output_dir=Path("output"), outbox_dir=Path("outbox"))


def job(job_id: str = "job0", **asked: Any) -> dict[str, Any]:
    return {"id": job_id, "input": asked}


class Card:
    """A `run` that notes when each job is on the card; steps of 20 ms."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.started = threading.Event()

    def __call__(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        self.notes.append(("on", job["id"]))
        self.started.set()
        try:
            with progress.stage("denoise", job["input"].get("steps", 1)) as step:
                for _ in range(job["input"].get("steps", 1)):
                    time.sleep(0.02)
                    step()
            return {"done": job["id"]}
        finally:
            time.sleep(0.1)  # what is cleared away after a cancel still belongs to the job
            self.notes.append(("off", job["id"]))


def test_a_cancelled_job_is_off_the_card_before_its_task_ends() -> None:
    async def cancel() -> None:
        task = asyncio.create_task(jobs.answer(job(steps=10_000)))
        await asyncio.to_thread(card.started.wait)
        task.cancel()
        await asyncio.sleep(0.03)
        task.cancel()  # a second stop is no reason to leave early
        with pytest.raises(asyncio.CancelledError):
            await task
        assert card.notes == [("on", "job0"), ("off", "job0")]

    card = Card()
    jobs = Jobs(card, SETTINGS)
    asyncio.run(asyncio.wait_for(cancel(), 60.0))


def test_work_before_the_first_job_runs_where_jobs_do() -> None:
    def note(*_: object) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return {}

    threads: list[int] = []
    jobs = Jobs(note, SETTINGS)
    jobs.in_card_thread(note)
    asyncio.run(jobs.answer(job()))
    assert len(threads) == 2
    assert len(set(threads)) == 1


def test_work_before_the_first_job_raises_what_it_raised() -> None:
    def fail() -> None:
        raise GpuFault("no card")

    with pytest.raises(GpuFault, match="no card"):
        Jobs(Card(), SETTINGS).in_card_thread(fail)


def test_jobs_that_come_together_run_one_after_the_other() -> None:
    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(jobs.answer(job("a", steps=3)), jobs.answer(job("b", steps=3)))

    card = Card()
    jobs = Jobs(card, SETTINGS)
    assert asyncio.run(both()) == [{"done": "a"}, {"done": "b"}]
    assert card.notes == [("on", "a"), ("off", "a"), ("on", "b"), ("off", "b")]


def test_the_same_job_that_comes_together_runs_once() -> None:
    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(jobs.answer(job("a")), jobs.answer(job("a")))

    card = Card()
    jobs = Jobs(card, SETTINGS)
    assert asyncio.run(both()) == [{"done": "a"}, {"done": "a"}]
    assert card.notes == [("on", "a"), ("off", "a")]


def test_without_its_first_answer_a_job_that_comes_again_would_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(jobs.answer(job("a")), jobs.answer(job("a")))

    monkeypatch.setattr(FirstAnswers, "recall", lambda *_: None)
    card = Card()
    jobs = Jobs(card, SETTINGS)
    asyncio.run(both())
    assert card.notes == [("on", "a"), ("off", "a")] * 2


def test_a_job_whose_url_would_soon_be_dead_runs_again() -> None:
    async def ask_twice() -> None:
        await jobs.answer(job("a"))
        await asyncio.sleep(0.6)  # over half of the URL's life
        await jobs.answer(job("a"))

    card = Card()
    jobs = Jobs(card, Settings(bucket_url_expiry_s=1))
    asyncio.run(ask_twice())
    assert card.notes == [("on", "a"), ("off", "a")] * 2


def test_a_cancelled_job_runs_when_it_comes_again() -> None:
    async def cancel_then_ask() -> dict[str, Any]:
        task = asyncio.create_task(jobs.answer(job(steps=20)))
        await asyncio.to_thread(card.started.wait)
        task.cancel()
        await asyncio.wait({task})
        return await jobs.answer(job(steps=20))

    card = Card()
    jobs = Jobs(card, SETTINGS)
    assert asyncio.run(cancel_then_ask()) == {"done": "job0"}


class AtOnce(ThreadPoolExecutor):
    """Runs a job before `submit` returns: the job's thread is always as fast as it can at times be."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(function, *args, **kwargs)
        future.exception(timeout=60.0)
        return future


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What faulthandler's timer was last told: the seconds, or None to stop."""
    told: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: told.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: told.append(None))
    return told


def test_the_timer_for_a_frozen_interpreter_runs_before_the_job_does(timer: list[float | None]) -> None:
    """Started after it, a job that froze in its first moments kept the worker for ever."""

    def run(_job: dict[str, Any], _progress: Progress) -> dict[str, Any]:
        return {"seen": list(timer)}

    jobs = Jobs(run, SETTINGS, Limits(frozen_s=7.0))
    jobs._card = AtOnce(1)
    assert asyncio.run(jobs.answer(job())) == {"seen": [7.0]}
    assert timer[-1] is None


def test_the_timer_ends_with_a_job_that_found_no_thread(timer: list[float | None]) -> None:
    """Left on, it ended a worker that waited for its next job."""

    class NoThreads(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], /, *_args: Any, **_kwargs: Any) -> Future[Any]:
            raise RuntimeError("can't start new thread")

    async def ask_and_count_tasks() -> int:
        with pytest.raises(RuntimeError):
            await jobs.answer(job())
        return len(asyncio.all_tasks())

    async def post(_job_id: str, _update: dict[str, Any]) -> None:
        return None

    jobs = Jobs(Card(), SETTINGS)
    jobs.post = post
    jobs._card = NoThreads(1)
    assert asyncio.run(ask_and_count_tasks()) == 1
    assert timer[-1] is None


def lose(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    raise GpuFault("the card is lost")


def test_after_a_fault_no_job_runs_and_the_process_ends_soon_even_if_the_interpreter_freezes(
    timer: list[float | None],
) -> None:
    jobs = Jobs(lose, SETTINGS, Limits(exit_s=9.0))
    first = asyncio.run(jobs.answer(job("a")))
    second = asyncio.run(jobs.answer(job("b")))
    assert first["refresh_worker"] is True
    assert (second["code"], second["retryable"]) == ("worker_shutdown", True)
    assert timer[-1] == 9.0  # and was not cancelled: a thread needs the interpreter's lock, this needs none


def test_an_ordinary_failure_leaves_the_worker_alone(timer: list[float | None]) -> None:
    def fail(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        raise RuntimeError("CUDA error: out of luck")

    jobs = Jobs(fail, SETTINGS)
    assert asyncio.run(jobs.answer(job()))["code"] == "internal"
    assert jobs.is_faulty is False
    assert timer[-1] is None


def test_progress_is_posted_under_the_jobs_id() -> None:
    async def post(job_id: str, update: dict[str, Any]) -> None:
        posts.append((job_id, update["stage"]))

    posts: list[tuple[str, str]] = []
    jobs = Jobs(Card(), SETTINGS, Limits(progress_interval_s=3600.0))
    jobs.post = post
    asyncio.run(jobs.answer(job("a", steps=5)))
    assert posts == [("a", "denoise")]


@pytest.mark.parametrize(
    ("policy", "operator_s", "expected_s"),
    [
        (None, None, None),
        (None, 300.0, 300.0),
        ({"executionTimeout": 600_000}, None, 590.0),
        ({"executionTimeout": 600_000}, 300.0, 300.0),
        ({"executionTimeout": 60_000}, 300.0, 50.0),
        ({"executionTimeout": 20_000}, None, None),
        ({"executionTimeout": 10**400}, None, 999_999_990.0),
        ({"executionTimeout": "600000"}, None, None),
        ({"executionTimeout": True}, None, None),
        ({}, 300.0, 300.0),
        ("fast", 300.0, 300.0),
    ],
)
def test_the_deadline_is_the_sooner_of_the_operators_and_the_requests(
    policy: object, operator_s: float | None, expected_s: float | None
) -> None:
    settings = Settings(deadline_s=operator_s)
    assert deadline_s({"id": "a", "input": {}, "policy": policy}, settings) == expected_s


def test_a_job_past_its_deadline_is_answered_timeout() -> None:
    jobs = Jobs(Card(), Settings(deadline_s=0.05))
    assert asyncio.run(jobs.answer(job(steps=10_000)))["code"] == "timeout"


def test_a_guests_keys_are_gone_with_its_job_also_when_no_store_answered() -> None:
    """Python looks for objects that only each other hold when it likes, and in 300 jobs it did not."""

    def upload(*_: object) -> dict[str, Any]:
        Objects(bucket_at("http://127.0.0.1:9", secret_key="a-guests-own")).head("a/video.mp4", Patience.lasting(0.0))
        return {}

    asked = {**job(), "s3Config": {"accessSecret": "a-guests-own"}}
    gc.disable()
    try:
        answer = asyncio.run(Jobs(upload, SETTINGS).answer(asked))
        held = [one for one in gc.get_objects() if isinstance(one, Credentials) and one.secret_key == "a-guests-own"]
    finally:
        gc.enable()
    assert "error" in answer
    assert held == []
