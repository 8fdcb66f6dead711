"""Clips in: the last frames of a stranger's video, decoded in a child."""

from dataclasses import dataclass, replace

from PIL import Image

from engine import sandbox
from schemas.errors import InvalidMedia

MAX_PIXELS = 4096 * 2304
MAX_SIDE = 4096
MIN_SIDE = 16
MAX_FRAMES = 3600
MAX_DURATION_S = 120.0
MAX_BOXES = 20_000  # a fragmented MP4 has two a fragment

# More seconds than a picture gets: a clip with a single key frame must be decoded from its beginning.
_LIMITS = sandbox.Limits(wall_s=20.0, cpu_s=20, memory_bytes=2**30)
_SENTENCES = {
    "too_large": f"the video's frames are over {MAX_PIXELS:,} pixels, or a side is over {MAX_SIDE}",
    "too_small": f"a side of the video is under {MIN_SIDE} pixels",
    "too_long": f"the video has more than {MAX_FRAMES} frames or is longer than {MAX_DURATION_S:g} s",
    "too_short": "the video has fewer frames than are needed",
    "codec": "the video's codec is not H.264, HEVC, MPEG-4, VP8, VP9 or AV1",
    "memory": "the video needs too much memory to decode",
    "slow": "the video takes too long to decode",
    "damaged": "the video is damaged, cut short or without pictures",
}


@dataclass(frozen=True)
class Clip:
    """The end of a video: RGB frames in the order they are shown."""

    frames: list[Image.Image]
    fps: float | None
    """As the file says; None where it says nothing."""


def decode_clip(data: bytes, last_frames: int) -> Clip:
    """Decode the last frames of a stranger's MP4, MOV, WebM or Matroska video.

    Raises:
        InvalidMedia: it is not such a video, has fewer frames, or is over a limit.
    """
    form = clip_form(data)
    if form is None:
        raise InvalidMedia("not an MP4, MOV, WebM or Matroska video")
    if not (_boxes_fit(data) if form == "mov" else _segment_fits(data)):
        raise InvalidMedia(_SENTENCES["damaged"])
    rules = {
        "last_frames": last_frames,
        "max_frames": MAX_FRAMES,
        "max_duration_s": MAX_DURATION_S,
        "max_pixels": MAX_PIXELS,
        "max_side": MAX_SIDE,
        "min_side": MIN_SIDE,
    }
    limits = replace(_LIMITS, result_bytes=3 * MAX_PIXELS * last_frames + sandbox.MAX_HEAD_BYTES)
    try:
        raster = sandbox.decode(data, form, rules, limits)
    except sandbox.Refused as refusal:
        raise InvalidMedia(_SENTENCES[refusal.reason]) from refusal
    size_bytes = raster.height * raster.width * 3
    frames = [
        Image.frombytes("RGB", (raster.width, raster.height), raster.pixels[i * size_bytes : (i + 1) * size_bytes])
        for i in range(raster.frames)
    ]
    return Clip(frames, raster.fps)


def clip_form(data: bytes) -> str | None:
    """libavformat's name of the container, by its first bytes: mov (and MP4) or matroska (and WebM)."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return None


def _boxes_fit(data: bytes) -> bool:
    """Whether the outermost boxes of an MP4 end with the file: demuxers play a cut one as far as it goes."""
    position = 0
    for _ in range(MAX_BOXES):
        if position == len(data):
            return True
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 0:  # up to the end of the file
            return True
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8 or position + size > len(data):
            return False
        position += size
    return False


def _segment_fits(data: bytes) -> bool:
    """Whether a Matroska file holds as much as its segment says. Live recordings do not say, and pass."""
    size, position = _ebml_size(data, 4)  # 4: the header's identifier
    position += size or 0
    if data[position : position + 4] != b"\x18\x53\x80\x67":
        return False
    size, position = _ebml_size(data, position + 4)
    return size is None or position + size <= len(data)


def _ebml_size(data: bytes, position: int) -> tuple[int | None, int]:
    """The size written at `position` (None: unknown), and where it ends. Source: RFC 8794, section 4."""
    length = 9 - int.from_bytes(data[position : position + 1], "big").bit_length()
    position, digits = position + length, data[position : position + length]
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(digits, "big") & unknown
    return None if size == unknown else size, position
