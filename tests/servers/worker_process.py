"""A real worker in a process of its own, connected to the loopback job server."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.runpod_server import RunPodServer

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

    def wait(self, timeout_s: float = 20.0) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)

    def log(self) -> str:
        """Everything the worker and its children have written to stdout and stderr."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


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
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    variables |= server.environment() | dict(environment or {})
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
