"""Children that were started before their file came: each takes one, and none outlives what it waits for."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine import sandbox, spares
from engine.spares import Child, Spares
from tests.engine.test_sandbox import descriptors, is_running
from tests.zoo import photo, save

RULES = {"max_pixels": 2**24, "max_side": 8192, "min_side": 16}
PICTURE = save(photo(), "PNG")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spares]:
    """The process's spares for one test, without any at its end."""
    mine = Spares()
    monkeypatch.setattr(sandbox, "SPARES", mine)
    yield mine
    mine.keep(0)


def decode() -> bytes:
    return sandbox.decode(PICTURE, "PNG", RULES, sandbox.Limits(wall_s=30.0)).pixels


def pids(of: Spares) -> list[int]:
    return [child._process.pid for child in of._waiting]


def wait_until_filled(of: Spares, count: int) -> None:
    ends = time.monotonic() + 30
    while len(of._waiting) < count:
        assert time.monotonic() < ends, "no child was started"
        time.sleep(0.01)


def test_a_file_goes_to_a_child_that_waits_and_another_takes_its_place(kept: Spares) -> None:
    kept.keep(2)
    first, second = pids(kept)
    assert decode() == photo().tobytes()
    wait_until_filled(kept, 2)
    assert pids(kept)[0] == second
    assert first not in pids(kept)


def test_every_file_has_a_child_of_its_own(kept: Spares) -> None:
    kept.keep(1)
    seen = set()
    for _ in range(5):
        seen.update(pids(kept))
        decode()
        wait_until_filled(kept, 1)
    assert len(seen) == 5


def test_a_waiting_child_has_imported_pillow(kept: Spares) -> None:
    kept.keep(1)
    [pid] = pids(kept)
    ends = time.monotonic() + 30
    while "_webp" not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < ends, "it waits without Pillow"
        time.sleep(0.01)


def test_children_that_are_no_longer_wanted_end(kept: Spares) -> None:
    kept.keep(2)
    ended = pids(kept)
    kept.keep(0)
    assert pids(kept) == []
    assert not [pid for pid in ended if Path(f"/proc/{pid}").exists()]


def test_none_waits_where_none_was_asked_for(kept: Spares) -> None:
    assert decode() == photo().tobytes()
    assert pids(kept) == []


def test_a_child_that_died_while_it_waited_is_not_blamed_on_the_file(kept: Spares) -> None:
    kept.keep(2)
    for pid in pids(kept):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert decode() == photo().tobytes()


def test_a_dead_child_is_taken_for_a_damaged_file_where_nobody_looks(
    kept: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Child, "is_waiting", lambda _: True)
    kept.keep(1)
    [pid] = pids(kept)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(sandbox.Refused):
        decode()


@pytest.mark.parametrize("forked", ["", "if os.fork() == 0: time.sleep(600)"])
def test_a_waiting_child_ends_with_the_worker(forked: str) -> None:
    program = f"""
import os, sys, time
sys.path.insert(0, {str(Path.cwd())!r})
from engine.spares import SPARES
SPARES.keep(1)
{forked}
print(SPARES._waiting[0]._process.pid, flush=True)
time.sleep(600)
"""
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    worker.stdout.close()
    ends = time.monotonic() + 30
    try:
        while is_running(pid):
            assert time.monotonic() < ends, "the orphan lives on"
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


def test_a_process_forked_from_the_worker_keeps_no_order_from_a_child(kept: Spares) -> None:
    """As the SDK's pings do: begun before the order is written, alive until long after."""
    kept.keep(1)
    child = kept.take()  # so that the fork does not know it
    begun, ended = os.pipe()
    if (forked := os.fork()) == 0:
        os.close(ended)
        os.read(begun, 1)
        os._exit(0)
    try:
        kept._waiting.append(child)
        assert decode() == photo().tobytes()
    finally:
        os.close(ended)
        os.close(begun)
        os.waitpid(forked, 0)


def test_where_none_can_be_started_ahead_the_log_says_so(
    kept: Spares, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(spares.subprocess, "Popen", refuse)
        kept.keep(1)
    assert "no decoder could be started ahead: [Errno 11]" in caplog.text
    assert decode() == photo().tobytes()


def test_a_file_is_decoded_also_where_no_thread_is_left_to_start_the_next_child(
    kept: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kept.keep(1)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert decode() == photo().tobytes()


def test_children_that_are_not_started_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(spares.subprocess, "Popen", refuse)
    before = descriptors()
    for _ in range(5):
        with pytest.raises(OSError, match="unavailable"):
            Child()
    assert descriptors() <= before


def test_many_threads_never_share_a_child(kept: Spares) -> None:
    kept.keep(2)
    taken: list[Child] = []
    threads = [threading.Thread(target=lambda: taken.append(kept.take())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({child._process.pid for child in taken}) == 8
    for child in taken:
        child.close()
