"""Hostile and odd pictures, made on the spot: what each is, its bytes, and what must become of it."""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

NOT_A_PICTURE = "not a PNG, JPEG or WebP picture"
TOO_LARGE = "the picture is over 16,777,216 pixels, or a side is over 8192"
TOO_SMALL = "a side of the picture is under 16 pixels"
TOO_MANY_SCANS = "the JPEG has more than 64 scans"
DAMAGED = "the picture is damaged or cut short"
MEMORY = "the picture needs too much memory to decode"

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


class Specimen(NamedTuple):
    """`verdict`: the sentence it is refused with, or None if it is a picture."""

    name: str
    data: bytes
    verdict: str | None


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(
    width: int,
    height: int,
    rows: bytes | None = None,
    *,
    depth: int = 8,
    colour: int = 2,
    interlace: int = 0,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG from its unfiltered rows (each with its filter byte); without rows all samples are zero."""
    if rows is None:
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = bytes((1 + (width * bits + 7) // 8) * height)
    stream = chunk(b"IDAT", zlib.compress(rows))
    return PNG_MAGIC + ihdr(width, height, depth, colour, interlace) + before + stream + after + chunk(b"IEND", b"")


def photo(height: int = 48, width: int = 64) -> Image.Image:
    """Gradients with grain: every row differs from the next."""
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(0, 24, (height, width))
    rgb = np.stack([x * 200 // width + grain, y * 200 // height + grain, (x + y) % 200 + grain], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def quarters(*colours: object, dtype: type = np.uint8) -> np.ndarray:
    """A picture of 32 x 48 in four flat quarters: top left, top right, bottom left, bottom right."""
    top_left, top_right, bottom_left, bottom_right = (np.array(colour, dtype) for colour in colours)
    picture = np.empty((32, 48, *top_left.shape), dtype)
    picture[:16, :24], picture[:16, 24:] = top_left, top_right
    picture[16:, :24], picture[16:, 24:] = bottom_left, bottom_right
    return picture


RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 180, 0), (0, 0, 160), (90, 90, 90)
QUARTERS = Image.fromarray(quarters(RED, GREEN, BLUE, GREY))


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def scan_bomb(scans: int, side: int = 4096) -> bytes:
    """A grey progressive JPEG of side x side whose AC scans cost the decoder a full pass each and us 40 bytes.

    Blocks are all zero: a DC difference of zero is one bit 0, and 16 384 blocks without AC are one run of 15 bits 0.
    """
    blocks = (side // 8) ** 2
    frame = struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0)
    one_symbol = b"\x01" + bytes(15)  # one code, one bit long
    parts = [b"\xff\xd8", _segment(0xDB, b"\x00" + b"\x10" * 64), _segment(0xC2, frame)]
    parts += [_segment(0xC4, b"\x00" + one_symbol + b"\x00"), _segment(0xC4, b"\x10" + one_symbol + b"\xe0")]
    parts += [_segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0])), bytes(blocks // 8)]
    runs = bytes(-(-blocks * 15 // 16384 // 8))
    parts += [_segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0])), runs] * (scans - 1)
    return b"".join(parts) + b"\xff\xd9"


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg_with(segment: bytes) -> bytes:
    """An ordinary JPEG with a segment put in after the start."""
    data = save(photo(), "JPEG", quality=90)
    return data[:2] + segment + data[2:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def zoo() -> Iterator[Specimen]:
    """Every specimen once."""
    yield from _good()
    yield from _giants()
    yield from _hoarders()
    yield from _broken()
    yield from _foreign()


def _good() -> Iterator[Specimen]:
    image = photo()
    yield Specimen("png", save(image, "PNG"), None)
    yield Specimen("png of the smallest side", png(16, 16), None)
    yield Specimen("png of the longest side", png(8192, 16), None)
    yield Specimen("png of the most pixels", png(4096, 4096, depth=1, colour=0), None)
    yield Specimen("png interlaced", _interlaced(), None)
    yield Specimen("png 16-bit rgb", png(16, 16, depth=16), None)
    yield Specimen("png 16-bit rgba", png(16, 16, depth=16, colour=6), None)
    yield Specimen("png 16-bit grey", png(16, 16, depth=16, colour=0), None)
    yield Specimen("png 2-bit grey", png(16, 16, depth=2, colour=0), None)
    yield Specimen("png grey alpha", png(16, 16, colour=4), None)
    yield Specimen("png palette", save(image.quantize(7), "PNG"), None)
    yield Specimen("png palette with alpha", save(image.quantize(7), "PNG", transparency=bytes([0, 128])), None)
    yield Specimen("png with a zip behind it", save(image, "PNG") + b"PK\x03\x04" + bytes(64), None)
    yield Specimen("png animated", save(image, "PNG", save_all=True, append_images=[image.rotate(90)]), None)
    yield Specimen("png with broken exif", png(16, 16, before=chunk(b"eXIf", b"MM\0\x2a" + b"\xff" * 40)), None)
    yield Specimen("png with comments", png(16, 16, before=chunk(b"tEXt", b"Title\0hello")), None)
    yield Specimen("png with a profile of junk", png(16, 16, before=_iccp(b"junk" * 100)), None)
    yield Specimen("jpeg", save(image, "JPEG"), None)
    yield Specimen("jpeg progressive", save(image, "JPEG", progressive=True), None)
    yield Specimen("jpeg grey", save(image.convert("L"), "JPEG"), None)
    yield Specimen("jpeg cmyk", save(image.convert("CMYK"), "JPEG"), None)
    yield Specimen("jpeg with restarts", save(image, "JPEG", restart_marker_blocks=1), None)
    yield Specimen("jpeg of 64 scans", scan_bomb(64, side=256), None)
    yield Specimen("jpeg with a film behind it", save(image, "JPEG") + b"\xff\xda\x00\x02" * 1000, None)
    yield Specimen("jpeg with scans in a comment", jpeg_with(_segment(0xFE, b"\xff\xda" * 1000)), None)
    yield Specimen("jpeg with broken exif", jpeg_with(_segment(0xE1, b"Exif\0\0MM" + b"\xff" * 60)), None)
    yield Specimen("jpeg with a profile of junk", save(image, "JPEG", icc_profile=b"junk" * 50_000), None)
    yield Specimen("jpeg of two pictures", save(image, "MPO", save_all=True, append_images=[image]), None)
    yield Specimen("webp", save(image, "WEBP"), None)
    yield Specimen("webp lossless", save(image, "WEBP", lossless=True), None)
    yield Specimen("webp with alpha", save(image.convert("RGBA"), "WEBP"), None)
    yield Specimen("webp animated", save(image, "WEBP", save_all=True, append_images=[image.rotate(90)]), None)
    yield Specimen("webp with exif", save(image, "WEBP", exif=b"Exif\0\0II\x2a\0\x08\0\0\0\0\0\0\0\0\0"), None)


def _giants() -> Iterator[Specimen]:
    yield Specimen("png 50000 x 50000", png(50_000, 50_000, b""), TOO_LARGE)
    yield Specimen("png of 2^31 pixels a side", png(2**31 - 1, 2**31 - 1, b""), TOO_LARGE)
    yield Specimen("png one row over", png(4096, 4097, depth=1, colour=0), TOO_LARGE)
    yield Specimen("png one column over", png(8193, 16), TOO_LARGE)
    yield Specimen("png too narrow", png(15, 16), TOO_SMALL)
    yield Specimen("png of one pixel", png(1, 1), TOO_SMALL)
    yield Specimen("jpeg 65535 x 65535", _jpeg_of(65_535, 65_535), TOO_LARGE)
    yield Specimen("jpeg one row over", _jpeg_of(4096, 4097), TOO_LARGE)
    yield Specimen("jpeg of 65 scans", scan_bomb(65, side=256), TOO_MANY_SCANS)
    yield Specimen("jpeg of 5000 scans", scan_bomb(5000), TOO_MANY_SCANS)
    yield Specimen("jpeg of endless comments", jpeg_with(b"\xff\xfe\0\x02" * 20_000), TOO_MANY_SCANS)
    sides = struct.pack("<I", 16_382 | 16_382 << 14)
    yield Specimen("webp lossless 16383 x 16383", webp((b"VP8L", b"\x2f" + sides + bytes(64))), TOO_LARGE)
    yield Specimen("webp canvas of 2^24", webp((b"VP8X", b"\x02\0\0\0" + b"\xff" * 6), (b"ANIM", bytes(6))), TOO_LARGE)


def _hoarders() -> Iterator[Specimen]:
    zeros = zlib.compress(bytes(2**26))
    yield Specimen("png with 64 MB of text", png(16, 16, before=chunk(b"zTXt", b"a\0\0" + zeros)), DAMAGED)
    yield Specimen("png with 64 MB of itxt", png(16, 16, before=chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)), DAMAGED)
    yield Specimen("png with 64 MB of profile", png(16, 16, before=chunk(b"iCCP", b"a\0\0" + zeros)), DAMAGED)
    yield Specimen("png with 64 MB of rows", png(16, 16, bytes(2**26)), None)


def _broken() -> Iterator[Specimen]:
    image = photo()
    whole = {"png": save(image, "PNG"), "jpeg": save(image, "JPEG"), "webp": save(image, "WEBP")}
    for name, data in whole.items():
        yield Specimen(f"{name} cut in the middle", data[: len(data) // 2], DAMAGED)
        yield Specimen(f"{name} cut after 12 bytes", data[:12], DAMAGED)
        yield Specimen(f"{name} magic and noise", data[:12] + np.random.default_rng(1).bytes(4096), DAMAGED)
    yield Specimen("png with too few rows", png(16, 16, bytes((1 + 48) * 15)), DAMAGED)
    yield Specimen("png interlaced with too few rows", png(16, 16, bytes(100), interlace=1), DAMAGED)
    yield Specimen("png without pixels", PNG_MAGIC + ihdr(16, 16) + chunk(b"IEND", b""), DAMAGED)
    yield Specimen("png with a false checksum", whole["png"].replace(b"IDAT", b"IDAT\0", 1), DAMAGED)
    yield Specimen("png of no colour type", PNG_MAGIC + ihdr(16, 16, colour=5) + chunk(b"IDAT", b""), DAMAGED)
    yield Specimen("png of 3 bits", PNG_MAGIC + ihdr(16, 16, depth=3) + chunk(b"IDAT", b""), DAMAGED)
    yield Specimen("png without a header", PNG_MAGIC + chunk(b"IDAT", zlib.compress(b"")), DAMAGED)
    yield Specimen("png with a short header", PNG_MAGIC + chunk(b"IHDR", b"\0\0\0\x10"), DAMAGED)
    false_head, rows = ihdr(16, 16)[8:-4], zlib.compress(bytes((1 + 3 * 64) * 63))
    for name, head in (("behind another", ihdr(16, 16)), ("behind a comment", chunk(b"teXt", false_head))):
        hidden = PNG_MAGIC + head + ihdr(64, 64) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        yield Specimen(f"png with too few rows for a header {name}", hidden, DAMAGED)
    yield Specimen("png of width zero", png(0, 16, b""), DAMAGED)
    yield Specimen("jpeg of a start only", b"\xff\xd8\xff\xd9", DAMAGED)
    yield Specimen("jpeg without a frame", b"\xff\xd8" + _segment(0xDA, bytes([1, 1, 0, 0, 63, 0])), DAMAGED)
    yield Specimen("jpeg without tables", _jpeg_of(16, 16), DAMAGED)
    yield Specimen("webp without frames", webp((b"VP8X", b"\0\0\0\0" + b"\x0f\0\0" * 2)), DAMAGED)


def _foreign() -> Iterator[Specimen]:
    image = photo()
    for form in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "AVIF"):
        yield Specimen(form.lower(), save(image, form), NOT_A_PICTURE)
    heads = {
        "nothing": b"",
        "one byte": b"\x89",
        "text": b"hello",
        "web page": b"<!doctype html><html></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "photoshop": b"8BPS\0\x01" + bytes(64),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "pdf": b"%PDF-1.7\n",
        "heic": b"\0\0\0\x18ftypheic" + bytes(64),
        "jpeg xl": b"\xff\x0a" + bytes(64),
        "zip": b"PK\x03\x04" + bytes(64),
        "wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(32),
        "zeros": bytes(4096),
    }
    for name, data in heads.items():
        yield Specimen(name, data, NOT_A_PICTURE)


def _interlaced() -> bytes:
    rows = b""
    for top, left, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        rows += bytes(1 + 3 * len(range(left, 20, right))) * len(range(top, 18, down))
    return png(20, 18, rows, interlace=1)


def _iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


def _jpeg_of(width: int, height: int) -> bytes:
    """A head that promises a size, and a scan with nothing in it."""
    frame = struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])
    return b"\xff\xd8" + _segment(0xC0, frame) + _segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + b"\xff\xd9"
