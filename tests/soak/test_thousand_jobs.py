"""A thousand jobs through the worker as it is deployed: handler.py, the SDK's loop, the twins, a real S3 server.

Seven in ten succeed, a quarter fails in five ways, one in twenty is stopped. What the worker holds is looked at from
outside after every job; the twenty jobs before the hundredth and the last twenty are compared, for they are the same.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.conftest import TWINS
from tests.figures import Count, Figure
from tests.servers.buckets import empty_bucket
from tests.servers.http_peer import Peer, serve
from tests.servers.runpod_server import RunPodServer
from tests.servers.swift import Swift
from tests.servers.worker_process import ROOT, WorkerProcess, start_worker
from tests.soak.footprint import ALLOCATOR, Footprint, footprint, of_a_round
from tests.soak.small_jobs import CANARY, Job, endless, failing, good
from tests.soak.success import is_true, whole_objects

pytest_plugins = ["tests.servers.s3_fixtures", "tests.figures"]

MODES = ("image", "video", "svi_endframe")
ROUND = 20
"""Jobs that are alike from one round to the next: 14 good ones, mode by mode, 5 that fail, 1 that is stopped."""

BUCKET = "thousand-jobs"
GROWTH_BYTES = 16 * 2**20
FIRST_JOB_S = 120.0
"""The first job waits for torch, diffusers and the weights."""


@dataclass
class Run:
    """What came of the jobs, in order."""

    seconds: list[float] = field(default_factory=list)
    held: list[Footprint] = field(default_factory=list)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def window(self, end: int) -> Footprint:
        """What was held throughout the round that ends with job number `end`."""
        return of_a_round(self.held[end - ROUND : end])

    def growth(self, start: int) -> dict[str, int]:
        """How much more is held in the last round than in the one that ends with job number `start`."""
        before, after = self.window(start), self.window(len(self.held))
        return {name: getattr(after, name) - getattr(before, name) for name in vars(before)}


def jobs(count: int, swift: Swift, broken_url: str) -> Iterator[Job]:
    for number in range(count):
        place = number % ROUND
        if place < 14:
            yield good(MODES[place // 5], number)
        elif place < 19:
            yield failing(place + number // ROUND, swift, broken_url)
        else:
            yield endless(number)


def refused_jobs(count: int, swift: Swift, broken_url: str) -> Iterator[Job]:
    """The quickest there are."""
    return (failing(0, swift, broken_url) for _ in range(count))


def run(count: int, swift: Swift, folder: Path, kinds=jobs, **environment: str) -> tuple[Run, str]:
    """Run so many jobs one after another. Returns what came of them, and the worker's log."""
    temporary = folder / "tmp"
    temporary.mkdir()
    empty_bucket(swift, BUCKET)
    ran, random = Run(), Random(0)
    with RunPodServer() as server, Peer(serve(b"", "500 Broken")) as broken:
        variables = {
            "WORKER_WEIGHTS_DIR": str(TWINS),
            "WORKER_OUTBOX_DIR": str(folder / "outbox"),
            "WORKER_FETCH_ALLOW": f"127.0.0.1:{broken.port},127.0.0.1:{swift.port}",
            "BUCKET_ENDPOINT_URL": f"{swift.endpoint}/{BUCKET}",
            "BUCKET_ACCESS_KEY_ID": swift.access_key,
            "BUCKET_SECRET_ACCESS_KEY": swift.secret_key,
            "RUNPOD_ENDPOINT_ID": "endpoint0",
            **ALLOCATOR,
            "TMPDIR": str(temporary),
        } | environment
        with start_worker(server, [ROOT / "tests/soak/worker.py"], folder, variables) as worker:
            for number, job in enumerate(kinds(count, swift, broken.url("/picture.png"))):
                started = time.monotonic()
                problem = run_one(server, job, f"job{number}", ran, random)
                ran.seconds.append(time.monotonic() - started)
                ran.held.append(footprint(worker.pid, temporary))
                if problem:
                    ran.wrong.append(f"job{number}: {problem}")
            ends_well(worker, ran)
        return ran, worker.log()


def run_one(server: RunPodServer, job: Job, job_id: str, ran: Run, random: Random) -> str | None:
    """Run the job to its end; say what is wrong with how it was answered."""
    server.queue(job_id, job.payload, **dict(job.top_level))
    if job.code == "stopped":
        server.wait_for("progress", job_id, timeout_s=FIRST_JOB_S)
        time.sleep(random.uniform(0.0, 0.2))
        server.stop(job_id)
        server.queue(f"{job_id}-after", {"prompt": 7})
        server.result(f"{job_id}-after", FIRST_JOB_S)
        return "answered, though it was stopped" if server.of("result", job_id) else None
    answer = server.result(job_id, FIRST_JOB_S)
    ran.answers[job_id] = answer
    code = answer.get("output", {}).get("code", "")
    return None if code == job.code else f"{code or 'success'} instead of {job.code or 'success'}"


def ends_well(worker: WorkerProcess, ran: Run) -> None:
    worker.terminate()
    if worker.wait() != 0:
        ran.wrong.append("the worker ended with a failure")


def false_successes(ran: Run, stored: dict[str, bytes], play_every: int) -> list[str]:
    """Successes without an object that is what the answer says; every so many-th is also played."""
    successes = [(job_id, answer["output"]) for job_id, answer in ran.answers.items() if "code" not in answer["output"]]
    return [
        job_id
        for number, (job_id, output) in enumerate(successes)
        if not is_true(output, stored, play=number % play_every == 0)
    ]


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_thousand_jobs_leave_the_worker_as_it_was(swift: Swift, tmp_path: Path, figure: Figure) -> None:
    ran, log = run(1000, swift, tmp_path)
    stored = whole_objects(swift, BUCKET)
    false = false_successes(ran, stored, play_every=10)
    answered = Counter(answer["output"].get("code", "success") for answer in ran.answers.values())
    growth = ran.growth(100)
    steady, last = statistics.fmean(ran.seconds[100:200]), statistics.fmean(ran.seconds[-100:])
    figure("1,000 jobs: answers", ", ".join(f"{count} {code}" for code, count in answered.most_common()))
    figure("1,000 jobs: held after job 100 and after job 1000", f"{ran.window(100)}; {ran.window(1000)}")
    figure("1,000 jobs: growth of memory from job 100 to 1000", f"{growth['resident'] / 2**20:.1f} of 16 MiB allowed")
    figure("1,000 jobs: false successes", Count(len(false), answered["success"]))
    figure("1,000 jobs: speed of the last 100 against jobs 101 to 200", f"{100 * steady / last:.0f} %")
    figure("1,000 jobs: canaries in the log", str(log.count(CANARY)))
    assert ran.wrong == []
    assert false == []
    assert answered["success"] == 700
    assert growth.pop("resident") < GROWTH_BYTES
    assert {name: more for name, more in growth.items() if more > 0} == {}
    assert CANARY not in log


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_leak_of_a_hundred_kilobytes_a_job_is_seen(swift: Swift, tmp_path: Path, figure: Figure) -> None:
    """The control of the test above, over 220 jobs instead of 900, and those that are refused at once."""
    ran, _ = run(280, swift, tmp_path, refused_jobs, SOAK_LEAK_BYTES="100000")
    grown = ran.growth(60)["resident"]
    figure("control: growth in 220 jobs that leak 100 kB each", f"{grown / 2**20:.1f} MiB, 16 allowed")
    assert grown > GROWTH_BYTES
