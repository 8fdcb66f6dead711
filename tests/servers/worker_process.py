"""A real worker in a process of its own, connected to the loopback job server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.runpod_server import PATIENCE_S, RunPodServer

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class WorkerProcess:
    process: subprocess.Popen[bytes]
    log_path: Path
    orphans: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self) -> None:
        """Send SIGTERM, as the platform does when it takes the worker away."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the worker alone, and remember its children, which may outlive it."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self.orphans += [int(child) for child in children]
        self.process.kill()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)

    def log(self) -> str:
        """Everything the worker and its children have written to stdout and stderr."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def least_environment(folder: Path) -> dict[str, str]:
    """With one thread: on a crowded machine OpenMP's threads wait for each other, and seconds become minutes."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def start_worker(
    server: RunPodServer,
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[WorkerProcess]:
    """Start `python command...` as a worker of `server`, in `folder`, with little else in its environment.

    On leaving, a worker that still runs is killed. A failing test shows the worker's log.
    """
    log_path = folder / "worker.log"
    variables = least_environment(folder) | server.environment() | dict(environment or {})
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=folder, env=variables, stdout=log, stderr=log
        )
    worker = WorkerProcess(process, log_path)
    try:
        yield worker
    except BaseException:
        sys.stderr.write(worker.log())
        raise
    finally:
        process.kill()
        process.wait()
        for orphan in worker.orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)


@contextmanager
def start_api(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Start `python command... --rp_serve_api` in `folder`; gives the port, on loopback, that the kernel chose.

    On leaving it is told to end, and must have. What it wrote is in the file `log`.
    """
    variables = least_environment(folder) | dict(environment or {})
    words = [sys.executable, *map(str, command), "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", "0"]
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=variables, stdout=log, stderr=log)
    try:
        ends = time.monotonic() + PATIENCE_S
        while not (listens := re.search(r"running on http://127\.0\.0\.1:(\d+)", log_path.read_text())):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < ends, log_path.read_text()
            time.sleep(0.05)
        yield int(listens[1])
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
