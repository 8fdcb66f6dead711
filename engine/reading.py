"""Tensors out of baked files by large reads, straight to where they will stay.

A mapped file is read a page fault at a time, and what goes to a card goes through memory that the card cannot reach by
itself. Here a file is cut into chunks of whole tensors, or slices of large ones, as they lie in it. One `preadv` reads
a chunk:

- for the host straight into the tensors' own storage,
- for a card, or where the dtype changes, into a lane's buffer, from where each slice is copied. For a card that buffer
  is page-locked, once, and the copies run on a stream beside the computing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from engine.packing import ALIGNMENT_BYTES, lock, unlock
from engine.tensorfile import Stored
from schemas.errors import WeightsCorrupt

CHUNK_BYTES = 32 * 2**20  # of one read: large enough for any disk, and eight lanes of it are 256 MiB
MAX_SLICES = 512  # of a chunk: preadv takes 1,024 places (IOV_MAX)


@dataclass(frozen=True)
class Wanted:
    """A stored tensor and the contiguous tensor of its shape that it is to fill. `piece`: what it is a part of."""

    stored: Stored
    target: Tensor
    piece: int = 0


class Slice(NamedTuple):
    """Bytes `begin` to `end` of a wanted tensor; both are whole elements."""

    wanted: Wanted
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def is_direct(self) -> bool:
        """Whether the file's bytes are the target's bytes, and the target is in this machine's memory."""
        target = self.wanted.target
        return target.device.type == "cpu" and target.dtype == self.wanted.stored.dtype

    def target(self) -> Tensor:
        """(n,): the slice's part of the target."""
        itemsize = self.wanted.stored.dtype.itemsize
        return self.wanted.target.view(-1)[self.begin // itemsize : self.end // itemsize]


class Chunk(NamedTuple):
    """Slices that lie one after the other in an open file, from `offset` on. They are read by one call."""

    stream: BinaryIO
    offset: int
    slices: tuple[Slice, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.slices)


def chunks(stream: BinaryIO, wanted: Iterable[Wanted], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut what is wanted of a file into chunks, in the file's order; what nobody wants is not read.

    `chunk_bytes`: a multiple of 256, so that a slice and its alignment fit a lane's buffer.
    """
    offset, end, room, slices = 0, 0, chunk_bytes, list[Slice]()
    for piece in _slices(wanted, chunk_bytes):
        begin = piece.wanted.stored.offset + piece.begin
        if slices and (begin != end or _aligned(piece.size_bytes) > room or len(slices) == MAX_SLICES):
            yield Chunk(stream, offset, tuple(slices))
            room, slices = chunk_bytes, []
        if not slices:
            offset = begin
        slices.append(piece)
        room -= _aligned(piece.size_bytes)
        end = begin + piece.size_bytes
    if slices:
        yield Chunk(stream, offset, tuple(slices))


def _slices(wanted: Iterable[Wanted], chunk_bytes: int) -> Iterator[Slice]:
    for each in sorted(wanted, key=lambda each: each.stored.offset):
        size_bytes = each.stored.size_bytes
        for begin in range(0, size_bytes, chunk_bytes):
            yield Slice(each, begin, min(begin + chunk_bytes, size_bytes))


class Lane:
    """What one reading thread has for itself: a buffer, locked and used again for every chunk."""

    def __init__(self, device: str, stream: Any = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        """`stream`: the card's stream for copies, shared by all lanes; None on a CPU."""
        self._device = device
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._buffer: Tensor | None = None
        self._is_locked = False
        self._copies: tuple[Any, Any] | None = None
        self._card_s = 0.0

    def deliver(self, chunk: Chunk) -> None:
        """Read a chunk into its targets. On a card the copies are under way on the stream when this returns.

        Raises:
            WeightsCorrupt: the file cannot be read, or ends too early.
        """
        self._wait()  # the buffer is still being copied from
        places, staged, position = [], [], 0
        for piece in chunk.slices:
            if piece.is_direct:
                places.append(_bytes(piece.target()))
                continue
            held = self._room()[position : position + piece.size_bytes]
            position += _aligned(piece.size_bytes)
            places.append(held)
            staged.append((piece, held.view(piece.wanted.stored.dtype)))
        _read(chunk, [place.numpy().data for place in places])
        if self._stream is None:
            _copy(staged)
        elif staged:
            with torch.cuda.stream(self._stream):
                begun = self._stream.record_event(torch.cuda.Event(enable_timing=True))
                _copy(staged)
                self._copies = begun, self._stream.record_event(torch.cuda.Event(enable_timing=True))

    def prepare(self) -> None:
        """Lock the buffer that the first chunk for a card will need; eight of them take about 0.15 s."""
        if self._stream is not None:
            self._room()

    def close(self) -> float:
        """Give the buffer back once nothing is copied from it any more; the seconds that its copies took."""
        self._wait()
        if self._buffer is not None and self._is_locked:
            unlock(self._buffer)
        self._buffer = None
        return self._card_s

    def _wait(self) -> None:
        if self._copies is not None:
            begun, done = self._copies
            done.synchronize()
            self._card_s += begun.elapsed_time(done) / 1000
            self._copies = None

    def _room(self) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self._chunk_bytes, dtype=torch.uint8)
            self._is_locked = lock(self._buffer, self._device) is None and self._stream is not None
        return self._buffer


def _copy(staged: Sequence[tuple[Slice, Tensor]]) -> None:
    for piece, held in staged:
        piece.target().copy_(held, non_blocking=True)


def file_name(stream: BinaryIO) -> str:
    """The name of an open file, without the folders that a caller has no business with."""
    return Path(str(stream.name)).name


def _read(chunk: Chunk, places: Sequence[memoryview]) -> None:
    """Fill `places` from the file. One call may read less than asked for: 2 GiB is Linux's own limit."""
    offset, left = chunk.offset, [place for place in places if len(place)]
    while left:
        try:
            count = os.preadv(chunk.stream.fileno(), left, offset)
        except OSError as error:
            raise WeightsCorrupt(f"{file_name(chunk.stream)} cannot be read; bake it again") from error
        if not count:
            raise WeightsCorrupt(f"{file_name(chunk.stream)} is cut short; bake it again")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
