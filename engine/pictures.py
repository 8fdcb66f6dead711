"""Pictures in and out. A stranger's is judged by its bytes and decoded in a child; only RGB comes back."""

import errno
import hashlib
import re
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from engine import sandbox
from engine.outputs import MediaFile
from schemas.errors import BadOutput, DiskFull, EncodingFailed, InvalidMedia

MAX_PIXELS = 16_777_216  # 4096 x 4096
MAX_SIDE = 8192
MIN_SIDE = 16
MAX_JPEG_SCANS = 64  # an ordinary progressive JPEG has 10; each costs a pass over all coefficients
MAX_JPEG_SEGMENTS = 10_000

_LIMITS = sandbox.Limits(wall_s=5.0, cpu_s=5, memory_bytes=2**30, result_bytes=3 * MAX_PIXELS + sandbox.MAX_HEAD_BYTES)
_SENTENCES = {
    "too_large": f"the picture is over {MAX_PIXELS:,} pixels, or a side is over {MAX_SIDE}",
    "too_small": f"a side of the picture is under {MIN_SIDE} pixels",
    "memory": "the picture needs too much memory to decode",
    "slow": "the picture takes too long to decode",
    "damaged": "the picture is damaged or cut short",
}
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # not stuffed zeros, fill bytes, restarts or reserved codes
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA


def decode_picture(data: bytes) -> Image.Image:
    """Decode a stranger's picture: RGB, upright, over white, without metadata.

    PNG, JPEG and WebP by their first bytes, whatever the name or type says; of an animation the first frame.

    Raises:
        InvalidMedia: it is not such a picture, or over a limit.
    """
    form = picture_form(data)
    if form is None:
        raise InvalidMedia("not a PNG, JPEG or WebP picture")
    if form == "JPEG" and has_too_many_scans(data):
        raise InvalidMedia(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
    rules = {"max_pixels": MAX_PIXELS, "max_side": MAX_SIDE, "min_side": MIN_SIDE}
    try:
        raster = sandbox.decode(data, form, rules, _LIMITS)
    except sandbox.Refused as refusal:
        raise InvalidMedia(_SENTENCES.get(refusal.reason, _SENTENCES["damaged"])) from refusal
    return Image.frombytes("RGB", (raster.width, raster.height), raster.pixels)


def picture_form(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes, else None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG could make a decoder run more than MAX_JPEG_SCANS scans, seen without decoding.

    Walks from segment to segment as libjpeg does, up to the end of the picture: what phones append after it
    (further pictures, a film) does not count.
    """
    scans, position = 0, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or data[marker.end() - 1] == _EOI:
            return False
        position = marker.end()
        code = data[position - 1]
        scans += code == _SOS
        if scans > MAX_JPEG_SCANS:
            return True
        if code != _SOI:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return True


def fit_picture(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale with Lanczos to cover height x width, and cut the middle out to exactly that."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def encode_picture(image: Image.Image, output_format: str, quality: int) -> bytes:
    """Write an RGB picture as "png", "jpeg" or "webp". Only pixels decide the bytes: no metadata goes along.

    `quality`: 1 to 100, of jpeg and webp; png is lossless. JPEG keeps full colour resolution (4:4:4).

    Raises:
        EncodingFailed: the encoder does not take the picture.
        ValueError: another format.
    """
    options = {"png": {}, "jpeg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}
    if output_format not in options:
        raise ValueError(f"{output_format!r} is not png, jpeg or webp")
    plain = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())  # leaves all metadata behind
    file = BytesIO()
    try:
        plain.save(file, output_format, **options[output_format])
    except (OSError, ValueError) as error:
        raise EncodingFailed(f"the picture could not be written as {output_format}") from error
    return file.getvalue()


def write_picture(picture: Any, stem: Path, output_format: str, quality: int) -> MediaFile:
    """Write a generated picture, uint8 (height, width, 3) RGB, and read it back. The format is the suffix.

    Raises:
        BadOutput: the picture is one flat colour, as a decode of NaN is.
        DiskFull: there is no room for it.
        EncodingFailed: it could not be written, or does not read back.
    """
    image = Image.fromarray(picture)
    if image.getcolors(1) is not None:
        raise BadOutput("the model made a picture of one flat colour")
    path = stem.with_name(f"{stem.name}.{output_format}")
    try:
        path.write_bytes(encode_picture(image, output_format, quality))
        written = path.read_bytes()
        with Image.open(BytesIO(written), formats=[output_format]) as found:
            found.load()
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's word for a broken PNG
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the worker's disk is full") from error
        raise EncodingFailed("the picture's file could not be written") from error
    if found.size != image.size or (output_format == "png" and found.tobytes() != image.tobytes()):
        raise EncodingFailed("the picture's file does not hold the picture")
    return MediaFile(
        path=path,
        content_type=f"image/{output_format}",
        height=found.height,
        width=found.width,
        frames=1,
        size_bytes=len(written),
        sha256=hashlib.sha256(written).hexdigest(),
    )
