"""Decoding children: one process for each file, started before the file comes.

Python's start and Pillow's import are two thirds of what a picture's decoding takes from nothing. So a worker keeps a
few children that have both behind them and wait, with nothing of any request in them. Each decodes one file and ends.
"""

import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

CHILD = Path(__file__).with_name("decode_child.py")
MAX_STDERR_BYTES = 4096

_log = logging.getLogger(__name__)


class Child:
    """A process of `engine.decode_child` that waits for its order. What it makes of the file is in `result`.

    Bytes go in and pixels come out through anonymous memory: nothing touches a disk, no pipe can block, and the kernel
    bounds the result. It has an empty environment and no descriptor but its own; it ends by itself when this process
    does.

    Raises:
        OSError: no process, no descriptor or no memory is left to this one.
    """

    def __init__(self) -> None:
        with ExitStack() as opened:
            self._source = opened.enter_context(_memory("source"))
            self.result = opened.enter_context(_memory("result"))
            reading, writing = os.pipe()
            self._orders = opened.enter_context(os.fdopen(writing, "wb", buffering=0))
            with os.fdopen(reading, "rb", buffering=0):
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(CHILD), str(reading), *_package_folders()],
                    stdin=self._source,
                    stdout=self.result,
                    stderr=subprocess.PIPE,
                    pass_fds=[reading],
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            self._opened = opened.pop_all()

    def is_waiting(self) -> bool:
        """Whether it has not ended, by itself or by the system's hand."""
        return self._process.poll() is None

    def run(self, data: bytes, order: dict[str, Any], wall_s: float) -> tuple[int, str]:
        """Have it decode a file as `order` says, see `engine.decode_child.main`.

        Returns its exit status, negative for a signal, and the end of what it said on stderr.

        Raises:
            TimeoutError: it has not ended within `wall_s`.
        """
        ends = time.monotonic() + wall_s
        self._source.write(data)
        self._source.seek(0)
        with suppress(BrokenPipeError):  # it has ended already, and its status says how
            self._orders.write(json.dumps(order).encode() + b"\n")  # far below a pipe's room, so it is written at once
        self._orders.close()
        said = self._read_until_exit(ends)
        try:
            return self._process.wait(max(0.0, ends - time.monotonic())), said
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def _read_until_exit(self, ends: float) -> str:
        """What it says on stderr until it closes it, which its end does. Only the last bytes are kept."""
        assert self._process.stderr is not None
        poll = select.poll()
        poll.register(self._process.stderr, select.POLLIN)
        said = b""
        while (left_s := ends - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                chunk = os.read(self._process.stderr.fileno(), MAX_STDERR_BYTES)
                if not chunk:
                    break
                said = (said + chunk)[-MAX_STDERR_BYTES:]
        return said.decode(errors="replace")

    def leave_to_parent(self) -> None:
        """In a process forked from the one that started it: hold nothing that keeps it from seeing that one's end."""
        self._orders.close()

    def close(self) -> None:
        """End it, if it has not, and give back all that belongs to it."""
        self._process.kill()  # no effect on one that has ended
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._opened.close()


class Spares:
    """Children that wait. Without a call of `keep` there are none, and each is started when it is needed."""

    def __init__(self) -> None:
        self._wanted = 0
        self._waiting: deque[Child] = deque()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._leave_to_parent)  # RunPod's SDK forks a process for its pings

    def keep(self, count: int) -> None:
        """Have `count` children wait, from now on and after each that is taken; 0 ends those that do."""
        self._wanted = count
        self._fill()

    def take(self) -> Child:
        """A child that no file has been given to; the caller closes it, then calls `refill`.

        Raises:
            OSError: none waits, and none can be started.
        """
        with self._lock:
            while self._waiting:
                child = self._waiting.popleft()
                if child.is_waiting():
                    return child
                child.close()
        return Child()

    def refill(self) -> None:
        """Start what is missing, in a thread: whoever has taken a child goes on at once."""
        if self._wanted:
            with suppress(RuntimeError):  # no thread is left to this process; the file has been decoded all the same
                threading.Thread(target=self._fill, name="spares", daemon=True).start()

    def _leave_to_parent(self) -> None:
        for child in self._waiting:
            child.leave_to_parent()
        self._waiting = deque()
        self._wanted = 0

    def _fill(self) -> None:
        with self._lock:
            while len(self._waiting) > self._wanted:
                self._waiting.pop().close()
            try:
                while len(self._waiting) < self._wanted:
                    self._waiting.append(Child())
            except OSError as error:  # the next file's own attempt will say so to its caller
                _log.warning("no decoder could be started ahead: %s", error)


SPARES = Spares()
"""This process's."""


def _memory(name: str) -> BinaryIO:
    """A file that is nowhere but in memory."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _package_folders() -> list[str]:
    """Where Pillow and PyAV lie: the child runs without site-packages of its own."""
    specs = [importlib.util.find_spec(package) for package in ("PIL", "av")]
    return sorted({str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin})
