"""What stands between a reader and the disk in tests, and who reads."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.readahead import ReadAhead


class Disk:
    """Stands in front of os.preadv. A read that is `held` waits while `gate` is shut; one that `fails` fails.

    Both are asked with the file and the offset of each read; `reads` has these and the bytes read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[Path, int, int]] = []
        self.fails: Callable[[Path, int], bool] = lambda *_: False
        self.gate = threading.Event()
        self.gate.set()
        self.held: Callable[[Path, int], bool] = lambda *_: False
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, places: list[memoryview], offset: int) -> int:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if self.held(path, offset):
            assert self.gate.wait(30)
        if self.fails(path, offset):
            raise OSError(5, "Input/output error")
        count = self._read(fd, places, offset)
        self.reads.append((path, offset, count))
        return count


def readers() -> list[str]:
    """The threads that read weights right now."""
    return [thread.name for thread in threading.enumerate() if thread.name == "weights"]


def readers_ahead() -> list[str]:
    """The threads that read files for nobody in particular."""
    return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]


def endless_ahead(monkeypatch: pytest.MonkeyPatch, bytes_read: int) -> ReadAhead:
    """One that has come so far, and reads until it is told to end."""
    monkeypatch.setattr(ReadAhead, "_steps", lambda self: iter(lambda: self._stopped.wait(0.01), True))
    ahead = ReadAhead([])
    ahead.bytes_read = bytes_read
    return ahead
