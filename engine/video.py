"""Frames -> a verified MP4 file.

Whatever wrote it, the file is not believed. While it is made, a decoder of our own takes each packet as it leaves the
encoder. Before the file gets its name it is read back: every byte must be what was written, and every packet what was
decoded, at its time.
"""

import hashlib
import os
import secrets
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.boxes import check_streamable, top_boxes
from engine.frame_check import FrameCheck
from engine.geometry import VideoShape
from engine.h264 import Decoded, Packet, colour_of, decode_packets
from engine.mp4 import Mp4, as_encoding_failed, converted
from engine.outputs import Frames, MediaFile
from engine.turns import short_turns
from schemas.errors import BadOutput, EncodingFailed

CONVERTERS = 4  # threads, a frame each: one of 832x480 takes 4 ms, half of what a card takes, and they come in eights
QUEUE_CHUNKS = 2  # chunks that wait for the encoder; a chunk is 4 frames, 5 MB at 832x480
READ_BYTES = 2**18  # of a file at a time
MAX_LUMA_SHIFT = 3.0  # levels between a frame's mean Y as given and as decoded; crf 18 moves it by < 0.5


@dataclass(frozen=True)
class Probe:
    """What a file is, read from the file without decoding it."""

    codec: str
    color: tuple[int, int, int, int]
    shape: VideoShape
    fps: Fraction
    duration_s: float
    sha256s: tuple[bytes, ...]
    """Of each packet, in the file's order."""


def write_mp4(frames: Frames, path: Path) -> MediaFile:
    """Encode frames while they are decoded, check the file, and only then give it the name `path`.

    The iterator runs in the calling thread; conversion in a few others, the encoder and the decoder that checks in
    one each, a few chunks behind. A chunk must not be written to after it was handed out. On any failure nothing is
    left on the disk. The same frames give the same bytes.

    Raises:
        BadOutput: the frames are not what was promised, or show nothing, or a side is odd (4:2:0 needs even).
        EncodingFailed: the file could not be written, or did not verify.
        Exception: what the iterator raises, unchanged; Cancelled among others.
    """
    if frames.shape.height % 2 or frames.shape.width % 2:
        raise BadOutput(f"{frames.shape.width}x{frames.shape.height} cannot be encoded: both sides must be even")
    with ExitStack() as stack:
        stack.enter_context(short_turns())
        stack.callback(getattr(frames.chunks, "close", lambda: None))  # a decoder left early frees its card
        decoder = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="decoder"))
        mp4 = Mp4(frames.shape, frames.fps)
        stack.callback(mp4.abandon)
        decoded = decoder.submit(decode_packets, mp4.packets())
        stream = _encode(frames, mp4, decoded)
        return _save(stream, path, frames, tuple(mp4.luma), decoded)


def _encode(frames: Frames, mp4: Mp4, decoded: Future[Decoded]) -> bytes:
    """Run iterator, conversion of colours and encoder side by side; returns the MP4. `decoded`: as for `_save`."""
    check = FrameCheck(frames.shape)
    waiting: deque[Future[None]] = deque()
    with ExitStack() as stack:
        converter = ThreadPoolExecutor(CONVERTERS, thread_name_prefix="colours")
        encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        stack.callback(encoder.shutdown, cancel_futures=True)
        stack.callback(converter.shutdown, cancel_futures=True)
        for chunk in frames.chunks:
            check.add(chunk)
            waiting.append(encoder.submit(mp4.add, [converter.submit(converted, picture) for picture in chunk]))
            while len(waiting) > QUEUE_CHUNKS:
                waiting.popleft().result()
            if decoded.done():  # with packets still to come: it has failed, and the card need not work to the end
                _pictures(decoded)
        check.finish()
        for future in waiting:
            future.result()
        return mp4.finish()


def _save(stream: bytes, path: Path, frames: Frames, luma: tuple[float, ...], decoded: Future[Decoded]) -> MediaFile:
    """Write, read back, verify and name the file. `luma` and `decoded` as for `verify`."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with ThreadPoolExecutor(2, thread_name_prefix="disk") as disk:
            with as_encoding_failed("written"):
                _write(partial, stream)
                reached = disk.submit(_reach_disk, partial)  # 3 ms, or 60: the file is looked at meanwhile
                sha256 = disk.submit(hashlib.sha256, stream)
                is_whole = _holds(partial, stream)
            if not is_whole:
                raise EncodingFailed("the video on the disk is not what was written to it")
            found = verify(partial, frames.shape, frames.fps, luma, decoded)
            with as_encoding_failed("written"):
                reached.result()
        with as_encoding_failed("named"):
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return MediaFile(
        path=path,
        content_type="video/mp4",
        height=found.shape.height,
        width=found.shape.width,
        frames=found.shape.frames,
        size_bytes=len(stream),
        sha256=sha256.result().hexdigest(),
        fps=float(found.fps),
        duration_s=found.duration_s,
    )


def _pictures(decoded: Future[Decoded]) -> Decoded:
    with as_encoding_failed("decoded"):
        return decoded.result()


def verify(path: Path, shape: VideoShape, fps: int, luma: tuple[float, ...], coming: Future[Decoded]) -> Probe:
    """Compare a file with what it should be, from its boxes to each frame's brightness.

    `luma`: mean of each frame's Y plane as it went to the encoder.
    `coming`: what a decoder makes of the packets that must be in the file, all of them and no others. It is waited for
    when the file has been taken apart.

    Raises:
        EncodingFailed: names the first thing that differs.
    """
    with as_encoding_failed("read back"):
        check_streamable(top_boxes(path))
        found = _probe(path)
    decoded = _pictures(coming)
    looks = {frame[1:5] for frame in decoded.frames}
    facts = [
        ("codec", found.codec, "h264"),
        ("colour", found.color, (1, 1, 1, 1)),
        ("shape", tuple(found.shape), tuple(shape)),
        ("frame rate", found.fps, Fraction(fps)),  # frames / duration, so this is the duration as well
        ("what was decoded", looks, {("yuv420p", (1, 1, 1, 1), shape.height, shape.width)}),
        ("the number of decoded frames", len(decoded.frames), shape.frames),
    ]
    for name, got, expected in facts:
        if got != expected:
            raise EncodingFailed(f"the written video did not verify: {name} is {got}, not {expected}")
    for i, (frame, given) in enumerate(zip(decoded.frames, luma, strict=True)):
        if frame.time_s != Fraction(i, fps):
            raise EncodingFailed(f"the written video did not verify: frame {i} is not at its time")
        if abs(frame.luma - given) > MAX_LUMA_SHIFT:
            raise EncodingFailed("the written video did not verify: it does not show the frames it was given")
    if found.sha256s != decoded.sha256s:
        raise EncodingFailed("the written video did not verify: its packets are not those that were decoded")
    return found


def _probe(path: Path) -> Probe:
    """Take a file apart and say what is in it. What its packets show is for a decoder to say.

    Raises:
        av.FFmpegError: it is no file that the library reads.
        ValueError: not one video stream, or a packet that a player would not show.
    """
    import av

    # Else the library decodes frames until it can guess at what is never asked here: 15 ms of 17.
    unseen: Any = [{"skip_frame": "all"}]  # a dict a stream, whatever the library's annotation says
    with av.open(str(path), stream_options=unseen) as container:
        if [stream.type for stream in container.streams] != ["video"]:
            raise ValueError("not one video stream")
        stream = container.streams.video[0]
        if stream.average_rate is None or stream.duration is None or stream.time_base is None:
            raise ValueError("no frame rate or duration")
        context = stream.codec_context
        sha256s: list[bytes] = []
        for packet in container.demux(stream):
            if packet.is_discard or packet.is_corrupt:
                raise ValueError(f"packet {len(sha256s)} would not be shown")
            if packet.size:  # the last one is empty and tells decoders to give what they hold
                sha256s.append(Packet.of(packet, bytes(packet), context.extradata or b"").sha256())
        return Probe(
            codec=context.name,
            color=colour_of(context),
            shape=VideoShape(len(sha256s), stream.height, stream.width),
            fps=Fraction(stream.average_rate),
            duration_s=float(stream.duration * stream.time_base),
            sha256s=tuple(sha256s),
        )


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)


def _reach_disk(path: Path) -> None:
    """Return when the bytes are on the disk, really: a delayed write that fails later would fail for nobody."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _holds(path: Path, content: bytes) -> bool:
    """Whether this is what a file has in it, read back."""
    read = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            if not content.startswith(chunk, read):
                return False
            read += len(chunk)
    return read == len(content)
