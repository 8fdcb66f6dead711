"""Our parts of the loop without the SDK's around them: the end of the taking, and the post of a result."""

import asyncio
import signal
import time
from types import SimpleNamespace
from typing import Any

import aiohttp

from apps.runpod_jobs import Jobs
from apps.runpod_loop import Drain, post_result
from apps.runpod_watch import Limits
from engine.progress import Progress
from engine.settings import Settings

JOB = {"id": "job0", "input": {}}


def run(_job: dict[str, Any], _progress: Progress) -> dict[str, Any]:
    return {"done": True}


class Platform:
    """A request for a job: open until `answer`, and then a few turns of the loop from being read."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()

    async def fetch(self, _session: Any, _wanted: int) -> list[dict[str, Any]]:
        self.asked.set()
        await self.answer.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        return [JOB]


def drain(platform: Platform, hand_out_s: float) -> Drain:
    scaler = SimpleNamespace(jobs_fetcher=platform.fetch, kill_worker=lambda: None)
    return Drain(scaler, Jobs(run, Settings()), Limits(hand_out_s=hand_out_s))


def test_a_job_that_comes_while_the_process_stands_still_is_taken() -> None:
    """The machine, or another thread, may keep the loop from running for longer than it would listen."""

    def stand_still() -> None:
        time.sleep(0.6)
        platform.answer.set()

    async def leave() -> list[dict[str, Any]] | None:
        taking = asyncio.create_task(draining.take(None, 1))
        await platform.asked.wait()
        draining.on_signal(signal.SIGTERM, None)
        asyncio.get_running_loop().call_later(0.05, stand_still)
        return await taking

    platform = Platform()
    draining = drain(platform, hand_out_s=0.5)
    assert asyncio.run(leave()) == [JOB]


def test_a_request_that_nobody_answers_is_given_up() -> None:
    async def leave() -> list[dict[str, Any]] | None:
        taking = asyncio.create_task(draining.take(None, 1))
        await platform.asked.wait()
        draining.on_signal(signal.SIGTERM, None)
        return await asyncio.wait_for(taking, 60.0)

    platform = Platform()
    draining = drain(platform, hand_out_s=0.1)
    assert asyncio.run(leave()) is None


def test_a_second_signal_after_the_loop_has_ended_is_no_failure() -> None:
    """It comes while the interpreter shuts down, and would turn exit code 0 into 1."""

    async def start() -> None:
        draining._loop = asyncio.get_running_loop()

    draining = drain(Platform(), hand_out_s=0.1)
    asyncio.run(start())
    draining.on_signal(signal.SIGTERM, None)


def test_a_result_that_was_taken_is_not_posted_again_though_the_answer_breaks_off() -> None:
    posts: list[bytes] = []

    async def take_and_break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        posts.append(await reader.readexactly(4))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")
        await writer.drain()
        writer.close()

    async def post() -> None:
        server = await asyncio.start_server(take_and_break_off, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, aiohttp.ClientSession() as session:
            limits = Limits(post_timeout_s=60.0, post_waits_s=(0.01, 0.01))
            await post_result(limits, session, f"http://127.0.0.1:{port}/job-done/job0", "body")

    asyncio.run(post())
    assert posts == [b"body"]
