"""Weights that are still coming: in order, each byte once, waited for piece by piece, and no thread left behind."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from engine.arrival import Arrival, Coming
from engine.progress import Progress
from engine.reading import Lane, Wanted
from engine.tensorfile import Spec, TensorWriter, read_offsets
from schemas.errors import Cancelled, JobTimeout, WeightsCorrupt
from tests.engine.disk import Disk, endless_ahead, readers, readers_ahead

PIECES = 6
ROWS = 64  # of each piece, 1 kB


def value(file: str, piece: int) -> torch.Tensor:
    return torch.full((ROWS, 4), float(100 * "ab".index(file) + piece))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in "ab":
        specs = [Spec(str(piece), torch.float32, (ROWS, 4)) for piece in range(PIECES)]
        with TensorWriter(tmp_path / file, specs) as writer:
            for piece in range(PIECES):
                writer.write(str(piece), value(file, piece))
    return tmp_path


def opened(folder: Path, file: str) -> tuple[BinaryIO, list[Wanted]]:
    stream = (folder / file).open("rb", buffering=0)
    places = read_offsets(stream)
    assert places is not None
    return stream, [Wanted(place, torch.zeros(place.shape), int(name)) for name, place in places.items()]


def expected(arrival: Arrival, folder: Path, file: str, **more: Any) -> tuple[Coming, list[torch.Tensor]]:
    stream, wanted = opened(folder, file)
    return arrival.expect(file, stream, wanted, **more), [each.target for each in wanted]


@pytest.fixture
def arrival() -> Iterator[Arrival]:
    arrival = Arrival("cpu", lanes=1, chunk_bytes=1024)
    yield arrival
    arrival.close()
    assert readers() == []


def is_page(offset: int, piece: int) -> bool:
    """Whether a read at `offset` is that of `piece`; the header is a page."""
    return offset == 4096 + 1024 * piece


def test_all_arrives_and_each_byte_is_read_once(arrival: Arrival, folder: Path, disk: Disk) -> None:
    both = [expected(arrival, folder, file) for file in "ab"]
    for coming, _ in both:
        coming.wait_whole()
    for file, (_, targets) in zip("ab", both, strict=True):
        assert all(torch.equal(target, value(file, i)) for i, target in enumerate(targets))
    assert disk.reads == [(folder / file, 4096 + 1024 * i, 1024) for file in "ab" for i in range(PIECES)]
    assert arrival.tally.bytes_read == 2 * PIECES * 1024


def test_several_lanes_read_each_byte_once(folder: Path, disk: Disk) -> None:
    arrival = Arrival("cpu", lanes=5, chunk_bytes=1024)
    both = [expected(arrival, folder, file) for file in "ab"]
    for (coming, targets), file in zip(both, "ab", strict=True):
        coming.wait_whole()
        assert all(torch.equal(target, value(file, i)) for i, target in enumerate(targets))
    assert sorted(disk.reads) == [(folder / file, 4096 + 1024 * i, 1024) for file in "ab" for i in range(PIECES)]
    arrival.close()
    assert readers() == []


def test_piece_is_there_while_the_next_is_still_on_its_way(arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 3)
    coming, targets = expected(arrival, folder, "a")
    coming.wait(2)
    assert torch.equal(targets[2], value("a", 2))
    assert [coming.is_there(i) for i in range(PIECES)] == [True, True, True, False, False, False]
    assert not coming.is_whole
    disk.gate.set()
    coming.wait_whole()
    assert coming.is_whole


def test_settle_is_called_once_with_each_whole_piece(arrival: Arrival, folder: Path) -> None:
    settled: list[int] = []
    targets: list[torch.Tensor] = []

    def settle(piece: int) -> None:
        assert torch.equal(targets[piece], value("a", piece))
        settled.append(piece)

    stream, wanted = opened(folder, "a")
    targets += [each.target for each in wanted]
    coming = arrival.expect("a", stream, wanted, settle)
    coming.wait_whole()
    arrival.pause()
    assert settled == list(range(PIECES))


def test_settle_that_fails_is_raised_where_somebody_waits(arrival: Arrival, folder: Path) -> None:
    def settle(piece: int) -> None:
        if piece == 1:
            raise MemoryError("no memory to lock")

    coming, _ = expected(arrival, folder, "a", settle=settle)
    with pytest.raises(MemoryError):
        coming.wait_whole()
    coming.wait_whole()


def test_wait_raises_what_stopped_the_reading(arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.fails = lambda path, offset: path.name == "b" and is_page(offset, 2)
    (first, _), (second, _) = (expected(arrival, folder, file) for file in "ab")
    first.wait_whole()
    second.wait(1)
    with pytest.raises(WeightsCorrupt, match="b cannot be read"):
        second.wait(4)
    arrival.pause()
    assert readers() == []


def test_failure_is_raised_even_if_nobody_waited_when_it_came(arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.fails = lambda _, offset: is_page(offset, 2)
    coming, _ = expected(arrival, folder, "a")
    for thread in list(arrival._threads):
        thread.join()
    with pytest.raises(WeightsCorrupt):
        coming.wait(5)


def test_next_wait_after_a_failure_tries_again_and_reads_no_byte_twice(
    arrival: Arrival, folder: Path, disk: Disk
) -> None:
    disk.fails = lambda _, offset: is_page(offset, 2)
    coming, targets = expected(arrival, folder, "a")
    with pytest.raises(WeightsCorrupt):
        coming.wait_whole()
    disk.fails = lambda *_: False
    coming.wait_whole()
    assert all(torch.equal(target, value("a", i)) for i, target in enumerate(targets))
    assert len(disk.reads) == PIECES


def test_thread_that_cannot_be_started_is_not_waited_for(
    arrival: Arrival, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stream, wanted = opened(folder, "a")
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            arrival.expect("a", stream, wanted)
    arrival.pause()
    coming, targets = expected(arrival, folder, "b")
    coming.wait_whole()
    assert torch.equal(targets[0], value("b", 0))


def test_file_cut_short_on_the_way_is_corrupt(arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 1)
    coming, _ = expected(arrival, folder, "a")
    os.truncate(folder / "a", 4096 + 1500)
    disk.gate.set()
    with pytest.raises(WeightsCorrupt, match="a is cut short"):
        coming.wait_whole()


class Opens(Progress):
    """Lets the held read go on when the job must stop: a read cannot be interrupted, and the block ends after it."""

    def __init__(self, disk: Disk, deadline_s: float | None) -> None:
        super().__init__(deadline_s=deadline_s)
        self._disk = disk

    def check(self, ahead_s: float = 0.0) -> None:
        try:
            super().check(ahead_s)
        except (Cancelled, JobTimeout):
            self._disk.gate.set()
            raise


@pytest.mark.parametrize("deadline_s", [None, 0.1])
def test_cancel_and_deadline_end_a_wait(deadline_s: float | None, arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 2)
    coming, targets = expected(arrival, folder, "a")
    progress = Opens(disk, deadline_s)
    if deadline_s is None:
        threading.Timer(0.1, progress.cancelled.set).start()
    with pytest.raises((Cancelled, JobTimeout)), arrival.attended(progress):
        coming.wait_whole()
    assert not coming.is_whole
    assert readers() == []
    assert progress.timings_s["load_wait"] > 0
    with arrival.attended(Progress()):
        coming.wait_whole()  # the next job goes on where this one stopped
    assert all(torch.equal(target, value("a", i)) for i, target in enumerate(targets))
    assert len(disk.reads) == PIECES


def test_wait_outside_of_a_job_sees_no_cancel_of_the_last_one(arrival: Arrival, folder: Path) -> None:
    progress = Progress()
    with arrival.attended(progress):
        pass
    progress.cancelled.set()
    coming, _ = expected(arrival, folder, "a")
    coming.wait_whole()


def test_no_thread_outlives_a_job_that_did_not_need_everything(arrival: Arrival, folder: Path, disk: Disk) -> None:
    disk.held = lambda path, _: path.name == "b"
    disk.gate.clear()
    first, _ = expected(arrival, folder, "a")
    second, _ = expected(arrival, folder, "b")
    with arrival.attended(Progress()):
        first.wait_whole()
        assert readers() == ["weights"]
        disk.gate.set()
    assert readers() == []
    second.wait_whole()


def test_read_ahead_ends_when_the_threads_reach_it(
    arrival: Arrival, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = endless_ahead(monkeypatch, 3 * 1024)
    arrival.follow(ahead)
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 1)
    coming, _ = expected(arrival, folder, "a")
    coming.wait(0)
    assert readers_ahead()
    disk.gate.set()
    coming.wait_whole()
    for thread in ahead._threads:
        thread.join(10)
    assert readers_ahead() == []


def test_no_read_ahead_outlives_a_job(arrival: Arrival, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrival.follow(endless_ahead(monkeypatch, 2**40))
    coming, _ = expected(arrival, folder, "a")
    with arrival.attended(Progress()):
        coming.wait_whole()
        assert readers_ahead()
    assert readers_ahead() == []


def test_read_ahead_ends_when_nobody_holds_the_arrival_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = endless_ahead(monkeypatch, 2**40)
    arrival = Arrival("cpu")
    arrival.follow(ahead)
    del arrival
    gc.collect()
    for thread in ahead._threads:
        thread.join(10)
    assert readers_ahead() == []


def test_close_in_the_middle_ends_the_reading_and_closes_the_files(
    arrival: Arrival, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halt() -> None:
        arrival._work.halted = True
        disk.gate.set()

    monkeypatch.setattr(arrival._work, "halt", halt)
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 3)
    stream, wanted = opened(folder, "a")
    coming = arrival.expect("a", stream, wanted)
    coming.wait(2)
    arrival.close()
    assert readers() == []
    assert stream.closed
    assert len(disk.reads) == 4  # the one that was under way came to its end


def test_file_is_closed_with_its_last_byte(arrival: Arrival, folder: Path) -> None:
    stream, wanted = opened(folder, "a")
    arrival.expect("a", stream, wanted).wait_whole()
    arrival.pause()
    assert stream.closed


def test_reading_ends_when_nobody_holds_it_any_more(folder: Path, disk: Disk) -> None:
    disk.gate.clear()
    disk.held = lambda _, offset: is_page(offset, 1)
    arrival = Arrival("cpu", lanes=1, chunk_bytes=1024)
    expected(arrival, folder, "a")
    (thread,) = arrival._threads
    del arrival
    gc.collect()
    disk.gate.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(disk.reads) < PIECES


def test_job_is_told_what_was_read_and_waited_once(arrival: Arrival, folder: Path) -> None:
    coming, _ = expected(arrival, folder, "a")
    first, second = Progress(), Progress()
    with arrival.attended(first):
        coming.wait_whole()
    with arrival.attended(second):
        coming.wait_whole()
    assert set(first.timings_s) == {"load_read", "load_wait"}
    assert second.timings_s == {}


def test_log_says_bytes_and_rate(arrival: Arrival, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    coming, _ = expected(arrival, folder, "a")
    with caplog.at_level("INFO", "engine.arrival"), arrival.attended(Progress()):
        coming.wait_whole()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("read 0.00 GB in ")
    assert "GB/s)" in line


def test_model_that_is_read_but_still_being_copied_runs_after_the_copies(
    arrival: Arrival, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    coming, _ = expected(arrival, folder, "a")
    coming.wait_whole()
    coming._delivery.copied |= {0: "entry", 5: "block"}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=waited.append))
    assert list(coming.hold_back(torch.nn.Module())) == []
    assert waited == ["entry", "block"]


def test_nothing_wanted_is_there_at_once(arrival: Arrival, folder: Path) -> None:
    coming = arrival.expect("a", (folder / "a").open("rb"), [])
    assert coming.is_whole
    coming.wait_whole()


def test_nothing_is_read_while_models_are_built_and_all_of_it_afterwards(
    arrival: Arrival, folder: Path, disk: Disk
) -> None:
    with arrival.held():
        coming, targets = expected(arrival, folder, "a")
        time.sleep(0.1)
        assert (disk.reads, readers()) == ([], ["weights"]), "a thread stands ready"
        held_s = arrival.tally.read_s
    coming.wait_whole()
    assert all(torch.equal(target, value("a", i)) for i, target in enumerate(targets))
    arrival.pause()
    assert held_s == 0
    assert arrival.tally.read_s < 0.1, "it was not at work while it was held"


def test_who_waits_while_models_are_built_gets_it(arrival: Arrival, folder: Path) -> None:
    with arrival.held():
        coming, _ = expected(arrival, folder, "a")
        coming.wait_whole()


def test_arrival_that_is_closed_while_models_are_built_leaves_no_thread(arrival: Arrival, folder: Path) -> None:
    with arrival.held():
        coming, _ = expected(arrival, folder, "a")
        time.sleep(0.1)  # in which the thread comes to where it waits
        arrival.close()
        assert readers() == []
    assert not coming.is_there(0)


def test_reader_that_finds_no_room_is_raised_where_somebody_waits(
    arrival: Arrival, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_: Lane) -> None:
        raise MemoryError

    with monkeypatch.context() as without:
        without.setattr(Lane, "prepare", no_room)
        coming, _ = expected(arrival, folder, "a")
        with pytest.raises(MemoryError):
            coming.wait_whole()
    coming.wait_whole()
