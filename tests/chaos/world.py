"""The world of a chaos run: stores, picture servers, the job server, and one worker after another."""

import base64
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos.history import End, History
from tests.conftest import TWINS
from tests.servers.buckets import client_of
from tests.servers.fault_proxy import FaultProxy
from tests.servers.http_peer import Peer, redirect, send_for_ever, serve
from tests.servers.runpod_server import Event, RunPodServer
from tests.servers.swift import Swift
from tests.servers.worker_process import ROOT, WorkerProcess, start_worker
from tests.soak.small_jobs import pictures
from tests.soak.success import whole_objects

BUCKETS = ("chaos", "chaos-guest")
UNFIT = ("the store did not answer", "the store is failing")
"""What a worker says that found the store out when it started."""


@dataclass
class World:
    """`queue`, `kill` and so on act; the outcome is judged at the end, in `history`."""

    swift: Swift
    proxy: FaultProxy
    server: RunPodServer
    peers: dict[str, Peer]
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    asked: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    expected: dict[str, frozenset[str]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    ends: list[End] = field(default_factory=list)
    is_leaving: bool = False
    worker: WorkerProcess | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _started_at: float = 0.0

    def start(self) -> None:
        """Start a worker in a folder of its own. All share the outbox, as on a network volume."""
        place = self.folder / f"worker{len(self.ends)}"
        (place / "tmp").mkdir(parents=True)
        allowed = [f"127.0.0.1:{peer.port}" for peer in self.peers.values()] + [f"127.0.0.1:{self.swift.port}"]
        variables = {
            "WORKER_WEIGHTS_DIR": str(TWINS),
            "WORKER_OUTBOX_DIR": str(self.folder / "outbox"),
            "WORKER_FETCH_ALLOW": ",".join(allowed),
            "WORKER_FETCH_TIMEOUT_S": "1.5",
            "BUCKET_ENDPOINT_URL": f"{self.proxy.endpoint}/{BUCKETS[0]}",
            "BUCKET_ACCESS_KEY_ID": self.swift.access_key,
            "BUCKET_SECRET_ACCESS_KEY": self.swift.secret_key,
            "BUCKET_RETRY_S": "5",
            "RUNPOD_ENDPOINT_ID": "endpoint0",
            "TMPDIR": str(place / "tmp"),
        }
        self._started_at = time.monotonic()
        self.worker = self._stack.enter_context(
            start_worker(self.server, [ROOT / "tests/soak/worker.py"], place, variables)
        )
        self.is_leaving = False

    def terminate(self) -> None:
        self.worker.terminate()
        self.is_leaving = True
        self.counts["SIGTERM"] += 1

    def kill(self) -> None:
        """Kill the worker; the platform delivers again what it had been handed and not answered."""
        self.worker.kill()
        self.worker.wait()
        self.counts["SIGKILL"] += 1
        lost = self.unanswered()
        self._note_end("kill")
        for job_id in lost:
            self.counts["delivered again after a kill"] += 1
            self.deliver(job_id)

    def notice_end(self) -> bool:
        """Whether the worker has ended by itself, since it was told to or would not start."""
        if self.worker is None or self.worker.process.poll() is None:
            return False
        how = "term"
        if not self._since_start("take") and self.is_leaving:
            how = "early"
        elif not self._since_start("take") and any(sentence in self.worker.log() for sentence in UNFIT):
            how = "unfit"
        self.counts[f"worker ended: {how}"] += 1
        self._note_end(how)
        return True

    def ask(self, job_id: str, payload: Any, codes: set[str], **top_level: Any) -> None:
        self.asked[job_id] = (payload, top_level)
        self.expected[job_id] = frozenset(codes)
        self.deliver(job_id)

    def deliver(self, job_id: str) -> None:
        payload, top_level = self.asked[job_id]
        self.server.queue(job_id, payload, **top_level)

    def stop(self, job_id: str) -> None:
        self.stopped.add(job_id)
        self.server.stop(job_id)

    def unanswered(self) -> list[str]:
        """Jobs handed to this worker that it has not answered."""
        handed = {event.job_id: event.at for event in self._since_start("hand_out")}
        results = {event.job_id: event.at for event in self.server.of("result")}
        return [job for job, at in handed.items() if job not in self.stopped and results.get(job, 0.0) < at]

    def waiting(self) -> list[str]:
        """Jobs that have no answer yet."""
        answered = {event.job_id for event in self.server.of("result")}
        return [job for job in self.asked if job not in answered and job not in self.stopped]

    def heal(self) -> None:
        """No fault from now on."""
        self.proxy.reset()
        self.server.progress_faults.clear()
        self.server.result_faults.clear()

    def history(self) -> History:
        outbox = self.folder / "outbox"
        objects = {key: body for name in BUCKETS for key, body in whole_objects(self.swift, name).items()}
        return History(
            expected=self.expected,
            stopped=frozenset(self.stopped),
            events=tuple(event for event in self.server.events if event.job_id in self.expected),
            ends=tuple(self.ends),
            objects=objects,
            outbox=tuple(place.name for place in outbox.iterdir()) if outbox.exists() else (),
            guests=frozenset(job_id for job_id, (_, top_level) in self.asked.items() if "s3Config" in top_level),
        )

    def close(self) -> None:
        self._stack.close()

    def _since_start(self, kind: str) -> list[Event]:
        """What this worker did."""
        return [event for event in self.server.of(kind) if event.at >= self._started_at]

    def _note_end(self, how: Any) -> None:
        worker = self.worker
        left = tuple(path.name for path in (worker.log_path.parent / "tmp").iterdir() if path.name.startswith("job-"))
        self.ends.append(End(time.monotonic(), how, worker.process.returncode, left, worker.log()))
        self.worker = None


@contextmanager
def a_world(swift: Swift, folder: Path) -> Iterator[World]:
    """Everything up but the worker. The store's faults are on the way of the operator's bucket, not of a guest's."""
    for name in BUCKETS:
        client_of(swift).create_bucket(Bucket=name)
    picture = serve(picture_bytes())
    drip = send_for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", every_s=0.1)
    scripts = {
        "good": picture,
        "slow": drip,
        "broken": serve(b"", "500 Broken"),
        "moved inside": redirect("http://169.254.169.254/latest/meta-data/"),
        "not a picture": serve(b"<html></html>"),
    }
    with ExitStack() as stack:
        peers = {name: stack.enter_context(Peer(script)) for name, script in scripts.items()}
        proxy = stack.enter_context(FaultProxy(swift.port))
        server = stack.enter_context(RunPodServer())
        world = World(swift, proxy, server, peers, folder)
        stack.callback(world.close)
        yield world


def picture_bytes() -> bytes:
    return base64.b64decode(pictures()[0].split(",")[1])


def pick(random: Random, weights: dict[str, float]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]
