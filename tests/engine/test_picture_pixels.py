"""Golden pixels: every mode of every format, every way a camera was held."""

import numpy as np
import pytest
from PIL import Image

from engine import decode_child
from engine.pictures import decode_picture
from tests.zoo import BLUE, GREEN, GREY, QUARTERS, RED, chunk, png, quarters, save

RULES = {"max_pixels": 2**24, "max_side": 8192, "min_side": 16}

# How a stored picture is shown, by EXIF orientation. Source: EXIF 2.32, tag 274.
SHOWN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


PALETTE = Image.fromarray(quarters(0, 1, 2, 3))
PALETTE.putpalette([*RED, *GREEN, *BLUE, *GREY])
# name: (picture, format, options, expected quarters, tolerance)
MODES = {
    "png RGB": (QUARTERS, "PNG", {}, (RED, GREEN, BLUE, GREY), 0),
    "png L": (
        Image.fromarray(quarters(0, 60, 120, 255)), "PNG", {},
        ((0, 0, 0), (60, 60, 60), (120, 120, 120), (255, 255, 255)), 0,
    ),
    "png LA": (
        Image.fromarray(quarters((0, 255), (0, 0), (100, 128), (200, 64))), "PNG", {},
        ((0, 0, 0), (255, 255, 255), (177, 177, 177), (241, 241, 241)), 1,
    ),
    "png RGBA": (
        Image.fromarray(quarters((*RED, 255), (*GREEN, 0), (*BLUE, 128), (*GREY, 64))), "PNG", {},
        (RED, (255, 255, 255), (127, 127, 207), (214, 214, 214)), 1,
    ),
    "png P": (PALETTE, "PNG", {}, (RED, GREEN, BLUE, GREY), 0),
    "png P with alphas": (
        PALETTE, "PNG", {"transparency": bytes([255, 0, 128])},
        (RED, (255, 255, 255), (127, 127, 207), GREY), 1,
    ),
    "png P with one clear": (PALETTE, "PNG", {"transparency": 1}, (RED, (255, 255, 255), BLUE, GREY), 0),
    "png RGB with one clear": (QUARTERS, "PNG", {"transparency": GREEN}, (RED, (255, 255, 255), BLUE, GREY), 0),
    "png L with one clear": (
        Image.fromarray(quarters(0, 60, 120, 200)), "PNG", {"transparency": 60},
        ((0, 0, 0), (255, 255, 255), (120, 120, 120), (200, 200, 200)), 0,
    ),
    "png 1": (
        Image.fromarray(quarters(0, 255, 255, 0)).convert("1"), "PNG", {},
        ((0, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 0)), 0,
    ),
    "png 16-bit grey": (
        Image.fromarray(quarters(0, 257, 32_896, 65_535, dtype=np.uint16)), "PNG", {},
        ((0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)), 0,
    ),
    "jpeg RGB": (QUARTERS, "JPEG", {"quality": 95, "subsampling": 0}, (RED, GREEN, BLUE, GREY), 6),
    "jpeg L": (
        Image.fromarray(quarters(0, 60, 120, 255)), "JPEG", {"quality": 95},
        ((0, 0, 0), (60, 60, 60), (120, 120, 120), (255, 255, 255)), 6,
    ),
    "jpeg CMYK": (
        Image.fromarray(quarters((0, 255, 255, 55), (255, 0, 255, 75), (255, 255, 0, 95), (0, 0, 0, 165)), mode="CMYK"),
        "JPEG", {"quality": 95}, (RED, GREEN, BLUE, GREY), 6,
    ),
    "webp RGB": (QUARTERS, "WEBP", {"lossless": True}, (RED, GREEN, BLUE, GREY), 0),
    "webp RGBA": (
        Image.fromarray(quarters((*RED, 255), (*GREEN, 0), (*BLUE, 128), (*GREY, 64))), "WEBP", {"lossless": True},
        (RED, (255, 255, 255), (127, 127, 207), (214, 214, 214)), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_decode_picture_gives_the_golden_pixels_of(mode):
    image, form, options, colours, tolerance = MODES[mode]
    found = np.asarray(decode_picture(save(image, form, **options))).astype(int)
    assert np.abs(found - quarters(*colours).astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", SHOWN)
def test_decode_picture_turns_every_mode_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode, (image, form, options, colours, tolerance) in MODES.items():
        data = save(image, form, exif=exif.tobytes(), **options)
        decoded = decode_child.decode_picture(data, form, RULES)
        found = np.frombuffer(b"".join(decoded.pixels), np.uint8).reshape(decoded.height, decoded.width, 3)
        expected = SHOWN[orientation](quarters(*colours))
        assert found.shape == expected.shape, mode
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance, mode


def test_decode_picture_turns_upright_in_the_child_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(save(QUARTERS, "JPEG", exif=exif.tobytes())).size == (32, 48)


def test_decode_picture_takes_16_bit_keys_exactly():
    rows = b"".join(b"\0" + b"".join(v.to_bytes(2, "big") for v in [0x1234, 0x1235] * 8) for _ in range(16))
    data = png(16, 16, rows, depth=16, colour=0, before=chunk(b"tRNS", b"\x12\x34"))
    assert np.asarray(decode_picture(data))[0, :2, 0].tolist() == [255, 18]


@pytest.mark.parametrize(("depth", "byte", "first"), [(1, 0b0110_0110, 0), (2, 0b0001_1011, 0), (4, 0x01, 0)])
def test_decode_picture_scales_small_grey_samples_and_their_key(depth, byte, first):
    samples = [byte >> shift & (1 << depth) - 1 for shift in range(8 - depth, -1, -depth)]
    rows = (b"\0" + bytes([byte]) * (16 * depth // 8)) * 16
    data = png(16, 16, rows, depth=depth, colour=0, before=chunk(b"tRNS", b"\0\1"))
    found = np.asarray(decode_picture(data))[0, : len(samples), 0].tolist()
    assert samples[0] == first
    assert found == [255 if sample == 1 else sample * 255 // ((1 << depth) - 1) for sample in samples]


def test_decode_picture_takes_the_first_frame_of_an_animation():
    for form in ("PNG", "WEBP"):
        data = save(QUARTERS, form, save_all=True, append_images=[QUARTERS.rotate(180)], lossless=True)
        assert np.abs(np.asarray(decode_picture(data)).astype(int) - np.asarray(QUARTERS).astype(int)).max() == 0, form


@pytest.mark.parametrize("height", [16, 63, 64, 65, 128, 200])
def test_decode_picture_gives_every_row_once_and_in_its_place(height):
    drawn = np.random.default_rng(height).integers(0, 256, (height, 20, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_picture(save(Image.fromarray(drawn), "PNG"))), drawn)
