"""RunPod's job API on loopback: it hands out, stops and takes back jobs as the platform does, and records it.

Use as a context manager. The worker's addresses are in `environment()`. Everything the worker does becomes an
`Event` with a time, in order of arrival.
"""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

POLL_S = 60.0
"""How long an empty job-take or job-stop request is held open."""

PATIENCE_S = 120.0
"""How long a test waits for what must come. A crowded machine takes half a minute to start five workers at once."""


@dataclass(frozen=True)
class Event:
    """`kind`: take (asked), hand_out, stop, progress, result, refused, ping. `at` is time.monotonic()."""

    at: float
    kind: str
    job_id: str = ""
    body: Any = None


@dataclass
class Fault:
    """What a post meets instead of being taken: after `delay_s` HTTP `status`, or 0: the line is cut."""

    status: int = 503
    delay_s: float = 0.0


@dataclass
class RunPodServer:
    """`result_faults` and `progress_faults` are used up one a post, in order; then posts are taken.

    A result over `max_result_bytes` never is; 10 MB is what RunPod takes of a job that came by /run.
    """

    result_faults: deque[Fault] = field(default_factory=deque)
    progress_faults: deque[Fault] = field(default_factory=deque)
    hand_out_delay_s: float = 0.0
    max_result_bytes: int = 10_000_000
    events: list[Event] = field(default_factory=list)
    _jobs: deque[dict[str, Any]] = field(default_factory=deque)
    _stops: deque[str] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False
    _port: int = 0

    def __enter__(self) -> "RunPodServer":
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, ping_interval_ms: int = 1000) -> dict[str, str]:
        """The variables by which a worker finds its platform. The SDK's checks of the machine are off."""
        base = f"http://127.0.0.1:{self._port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": str(ping_interval_ms),
            "RUNPOD_AI_API_KEY": "rpa_LOOPBACKLOOPBACKLOOPBACK",
            "RUNPOD_POD_ID": "pod0",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def queue(self, job_id: str, payload: Any, **top_level: Any) -> None:
        """Put a job in the queue. `top_level`: what stands beside `input`, as `s3Config` or `policy` do."""
        with self._changed:
            self._jobs.append({"id": job_id, "input": payload, **top_level})
            self._changed.notify_all()

    def stop(self, job_id: str) -> None:
        """Take a job back: the worker hears of it on its stop channel."""
        with self._changed:
            self._stops.append(job_id)
            self._changed.notify_all()

    def of(self, kind: str, job_id: str | None = None) -> list[Event]:
        with self._changed:
            return [e for e in self.events if e.kind == kind and job_id in (None, e.job_id)]

    def wait_for(self, kind: str, job_id: str | None = None, count: int = 1, timeout_s: float = PATIENCE_S) -> Event:
        """Return the `count`-th such event, and wait for it if it has not come.

        Raises:
            TimeoutError: with what came instead.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [e for e in self.events if e.kind == kind and job_id in (None, e.job_id)]
                if len(found) >= count:
                    return found[count - 1]
                if not self._changed.wait(deadline - time.monotonic()):
                    seen = [(e.kind, e.job_id) for e in self.events if e.kind != "ping"]
                    raise TimeoutError(f"{len(found)} of {count} {kind} {job_id or ''} after {timeout_s} s: {seen}")

    def result(self, job_id: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return what the worker posted as the job's result."""
        body: dict[str, Any] = self.wait_for("result", job_id, timeout_s=timeout_s).body
        return body

    def record(self, kind: str, job_id: str = "", body: Any = None) -> None:
        with self._changed:
            self.events.append(Event(time.monotonic(), kind, job_id, body))
            self._changed.notify_all()

    def next_job(self, is_gone: Callable[[], bool]) -> dict[str, Any] | None:
        return self._next(self._jobs, is_gone)

    def next_stops(self, is_gone: Callable[[], bool]) -> list[str]:
        job_id = self._next(self._stops, is_gone)
        return [] if job_id is None else [job_id]

    def _next(self, waiting: deque[Any], is_gone: Callable[[], bool]) -> Any:
        """Hold a poll open until there is something, nobody listens any more, or POLL_S is over."""
        deadline = time.monotonic() + POLL_S
        with self._changed:
            while not self._closed and time.monotonic() < deadline:
                if is_gone():
                    return None
                if waiting:
                    return waiting.popleft()
                self._changed.wait(0.1)
        return None


def _handler(server: RunPodServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            with _ignoring_a_closed_connection():
                if "/job-take/" in url.path:
                    self._hand_out()
                elif "/job-stop/" in url.path:
                    stops = server.next_stops(self._is_gone)
                    for job_id in stops:
                        server.record("stop", job_id)
                    self._reply(200, {"jobsToStop": stops}) if stops else self._reply(204)
                else:
                    query = parse_qs(url.query)
                    server.record("ping", query.get("job_id", [""])[0], query)
                    self._reply(200, {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            job_id = urlsplit(self.path).path.rsplit("/", 1)[1]
            parsed = json.loads(body, parse_constant=_no_constant)
            kind = "progress" if parsed.get("status") == "IN_PROGRESS" else "result"
            faults = server.progress_faults if kind == "progress" else server.result_faults
            fault = faults.popleft() if faults else None
            if len(body) > server.max_result_bytes:
                fault = Fault(400)
            with _ignoring_a_closed_connection():
                if fault is None:
                    server.record(kind, job_id, parsed)
                    self._reply(200, {})
                else:
                    server.record("refused", job_id, kind)
                    time.sleep(fault.delay_s)
                    self._reply(fault.status, {}) if fault.status else self._cut()

        def _hand_out(self) -> None:
            server.record("take")
            job = server.next_job(self._is_gone)
            if job is None:
                self._reply(204)
                return
            time.sleep(server.hand_out_delay_s)
            server.record("hand_out", job["id"])
            self._reply(200, job)

        def _cut(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _is_gone(self) -> bool:
            """Whether the worker has closed the connection; only then is there something to read: its end."""
            self.connection.setblocking(False)
            try:
                return self.connection.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True
            finally:
                self.connection.setblocking(True)

        def _reply(self, status: int, body: Any = None) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            if data:
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@contextmanager
def _ignoring_a_closed_connection() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        return
