"""Frames -> a verified H.264 MP4.

Encoder: libx264 inside this process, by PyAV. The other choice, an ffmpeg child behind a pipe, adds a binary
that may be absent, a process that may be killed, 100 MB through a pipe, and an exit status that can be good
with a broken file. PyAV raises where it fails, and the same package reads strangers' clips, so the image
needs one media library. The stream is made in memory (5 MB for 81 frames): PyAV 18.1 ends the process with a
segmentation fault when its own file writing meets a full disk, Python's write raises.

Whatever wrote it, the file is not believed: before it gets its name it is read back and decoded whole.
"""

import errno
import hashlib
import io
import os
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from engine.boxes import check_streamable, top_boxes
from engine.frame_check import FrameCheck
from engine.geometry import VideoShape
from engine.outputs import Frames, MediaFile
from schemas.errors import BadOutput, DiskFull, EncodingFailed

CRF = 18  # x264's own scale: 18 is taken for visually lossless
PRESET = "veryfast"  # 0.45 s for 81 frames of 832x480 on two cores; medium takes 0.8 s for 10 % fewer bytes
QUEUE_CHUNKS = 2  # chunks that wait for the encoder; a chunk is 4 frames, 5 MB at 832x480
CPUINFO = Path("/proc/cpuinfo")
MAX_LUMA_SHIFT = 3.0  # levels between a frame's mean Y as given and as decoded; crf 18 moves it by < 0.5


@dataclass(frozen=True)
class Probe:
    """What a file is, read from the file. `luma` is the mean of each decoded frame's Y plane, 16 to 235."""

    codec: str
    pix_fmt: str
    color: tuple[int, int, int, int]
    """Range, primaries, transfer, matrix as in ISO/IEC 23091-2; (1, 1, 1, 1) is limited BT.709."""
    shape: VideoShape
    fps: Fraction
    duration_s: float
    luma: tuple[float, ...]


def write_mp4(frames: Frames, path: Path) -> MediaFile:
    """Encode frames while they are decoded, check the file, and only then give it the name `path`.

    The iterator runs in the calling thread, conversion and encoder in one each, a few chunks behind. A chunk
    must not be written to after it was handed out. On any failure nothing is left on the disk. The same
    frames give the same bytes.

    Raises:
        BadOutput: the frames are not what was promised, or show nothing, or a side is odd (4:2:0 needs even).
        EncodingFailed: the file could not be written, or did not verify.
        Exception: what the iterator raises, unchanged; Cancelled among others.
    """
    if frames.shape.height % 2 or frames.shape.width % 2:
        raise BadOutput(f"{frames.shape.width}x{frames.shape.height} cannot be encoded: both sides must be even")
    stream, luma = _encode(frames)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with _as_encoding_failed("written"):
            _write(partial, stream)
            size_bytes, sha256 = _measure(partial)
        if sha256 != hashlib.sha256(stream).hexdigest():
            raise EncodingFailed("the video on the disk is not what was written to it")
        found = verify(partial, frames.shape, frames.fps, luma)
        with _as_encoding_failed("named"):
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
        size_bytes=size_bytes,
        sha256=sha256,
        fps=float(found.fps),
        duration_s=found.duration_s,
    )


def verify(path: Path, shape: VideoShape, fps: int, luma: tuple[float, ...]) -> Probe:
    """Decode a file whole and compare it with what it should be, from its boxes to each frame's brightness.

    `luma`: mean of each frame's Y plane as it went to the encoder.

    Raises:
        EncodingFailed: names the first thing that differs.
    """
    with _as_encoding_failed("read back"):
        check_streamable(top_boxes(path))
    found = probe(path)
    facts = [
        ("codec", found.codec, "h264"),
        ("pixel format", found.pix_fmt, "yuv420p"),
        ("colour", found.color, (1, 1, 1, 1)),
        ("shape", tuple(found.shape), tuple(shape)),
        ("frame rate", found.fps, Fraction(fps)),  # frames / duration, so this is the duration as well
    ]
    for name, got, expected in facts:
        if got != expected:
            raise EncodingFailed(f"the written video did not verify: {name} is {got}, not {expected}")
    shift = max(abs(a - b) for a, b in zip(found.luma, luma, strict=True))
    if shift > MAX_LUMA_SHIFT:
        raise EncodingFailed("the written video did not verify: it does not show the frames it was given")
    return found


def probe(path: Path) -> Probe:
    """Decode a video file whole and say what is in it; every frame must come at its time.

    Raises:
        EncodingFailed: not one video stream, not readable to the last frame, or a frame not at its time.
    """
    import av

    with _as_encoding_failed("read back"), av.open(str(path)) as container:
        if [stream.type for stream in container.streams] != ["video"]:
            raise ValueError("not one video stream")
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}  # else the decoder paints over what is torn
        stream.thread_type = "AUTO"
        if stream.average_rate is None or stream.duration is None or stream.time_base is None:
            raise ValueError("no frame rate or duration")
        luma: list[float] = []
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts * stream.time_base != len(luma) / stream.average_rate:
                raise ValueError(f"frame {len(luma)} is not at its time")
            luma.append(_mean_luma(frame))
        context = stream.codec_context
        return Probe(
            codec=context.name,
            pix_fmt=str(context.pix_fmt),
            color=(context.color_range, context.color_primaries, context.color_trc, context.colorspace),
            shape=VideoShape(len(luma), stream.height, stream.width),
            fps=Fraction(stream.average_rate),
            duration_s=float(stream.duration * stream.time_base),
            luma=tuple(luma),
        )


def _encode(frames: Frames) -> tuple[bytes, tuple[float, ...]]:
    """Run iterator, conversion of colours and encoder side by side; returns the MP4 and each frame's mean luma."""
    check = FrameCheck(frames.shape)
    waiting: deque[Future[None]] = deque()
    with ExitStack() as stack:
        stack.callback(getattr(frames.chunks, "close", lambda: None))  # a decoder left early frees its card
        mp4 = _Mp4(frames.shape, frames.fps)
        stack.callback(mp4.abandon)
        converter, encoder = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("colours", "encoder"))
        stack.callback(encoder.shutdown, cancel_futures=True)
        stack.callback(converter.shutdown, cancel_futures=True)
        for chunk in frames.chunks:
            check.add(chunk)
            waiting.append(encoder.submit(mp4.add, converter.submit(_converted, chunk)))
            while len(waiting) > QUEUE_CHUNKS:
                waiting.popleft().result()
        check.finish()
        for future in waiting:
            future.result()
        return mp4.finish(), tuple(mp4.luma)


class _Mp4:
    """An MP4 being made in memory: limited BT.709, H.264 4:2:0, the index in front."""

    def __init__(self, shape: VideoShape, fps: int) -> None:
        import av
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        self.luma: list[float] = []
        self._buffer = io.BytesIO()
        with _as_encoding_failed("opened"):
            # The index gets its room in front from the start: 20 bytes a frame at most, 1 kB around them. The
            # muxer's other way, moving everything afterwards, needs a file.
            room = {"moov_size": str(4096 + 32 * shape.frames)}
            self._container = av.open(self._buffer, "w", format="mp4", options=room)
            self._stream = self._container.add_stream("libx264", rate=fps)
            context = self._stream.codec_context
            context.width, context.height, context.pix_fmt = shape.width, shape.height, "yuv420p"
            context.time_base = Fraction(1, fps)
            context.options = {"crf": str(CRF), "preset": PRESET, **_repeatable()}
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def add(self, coming: Future[list[tuple[Any, float]]]) -> None:
        """Frames as `_converted` makes them."""
        converted = coming.result()
        with _as_encoding_failed("encoded"):
            for frame, luma in converted:
                frame.pts = len(self.luma)
                self.luma.append(luma)
                self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Flush the encoder and write the index; the whole file."""
        with _as_encoding_failed("finished"):
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._buffer.getvalue()

    def abandon(self) -> None:
        """Free the encoder, whatever it holds. Harmless after `finish`."""
        import av

        with suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()


@cache
def _repeatable() -> dict[str, str]:
    """Options with which x264 makes the same bytes of the same frames.

    Its AVX-512 code, in the look-ahead's macroblock tree, does not: of 300 encodes of 96x64, 5 to 42 differed, from one
    thread as from many; with AVX2, which every such processor has, or without the tree, none. AVX2 is as fast here.
    """
    try:
        has_avx512 = "avx512f" in CPUINFO.read_text().split()
    except OSError:  # not Linux
        has_avx512 = False
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


def _converted(chunk: Any) -> list[tuple[Any, float]]:
    """(f, height, width, 3) uint8 RGB -> f 4:2:0 frames, each with its mean luma. A third of the encoder's time."""
    import av

    with _as_encoding_failed("encoded"):
        frames = [_yuv(av.VideoFrame.from_ndarray(picture, format="rgb24")) for picture in chunk]
        return [(frame, _mean_luma(frame)) for frame in frames]


def _yuv(frame: Any) -> Any:
    """Full-range RGB to limited-range BT.709 4:2:0.

    The flags are worth it: area-averaged chroma with exact rounding is within 0.25 level of the true mean
    and without bias; swscale's default is off by 0.65 level, and by 18 in pure red without the matrix being
    named.
    """
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    return frame.reformat(
        format="yuv420p",
        interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


def _mean_luma(frame: Any) -> float:
    import numpy as np

    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return float(rows[:, : plane.width].mean())


def _write(path: Path, content: bytes) -> None:
    """Put the bytes on the disk, really: a delayed write that fails later would fail for nobody."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _measure(path: Path) -> tuple[int, str]:
    """Size and sha256 as read back."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _as_encoding_failed(what: str) -> Iterator[None]:
    """The edge where a media library's or file system's error becomes ours; its own text may hold a path."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the worker's disk is full") from error
        raise EncodingFailed(f"the video could not be {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if isinstance(number, int) and 0 < number < 200:  # the system's; FFmpeg's own numbers are far larger
        return os.strerror(number)
    return str(error) if type(error) is ValueError else type(error).__name__
