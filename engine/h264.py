"""The packets of an H.264 stream as an MP4 has them, and what a decoder makes of them while they are made."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Self

_START_CODE = b"\0\0\1"
# Frames in work at a time, of which it is still at work on as many when the last packet comes: on 16 cores 16 ms with a
# thread for each core, 11 with eight. Slices or a single thread cannot follow the encoder, and end 170 ms after it.
DECODER_THREADS = 8
_HIGH = 100  # profile_idc; from it on an avcC says chroma and depth as well


class Packet(NamedTuple):
    """One coded frame. `pts` and `dts` count in `time_base_s`; `content` is NAL units, each behind its length."""

    pts: int
    dts: int
    time_base_s: Fraction
    content: bytes
    parameters: bytes
    """The stream's parameter sets, as an avcC."""

    @classmethod
    def of(cls, packet: Any, content: bytes, parameters: bytes) -> Self:
        """Of a PyAV packet.

        Raises:
            ValueError: it has no time.
        """
        if packet.pts is None or packet.dts is None:
            raise ValueError("a packet without a time")
        return cls(packet.pts, packet.dts, packet.time_base, content, parameters)

    def sha256(self) -> bytes:
        """Of all that it is; equal whatever its times count in."""
        times = (self.pts * self.time_base_s, self.dts * self.time_base_s)
        return hashlib.sha256(repr((times, self.parameters)).encode() + self.content).digest()


class Shown(NamedTuple):
    """One decoded frame. `luma` is the mean of its Y plane, 16 to 235."""

    time_s: Fraction
    pix_fmt: str
    color: tuple[int, int, int, int]
    height: int
    width: int
    luma: float


@dataclass(frozen=True)
class Decoded:
    """Packets, by their hashes, and the frames that a decoder made of them, in the order shown."""

    sha256s: tuple[bytes, ...]
    frames: tuple[Shown, ...]


def decode_packets(packets: Iterator[Packet]) -> Decoded:
    """Decode packets as they come.

    Raises:
        av.FFmpegError: a packet is damaged.
    """
    import av

    context = av.CodecContext.create("h264", "r")
    context.options = {"err_detect": "explode"}  # else the decoder paints over what is torn
    context.thread_type, context.thread_count = "FRAME", DECODER_THREADS
    sha256s: list[bytes] = []
    frames: list[Shown] = []
    time_base_s = Fraction(1)
    for packet in packets:
        if not sha256s:
            context.extradata, time_base_s = packet.parameters, packet.time_base_s
        sha256s.append(packet.sha256())
        # Copied into FFmpeg's own memory: its decoder reads some bytes past the end, and behind Python's there may be
        # none. And what is Python's, FFmpeg's threads could not give back while the interpreter waits for them to end.
        coded: av.Packet[Any] = av.Packet(len(packet.content))
        coded.update(packet.content)
        coded.pts, coded.dts, coded.time_base = packet.pts, packet.dts, packet.time_base_s
        frames += [_shown(frame, time_base_s) for frame in context.decode(coded)]
    frames += [_shown(frame, time_base_s) for frame in context.decode(None)]
    return Decoded(tuple(sha256s), tuple(frames))


def _shown(frame: Any, time_base_s: Fraction) -> Shown:
    color = colour_of(frame)
    return Shown(frame.pts * time_base_s, frame.format.name, color, frame.height, frame.width, mean_luma(frame))


def colour_of(tagged: Any) -> tuple[int, int, int, int]:
    """Range, primaries, transfer, matrix of a frame or codec context, as in ISO/IEC 23091-2; all 1: limited BT.709."""
    return tagged.color_range, tagged.color_primaries, tagged.color_trc, tagged.colorspace


def mean_luma(frame: Any) -> float:
    """Of a frame's Y plane."""
    import numpy as np

    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return float(rows[:, : plane.width].mean())


def length_prefixed(stream: bytes) -> bytes:
    """NAL units behind their lengths in 4 bytes, of units behind start codes.

    Source: H.264, Annex B; ISO/IEC 14496-15, 4.3.3.
    """
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in _units(stream))


def avcc(parameters: bytes) -> bytes:
    """A sequence and a picture parameter set behind start codes, as the box of an 8-bit 4:2:0 stream.

    Raises:
        ValueError: not one of each.
    Source: ISO/IEC 14496-15, 5.3.3.1.
    """
    sequence, picture = _units(parameters)
    depth = bytes((0xFC | 1, 0xF8, 0xF8, 0)) if sequence[1] >= _HIGH else b""  # 4:2:0, 8 bits twice, no extensions
    head = bytes((1, *sequence[1:4], 0xFF, 0xE1))  # version, profile and level; 4 bytes a length, one sequence set
    return (
        head + len(sequence).to_bytes(2, "big") + sequence + b"\1" + len(picture).to_bytes(2, "big") + picture + depth
    )


def _units(stream: bytes) -> list[bytes]:
    """What lies between start codes. No unit ends in a zero, so the first byte of a longer code goes with those."""
    return [unit.rstrip(b"\0") for unit in stream.split(_START_CODE)[1:]]
