"""Weights that are still coming: models stand where they will work at once, their bytes follow in the order of need.

A job may begin when the first thing it needs is there. Components are read one after the other in the order in which
they are expected, by a few threads; each has pieces (see packing), and whoever uses a piece waits for that one. The
low-noise expert comes in while the high-noise steps run.

Reading goes on between `expect` and the end of the job that is attended; a job that ends before everything has come
pauses it, and whoever waits next resumes it. So no thread outlives a job, and a cancel or a deadline takes hold while
waiting. What goes wrong in a thread is raised where somebody waits. A ReadAhead that has begun with the same files goes
on under the same rule until the threads here have reached it (`follow`).
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import nn

from engine.packing import BLOCKS
from engine.progress import Progress
from engine.readahead import ReadAhead
from engine.reading import CHUNK_BYTES, Chunk, Lane, Wanted, chunks

log = logging.getLogger(__name__)

LANES = 8  # reads under way at a time: a disk needs several to reach its rate, a network volume more
POLL_S = 0.05  # between two looks at a cancel while waiting


@dataclass
class _Delivery:
    """One component on its way: the bytes that each of its pieces still lacks."""

    name: str
    stream: BinaryIO
    missing: list[int]
    settle: Callable[[int], None]
    copied: dict[int, Any] = field(default_factory=dict)
    """Piece -> the card's event after its last copy."""


@dataclass
class Tally:
    """What the threads have done. Seconds are those in which at least one of them was at work."""

    bytes_read: int = 0
    read_s: float = 0.0
    card_s: float = 0.0
    """The copying stream at work, within `read_s`."""


class _Work:
    """What the threads share. They know nothing of the Arrival, so that they end when nobody holds it any more."""

    def __init__(self, device: str, chunk_bytes: int) -> None:
        self.changed = threading.Condition()
        self.is_held = False
        self.queue: deque[tuple[_Delivery, Chunk]] = deque()
        self.halted = False
        self.error: BaseException | None = None
        self.active = 0
        self.ahead: ReadAhead | None = None
        self.tally = Tally()
        self._taken_bytes = 0
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._since = 0.0

    def enter(self) -> None:
        if not self.active:
            self._since = time.monotonic()
        self.active += 1

    def hold(self) -> None:
        with self.changed:
            self.is_held = True

    def release(self) -> None:
        with self.changed:
            if self.is_held:
                self.is_held, self._since = False, time.monotonic()
                self.changed.notify_all()

    def halt(self) -> None:
        with self.changed:
            self.halted = True
            self.changed.notify_all()
        if self.ahead is not None:
            self.ahead.end()

    def run(self) -> None:
        """A thread: deliver chunks until there are none, or somebody said halt, or a lane failed."""
        lane = Lane(self._device, self.stream, self._chunk_bytes)
        try:
            lane.prepare()
        except BaseException as error:  # noqa: BLE001 as below; the thread leaves where it would take its first chunk
            self._fail(error, [])
        while (job := self._take(lane)) is not None:
            delivery, chunk = job
            try:
                lane.deliver(chunk)
            except BaseException as error:  # noqa: BLE001 whatever it is, it is raised where somebody waits
                self._fail(error, [job])
                continue
            try:
                for piece in self._arrived(delivery, chunk):
                    delivery.settle(piece)
            except BaseException as error:  # noqa: BLE001 as above
                self._fail(error, [])

    def _take(self, lane: Lane) -> tuple[_Delivery, Chunk] | None:
        with self.changed:
            self.changed.wait_for(lambda: not self.is_held or self.halted)
            if self.queue and not self.halted and self.error is None:
                delivery, chunk = self.queue.popleft()
                self._taken_bytes += chunk.size_bytes
                if self.ahead is not None:
                    self.ahead.reached(self._taken_bytes)
                return delivery, chunk
            try:
                self.tally.card_s += lane.close()
            except BaseException as error:  # noqa: BLE001 as above; the thread must be seen to leave
                self.error = error
            self.active -= 1
            if not self.active:
                self.tally.read_s += time.monotonic() - self._since
            self.changed.notify_all()
            return None

    def _fail(self, error: BaseException, again: list[tuple[_Delivery, Chunk]]) -> None:
        """`again`: what did not come. Who waits after the error has been raised begins with it."""
        with self.changed:
            self.error = error
            self.queue.extendleft(again)
            self.changed.notify_all()

    def _arrived(self, delivery: _Delivery, chunk: Chunk) -> list[int]:
        """Count what has come; returns the pieces that are whole with it."""
        whole = []
        with self.changed:
            self.tally.bytes_read += chunk.size_bytes
            for part in chunk.slices:
                piece = part.wanted.piece
                if delivery.missing[piece] == part.size_bytes:
                    whole.append(piece)
                    if self.stream is not None:  # before the piece counts as there: nobody takes the lock to look
                        delivery.copied[piece] = self.stream.record_event()
                delivery.missing[piece] -= part.size_bytes
            if not any(delivery.missing):
                delivery.stream.close()
            self.changed.notify_all()
        return whole


class Coming:
    """A component that was expected, for those who use it."""

    def __init__(self, arrival: "Arrival", delivery: _Delivery) -> None:
        self._arrival = arrival
        self._delivery = delivery

    @property
    def is_whole(self) -> bool:
        return not any(self._delivery.missing)

    def is_there(self, piece: int) -> bool:
        return not self._delivery.missing[piece]

    def wait(self, piece: int) -> None:
        """Wait for one piece; the card's next work waits for its last copy.

        Raises:
            WeightsCorrupt, or whatever else stopped the reading. Cancelled, JobTimeout: the attended job must stop.
        """
        if not self.is_there(piece):
            self._arrival.stand_still(lambda: self.is_there(piece))
        if (copied := self._delivery.copied.get(piece)) is not None:
            torch.cuda.current_stream().wait_event(copied)

    def wait_whole(self) -> None:
        """Wait for every piece. See `wait`."""
        for piece in range(len(self._delivery.missing)):
            self.wait(piece)

    def hold_back(self, model: nn.Module) -> Iterator[Any]:
        """Hooks that let each piece of a transformer run once it is there; yields their handles. None if all are.

        They stand on the blocks, outside of what is compiled.
        """
        if self.is_whole:
            self.wait_whole()  # what was read last may still be on its way to the card
            return
        blocks = list(model.get_submodule(BLOCKS.rstrip(".")).children())
        yield model.register_forward_pre_hook(lambda *_: self.wait(0))
        for i, block in enumerate(blocks):
            yield block.register_forward_pre_hook(lambda *_, i=i: self.wait(2 + i))
        yield blocks[-1].register_forward_hook(lambda *_: self.wait(1))


class Arrival:
    """Reads what is expected, in the order of expecting. `device`: the card whose stream copies, or a CPU."""

    def __init__(self, device: str, lanes: int = LANES, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._lanes = lanes
        self._chunk_bytes = chunk_bytes
        self._work = _Work(device, chunk_bytes)
        self._threads: list[threading.Thread] = []
        self._streams: list[BinaryIO] = []
        self._progress: Progress | None = None
        self._waited_s = 0.0
        self._told = Tally()
        weakref.finalize(self, self._work.halt)

    @property
    def tally(self) -> Tally:
        return self._work.tally

    def expect(
        self, name: str, stream: BinaryIO, wanted: Sequence[Wanted], settle: Callable[[int], None] = lambda _: None
    ) -> Coming:
        """Read `wanted` from an open file after all that was expected before, and begin at once.

        `settle`: called with each piece once it is whole, by the thread that brought its end.
        """
        missing = [0] * (1 + max((each.piece for each in wanted), default=0))
        for each in wanted:
            missing[each.piece] += each.stored.size_bytes
        delivery = _Delivery(name, stream, missing, settle)
        self._streams.append(stream)
        if self._work.stream is not None:  # the targets' memory may still be read by work that its last owner gave
            self._work.stream.wait_stream(torch.cuda.current_stream(self._work.stream.device))
        jobs = [(delivery, chunk) for chunk in chunks(stream, wanted, self._chunk_bytes)]  # while others may still take
        with self._work.changed:
            self._work.queue.extend(jobs)
        self._resume()
        return Coming(self, delivery)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block nothing is read until somebody waits; threads are there, and their buffers.

        For whoever builds models: eight readers come back for the interpreter with every tensor.
        """
        self._work.hold()
        try:
            yield
        finally:
            self._work.release()

    def follow(self, ahead: ReadAhead) -> None:
        """Let `ahead` go on with the files that are expected here, until these threads reach it or pause."""
        self._work.ahead = ahead

    def stand_still(self, is_there: Callable[[], bool]) -> None:
        """Wait until `is_there`. See Coming.wait."""
        started = time.monotonic()
        try:
            self._work.release()
            self._resume()
            while not self._look(is_there):
                if self._progress is not None:
                    self._progress.check()
        finally:
            self._waited_s += time.monotonic() - started

    @contextmanager
    def attended(self, progress: Progress) -> Iterator[None]:
        """A job: its cancel and deadline end a wait, its timings get what it waited; no thread outlives the block."""
        self._progress = progress
        try:
            yield
        finally:
            self._progress = None
            self.pause()
            self._tell(progress)

    def pause(self) -> None:
        """Read no further until somebody waits. Returns when every thread is gone and every copy is done."""
        self._work.halt()
        for thread in self._threads:
            thread.join()
        self._threads = []  # each has waited for its copies
        if self._work.ahead is not None:
            self._work.ahead.stop()
            self._work.ahead = None
        self._work.halted, self._work.error = False, None  # what was not raised will be met again

    def close(self) -> None:
        """Stop for good. What has not come never will."""
        self.pause()
        self._work.queue.clear()
        for stream in self._streams:
            stream.close()

    def _look(self, is_there: Callable[[], bool]) -> bool:
        """Whether it is there, after at most POLL_S; raises what stopped the reading, once."""
        work = self._work
        with work.changed:
            if is_there():
                return True
            error, work.error = work.error, None
            if error is not None:
                raise error
            if not work.active:
                raise RuntimeError("nobody reads what is waited for")
            work.changed.wait(POLL_S)
            return is_there()

    def _resume(self) -> None:
        """Let as many threads read as there is work for."""
        work = self._work
        with work.changed:
            count = 0 if work.error is not None else min(self._lanes, len(work.queue)) - work.active
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for _ in range(count):
                thread = threading.Thread(target=work.run, name="weights", daemon=True)
                thread.start()  # first: one that the system refuses to start must not be counted, nor waited for
                work.enter()  # it takes nothing before the lock is free
                self._threads.append(thread)

    def _tell(self, progress: Progress) -> None:
        """Add what was done since the last time to the job's timings, and to the log."""
        now, told = self._work.tally, self._told
        bytes_read, read_s, card_s = (
            now.bytes_read - told.bytes_read,
            now.read_s - told.read_s,
            now.card_s - told.card_s,
        )
        waited_s, self._waited_s = self._waited_s, 0.0
        self._told = Tally(now.bytes_read, now.read_s, now.card_s)
        if not bytes_read:
            return
        progress.add("load_read", read_s)
        progress.add("load_wait", waited_s)
        if self._work.stream is not None:
            progress.add("load_to_card", card_s)
        log.info(
            "read %.2f GB in %.2f s (%.2f GB/s), %.2f s of it copying to the card; jobs waited %.2f s",
            bytes_read / 1e9, read_s, bytes_read / 1e9 / max(read_s, 1e-9), card_s, waited_s,
        )  # fmt: skip
