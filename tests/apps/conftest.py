"""One worker under the real loop that many tests share, since each start takes seconds."""

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.runpod_server import PATIENCE_S, RunPodServer
from tests.servers.worker_process import ROOT, WorkerProcess, start_worker

FAKE_WORKER = ROOT / "tests" / "apps" / "fake_worker.py"


@dataclass
class Running:
    server: RunPodServer
    worker: WorkerProcess
    jobs_path: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_id(self) -> str:
        return f"job{next(self._numbers)}"

    def answer(self, **asked: Any) -> dict[str, Any]:
        """Run a job and return what was posted as its result."""
        job_id = self.new_id()
        self.server.queue(job_id, asked)
        return self.server.result(job_id)

    def wait_for_start(self, job_id: str) -> None:
        ends = time.monotonic() + PATIENCE_S
        while not self.jobs_path.exists() or not self.ran(job_id):
            assert time.monotonic() < ends, f"{job_id} was never begun"
            time.sleep(0.02)

    def ran(self, job_id: str) -> list[tuple[str, float]]:
        """What the job itself wrote down: ("start" | "end", time), as often as it ran."""
        lines = [line.split() for line in self.jobs_path.read_text().splitlines()]
        return [(what, float(at)) for at, what, name in lines if name == job_id and what != "finish"]


@pytest.fixture(autouse=True)
def undisturbed_logging() -> Iterator[None]:
    """Put back what `engine.log.configure` sets for a whole process."""
    root = logging.getLogger()
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    logging.captureWarnings(False)
    logging.raiseExceptions = True


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker for all tests that leave it well. It logs as in an endpoint, at the SDK's own level."""
    folder = tmp_path_factory.mktemp("worker")
    environment = {
        "FAKE_JOB_LOG": str(folder / "jobs"),
        "FAKE_HASTE": "1",
        "RUNPOD_ENDPOINT_ID": "endpoint0",
        "RUNPOD_LOG_LEVEL": "DEBUG",
    }
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, environment) as worker:
        yield Running(server, worker, folder / "jobs")
