"""Files are on their way before anybody asks for their bytes, in the order of need, and within bounds."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import host_memory, readahead
from engine.profiles import PROFILES
from engine.readahead import ReadAhead, order_of_need
from engine.settings import Settings
from engine.weights import locate

STEP = 1000
is_in_memory = readahead._is_in_memory


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "STEP_BYTES", STEP)
    monkeypatch.setattr(readahead, "_is_in_memory", lambda *_: False)  # files that were just written are


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(2500))
    return paths


def finish(ahead: ReadAhead) -> int:
    for thread in ahead._threads:
        thread.join(10)
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]
    return ahead.bytes_read


def test_first_step_is_read_before_anything_else_happens(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    assert ReadAhead(files).bytes_read == STEP


def test_every_file_is_read(files: list[Path]) -> None:
    assert finish(ReadAhead(files)) == 7500


def test_no_more_is_read_than_allowed(files: list[Path]) -> None:
    assert finish(ReadAhead(files, max_bytes=3000)) == 3500  # the step that passes the bound is the last


def test_no_more_is_read_than_half_of_the_free_memory(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 6000)
    assert finish(ReadAhead(files)) == 3500


def test_file_that_cannot_be_read_is_left_out(files: list[Path], tmp_path: Path) -> None:
    assert finish(ReadAhead([tmp_path / "nobody", tmp_path, *files[1:]])) == 5000


def test_step_is_one_call_that_fills_a_small_buffer_again_and_again(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "BUFFER_BYTES", STEP // 4)
    read, calls = os.preadv, list[tuple[int, int]]()
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, places, at: calls.append((len(places), len({*map(id, places)}))) or read(fd, places, at),
    )
    assert finish(ReadAhead(files[:1])) == 2500
    assert calls == [(4, 1)] * 3


def test_next_step_is_under_way_while_one_thread_waits_for_the_interpreter(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, both = os.preadv, threading.Barrier(2)
    at: list[int] = []

    def meets_the_other(fd: int, places: list[bytearray], offset: int) -> int:
        at.append(offset)
        if len(at) > 1:  # the first one is the constructor's
            both.wait(10)
        return read(fd, places, offset)

    monkeypatch.setattr(os, "preadv", meets_the_other)
    assert finish(ReadAhead(files[:1])) == 2500
    assert sorted(at) == [0, STEP, 2 * STEP]


class PageCache:
    """Stands in for os.preadv: bytes of `held` offsets answer at once, others are counted as read from a disk."""

    def __init__(self, held: range) -> None:
        self._held = held
        self.steps: list[int] = []

    def preadv(self, _descriptor: int, places: list[bytearray], at: int, flags: int = 0) -> int:
        if flags != os.RWF_NOWAIT:
            self.steps.append(at)
            return STEP
        if at not in self._held:
            raise BlockingIOError
        return sum(map(len, places))


@pytest.mark.parametrize(
    ("held", "steps"),
    [
        (range(3 * STEP), []),
        (range(STEP), [STEP, 2 * STEP]),
        (range(STEP // 2, 2 * STEP), [0, 2 * STEP]),  # the beginning of a step is gone
        (range(STEP, 3 * STEP - 1), [0, 2 * STEP]),  # its end is
        (range(0), [0, STEP, 2 * STEP]),
    ],
)
def test_step_that_is_in_memory_is_passed_over_and_counts_as_read(
    held: range, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(3 * STEP))
    cache = PageCache(held)
    monkeypatch.setattr(readahead, "_is_in_memory", is_in_memory)
    monkeypatch.setattr(os, "preadv", cache.preadv)
    assert finish(ReadAhead([path])) == 3 * STEP
    assert sorted(cache.steps) == steps


@pytest.mark.parametrize("platform_has_flag", [True, False])
def test_file_system_or_platform_that_cannot_tell_has_every_step_read(
    platform_has_flag: bool, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def preadv(descriptor: int, places: list[bytearray], at: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no such flag here")
        return read(descriptor, places, at)

    monkeypatch.setattr(readahead, "_is_in_memory", is_in_memory)
    monkeypatch.setattr(os, "preadv", preadv)
    if not platform_has_flag:
        monkeypatch.delattr(os, "RWF_NOWAIT")
    assert finish(ReadAhead(files)) == 7500
    with files[0].open("rb") as stream:
        assert not is_in_memory(stream.fileno(), 0, STEP)


def test_nothing_to_read_is_nothing_to_do() -> None:
    assert finish(ReadAhead([])) == 0


def test_stop_ends_it_between_two_steps(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    ahead = ReadAhead(files)
    ahead._stopped.set()
    for thread in ahead._threads:
        begun(thread)
    ahead.stop()
    assert ahead.bytes_read == STEP


def test_it_goes_on_until_who_reads_for_good_has_reached_it(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    ahead = ReadAhead(files)
    ahead.reached(STEP - 1)
    assert not ahead._stopped.is_set()
    ahead.reached(STEP)
    assert ahead._stopped.is_set()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Readers that end when they are stopped; none from before the test, none after it."""
    monkeypatch.setattr(ReadAhead, "last", None)
    monkeypatch.setattr(ReadAhead, "_is_owed", False)
    monkeypatch.setattr(ReadAhead, "_steps", lambda self: iter(lambda: self._stopped.wait(0.01), True))
    yield
    if ReadAhead.last is not None:
        ReadAhead.last.stop()


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.mark.usefixtures("endless")
def test_request_goes_on_with_the_reader_that_one_of_the_same_files_left(
    twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    baked = locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=twins))
    one, other = (baked.parts().ahead for _ in range(2))
    assert one is not None
    assert other is one
    assert at_work() == one._threads


@pytest.mark.usefixtures("endless")
def test_request_takes_the_place_of_the_reader_that_one_of_other_files_left(
    twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    settings = Settings(weights_dir=twins)
    one, other = (locate(PROFILES[name], settings).parts().ahead for name in ("sdxl", "wan22_i2v_svi"))
    assert one is not None
    assert other is not None
    assert other is not one
    assert at_work() == other._threads


@pytest.mark.usefixtures("endless")
def test_none_begins_once_libraries_are_there_but_the_one_that_is_owed(files: list[Path]) -> None:
    assert ReadAhead.of(files, begins=False) is None
    ReadAhead.owe()
    one = ReadAhead.of(files, begins=False)
    assert one is not None
    assert ReadAhead.of(files[:1], begins=False) is None
    assert at_work() == []


def test_order_is_vae_encoders_and_then_the_transformers() -> None:
    names = ["tokenizer", "text_encoder", "vae", "image_encoder", "transformer", "transformer_2"]
    assert order_of_need(names) == ["vae", "text_encoder", "image_encoder", "tokenizer", "transformer", "transformer_2"]
    assert order_of_need(["unet"]) == ["unet"]
