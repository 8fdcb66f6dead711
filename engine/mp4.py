"""Frames -> an H.264 MP4 in memory, and each packet of it as soon as it is made.

Encoder: libx264 inside this process, by PyAV. The other choice, an ffmpeg child behind a pipe, adds a binary
that may be absent, a process that may be killed, 100 MB through a pipe, and an exit status that can be good
with a broken file. PyAV raises where it fails, and the same package reads strangers' clips, so the image
needs one media library. The stream is made in memory (5 MB for 81 frames): PyAV 18.1 ends the process with a
segmentation fault when its own file writing meets a full disk, Python's write raises.
"""

import errno
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from engine.geometry import VideoShape
from engine.h264 import Packet, avcc, length_prefixed, mean_luma
from schemas.errors import DiskFull, EncodingFailed

CRF = 18  # x264's own scale: 18 is taken for visually lossless
PRESET = "veryfast"  # 0.45 s for 81 frames of 832x480 on two cores; medium takes 0.8 s for 10 % fewer bytes
# Frames in work at a time. Their number changes the bytes, so it does not follow the machine's cores. Twelve have their
# work at the end, when x264 still holds 26 frames: 57 ms on 16 cores, 62 with eight. PyAV's own choice cuts each frame
# in slices, one for each core, and has one frame in work at a time.
X264_THREADS = 12
CPUINFO = Path("/proc/cpuinfo")


class Mp4:
    """An MP4 being made in memory: limited BT.709, H.264 4:2:0, the index in front."""

    def __init__(self, shape: VideoShape, fps: int) -> None:
        import av
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        self.luma: list[float] = []
        """Mean of each frame's Y plane as it went to the encoder, 16 to 235."""
        self._packets: SimpleQueue[Packet | None] = SimpleQueue()
        self._buffer = io.BytesIO()
        with as_encoding_failed("opened"):
            # The index gets its room in front from the start: 20 bytes a frame at most, 1 kB around them. The
            # muxer's other way, moving everything afterwards, needs a file.
            room = {"moov_size": str(4096 + 32 * shape.frames)}
            self._container = av.open(self._buffer, "w", format="mp4", options=room)
            self._stream = self._container.add_stream("libx264", rate=fps)
            context = self._stream.codec_context
            context.width, context.height, context.pix_fmt = shape.width, shape.height, "yuv420p"
            context.time_base = Fraction(1, fps)
            context.options = {"crf": str(CRF), "preset": PRESET, **_repeatable()}
            context.thread_type, context.thread_count = "FRAME", X264_THREADS
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def packets(self) -> Iterator[Packet]:
        """Each packet as the file must have it, once it is there; for one other thread. Ends with the file."""
        return iter(self._packets.get, None)

    def add(self, coming: Sequence[Future[tuple[Any, float]]]) -> None:
        """Frames in their order, as `converted` makes them."""
        for one in coming:
            frame, luma = one.result()
            with as_encoding_failed("encoded"):
                frame.pts = len(self.luma)
                self.luma.append(luma)
                self._encode(frame)

    def finish(self) -> bytes:
        """Flush the encoder and write the index; the whole file."""
        with as_encoding_failed("finished"):
            self._encode(None)
            self._packets.put(None)
            self._container.close()
        return self._buffer.getvalue()

    def abandon(self) -> None:
        """Free the encoder and whoever waits for its packets. Once, and harmless after `finish`."""
        import av

        self._packets.put(None)
        with suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        del self._stream  # the encoder, its threads and frames; a failure that is still looked at keeps the rest

    def _encode(self, frame: Any) -> None:
        context = self._stream.codec_context
        for packet in context.encode_lazy(frame):
            content = length_prefixed(bytes(packet))
            self._packets.put(Packet.of(packet, content, avcc(context.extradata or b"")))
            packet.stream = self._stream
            self._container.mux(packet)  # puts its times into the file's unit


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


def converted(picture: Any) -> tuple[Any, float]:
    """(height, width, 3) uint8 RGB -> a 4:2:0 frame and its mean luma. A third of the encoder's time."""
    import av

    with as_encoding_failed("encoded"):
        frame = _yuv(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        return frame, mean_luma(frame)


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


@contextmanager
def as_encoding_failed(what: str) -> Iterator[None]:
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
