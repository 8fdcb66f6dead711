import base64
import random
import resource
import subprocess
import sys
import textwrap
import time
import zlib
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from engine import decode_child, pictures, sandbox
from engine.pictures import decode_picture, encode_picture, fit_picture, has_too_many_scans, load_picture, write_picture
from schemas.errors import BadOutput, EncodingFailed, FetchFailed, InvalidMedia
from tests.zoo import PNG_MAGIC, chunk, ihdr, photo, png, save, scan_bomb, zoo

SPECIMENS = list(zoo())
RULES = {"max_pixels": 2**24, "max_side": 8192, "min_side": 16}


def verdict(data: bytes) -> str | None:
    try:
        decode_picture(data)
    except InvalidMedia as error:
        return error.sentence
    return None


def test_zoo_is_large_enough_to_mean_something():
    assert len(SPECIMENS) >= 90


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_decode_picture_judges(specimen):
    started = time.monotonic()
    assert verdict(specimen.data) == specimen.verdict
    assert time.monotonic() - started < 5.5


def test_zoo_costs_the_parent_no_memory_and_no_child_more_than_its_limit(tmp_path):
    """In a process of its own, whose children are these only. A started child counts its parent's memory as its own."""
    for number, specimen in enumerate(SPECIMENS):
        (tmp_path / f"{number:03}").write_bytes(specimen.data)
    program = f"""
        import pathlib, resource
        from engine.pictures import decode_picture
        from schemas.errors import InvalidMedia
        def rss():
            return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
        paths = sorted(pathlib.Path({str(tmp_path)!r}).iterdir())
        before = rss()
        for path in paths:
            try:
                decode_picture(path.read_bytes())
            except InvalidMedia:
                pass
        print(rss() - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True)
    growth, children = (int(word) for word in done.stdout.split())
    assert growth < 16 * 2**20
    assert children < 1.1 * 2**30


@pytest.mark.parametrize("scans", [65, 1000, 5000, 50_000])
def test_decode_picture_refuses_a_scan_bomb_before_decoding(scans, monkeypatch):
    data = scan_bomb(scans)
    monkeypatch.setattr(sandbox, "decode", None)
    started = time.process_time()
    assert verdict(data) == "the JPEG has more than 64 scans"
    assert time.process_time() - started < 0.05


def test_decode_picture_would_take_long_over_a_scan_bomb_without_that(monkeypatch):
    monkeypatch.setattr(pictures, "has_too_many_scans", lambda data: False)
    monkeypatch.setattr(pictures, "_LIMITS", sandbox.Limits(wall_s=1.0, cpu_s=1))
    assert verdict(scan_bomb(5000)) == "the picture takes too long to decode"


@pytest.mark.soak
@pytest.mark.parametrize("scans", [5000, 50_000])
def test_child_ends_a_scan_bomb_within_its_limits_without_that(scans, monkeypatch):
    monkeypatch.setattr(pictures, "has_too_many_scans", lambda data: False)
    data = scan_bomb(scans)
    started = time.monotonic()
    assert verdict(data) == "the picture takes too long to decode"
    assert 4.5 < time.monotonic() - started < 5.5


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", False),
        (b"\xff", False),
        (b"\xff\xd8\xff", False),
        (b"\xff\xd8" + b"\xff\xda\x00\x02" * 64 + b"\xff\xd9", False),
        (b"\xff\xd8" + b"\xff\xda\x00\x02" * 65 + b"\xff\xd9", True),
        (b"\xff\xd8" + b"\xff\xff\xff\xda\x00\x02" * 65, True),
        (b"\xff\xd8" + b"\xff\xda\x00\x02ab\xff\x00\xff\xd0" * 65, True),
        (b"\xff\xd8" + b"\xff\xda\x00\x00" * 65, True),
        (b"\xff\xd8\xff\xd9" + b"\xff\xda\x00\x02" * 65, False),
        (b"\xff\xd8\xff\xfe\x00\xff" + b"\xff\xda\x00\x02" * 63 + b"x" + b"\xff\xd9", False),
        (b"\xff\xd8" + b"\xff\x10\xff\xff" + b"\xff\xda\x00\x02" * 65, True),
        (b"\xff\xd8" + b"\xff\xd8" * 9_998, False),
        (b"\xff\xd8" + b"\xff\xd8" * 10_000, True),
    ],
)
def test_has_too_many_scans_walks_as_libjpeg_does(data, expected):
    assert has_too_many_scans(data) is expected


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


def quarters(*colours: object, dtype: type = np.uint8) -> np.ndarray:
    """A picture of 32 x 48 in four flat quarters: top left, top right, bottom left, bottom right."""
    top_left, top_right, bottom_left, bottom_right = (np.array(colour, dtype) for colour in colours)
    picture = np.empty((32, 48, *top_left.shape), dtype)
    picture[:16, :24], picture[:16, 24:] = top_left, top_right
    picture[16:, :24], picture[16:, 24:] = bottom_left, bottom_right
    return picture


RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 180, 0), (0, 0, 160), (90, 90, 90)
RGB = Image.fromarray(quarters(RED, GREEN, BLUE, GREY))
PALETTE = Image.fromarray(quarters(0, 1, 2, 3))
PALETTE.putpalette([*RED, *GREEN, *BLUE, *GREY])
# name: (picture, format, options, expected quarters, tolerance)
MODES = {
    "png RGB": (RGB, "PNG", {}, (RED, GREEN, BLUE, GREY), 0),
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
    "png RGB with one clear": (RGB, "PNG", {"transparency": GREEN}, (RED, (255, 255, 255), BLUE, GREY), 0),
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
    "jpeg RGB": (RGB, "JPEG", {"quality": 95, "subsampling": 0}, (RED, GREEN, BLUE, GREY), 6),
    "jpeg L": (
        Image.fromarray(quarters(0, 60, 120, 255)), "JPEG", {"quality": 95},
        ((0, 0, 0), (60, 60, 60), (120, 120, 120), (255, 255, 255)), 6,
    ),
    "jpeg CMYK": (
        Image.fromarray(quarters((0, 255, 255, 55), (255, 0, 255, 75), (255, 255, 0, 95), (0, 0, 0, 165)), mode="CMYK"),
        "JPEG", {"quality": 95}, (RED, GREEN, BLUE, GREY), 6,
    ),
    "webp RGB": (RGB, "WEBP", {"lossless": True}, (RED, GREEN, BLUE, GREY), 0),
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
    assert decode_picture(save(RGB, "JPEG", exif=exif.tobytes())).size == (32, 48)


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
        data = save(RGB, form, save_all=True, append_images=[RGB.rotate(180)], lossless=True)
        assert np.abs(np.asarray(decode_picture(data)).astype(int) - np.asarray(RGB).astype(int)).max() == 0, form


def decoded_in_process(data: bytes, form: str) -> bytes | str:
    """The pixels, or why not. Nothing but a refusal may come out."""
    try:
        decoded = decode_child.decode_picture(data, form, {"max_pixels": 2**16, "max_side": 1024, "min_side": 16})
    except decode_child.Refused as refusal:
        return refusal.reason
    return b"".join(decoded.pixels)


SMALL = {
    "PNG": save(photo(16, 20), "PNG"),
    "JPEG": save(photo(16, 20), "JPEG"),
    "JPEG progressive": save(photo(16, 20), "JPEG", progressive=True),
    "WEBP": save(photo(16, 20), "WEBP"),
    "WEBP lossless": save(photo(16, 20), "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_decode_picture_never_makes_up_what_a_cut_file_lacks(name):
    form, data = name.split()[0], SMALL[name]
    whole = decoded_in_process(data, form)
    cuts = {decoded_in_process(data[:length], form) for length in range(8, len(data))}
    assert isinstance(whole, bytes)
    assert cuts <= {"damaged", whole}
    assert "damaged" in cuts


def test_png_check_is_what_sees_missing_rows(monkeypatch):
    data = PNG_MAGIC + ihdr(16, 16) + chunk(b"IDAT", zlib.compress(bytes(49 * 15))) + chunk(b"IEND", b"")
    assert decoded_in_process(data, "PNG") == "damaged"
    monkeypatch.setattr(decode_child, "png_is_whole", lambda data: True)
    assert decoded_in_process(data, "PNG") == bytes(16 * 16 * 3)


def mutants(data: bytes, count: int, seed: int):
    draw = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            kind, at = draw.randrange(4), draw.randrange(len(mutant))
            if kind == 0:
                mutant[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                mutant[at] = draw.choice(b"\x00\x01\x7f\x80\xfe\xff")
            elif kind == 2:
                del mutant[at : at + draw.randint(1, 16)]
            else:
                mutant[at:at] = mutant[at : at + draw.randint(1, 16)]
            if len(mutant) < 16:
                break
        yield bytes(mutant)


FUZZED = {
    **SMALL,
    "PNG palette": save(photo(16, 20).quantize(9), "PNG", transparency=bytes([1, 2, 3])),
    "PNG exif": save(photo(16, 20), "PNG", exif=b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "PNG animated": save(photo(16, 20), "PNG", save_all=True, append_images=[photo(16, 20).rotate(90)]),
    "JPEG exif": save(photo(16, 20), "JPEG", exif=b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "JPEG cmyk": save(photo(16, 20).convert("CMYK"), "JPEG"),
    "WEBP animated": save(photo(16, 20), "WEBP", save_all=True, append_images=[photo(16, 20).rotate(90)]),
}


def fuzz(name: str, count: int, seed: int) -> set[bool]:
    """Which of refused and taken came about."""
    for_form = name.split()[0]
    return {isinstance(decoded_in_process(mutant, for_form), str) for mutant in mutants(FUZZED[name], count, seed)}


@pytest.mark.filterwarnings("ignore")  # as the child does
@pytest.mark.parametrize("name", FUZZED)
def test_child_raises_only_from_its_closed_list_for_mutants_of(name):
    assert fuzz(name, 500, seed=1) == {True, False}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # as the child does
@pytest.mark.parametrize("name", FUZZED)
def test_child_raises_only_from_its_closed_list_for_many_mutants_of(name):
    assert fuzz(name, 10_000, seed=2) == {True, False}


@pytest.mark.parametrize("name", FUZZED)
def test_decode_picture_answers_mutants_of(name):
    for mutant in mutants(FUZZED[name], 4, seed=3):
        assert verdict(mutant) in {None, *(specimen.verdict for specimen in SPECIMENS)}


@pytest.mark.soak
@pytest.mark.parametrize("name", FUZZED)
def test_decode_picture_answers_many_mutants_of(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mutant in mutants(FUZZED[name], 200, seed=4):
        verdict(mutant)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


WORST = {
    "png of 16-bit rgba, interlaced": lambda: save(photo(4096, 4096), "PNG", compress_level=1),
    "webp lossless with alpha": lambda: save(photo(4096, 4096).convert("RGBA"), "WEBP", lossless=True, method=0),
    "jpeg progressive": lambda: save(photo(4096, 4096), "JPEG", progressive=True, quality=100),
    "jpeg of 64 scans": lambda: scan_bomb(64),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", WORST)
def test_worst_pictures_are_decoded_or_refused_in_time(name):
    data = WORST[name]()
    started = time.monotonic()
    assert verdict(data) in (None, "the picture takes too long to decode")
    assert time.monotonic() - started < 5.5


@pytest.mark.parametrize("declared", ["image/png", "image/gif", "image/x-nonsense"])
def test_load_picture_judges_by_content_whatever_is_declared(declared):
    for form in ("PNG", "JPEG", "WEBP"):
        value = f"data:{declared};base64,{base64.b64encode(save(photo(), form)).decode()}"
        assert load_picture(value, fetch=None, max_bytes=2**20).size == (64, 48)
    gif = f"data:{declared};base64,{base64.b64encode(save(photo(), 'GIF')).decode()}"
    with pytest.raises(InvalidMedia, match="not a PNG, JPEG or WebP picture"):
        load_picture(gif, fetch=None, max_bytes=2**20)


def test_load_picture_takes_a_url_through_fetch():
    data = save(photo(), "PNG")
    image = load_picture("https://h/a.png", fetch=lambda url: data, max_bytes=2**20)
    assert image.mode == "RGB"
    assert image.tobytes() == photo().tobytes()


def test_load_picture_passes_on_that_a_url_failed():
    def fail(url: str) -> bytes:
        raise FetchFailed("gone")

    with pytest.raises(FetchFailed, match="gone"):
        load_picture("https://h/a.png", fetch=fail, max_bytes=2**20)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_no_metadata_survives_decoding_and_encoding(output_format):
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "GPS-CANARY"
    exif[0x010E] = "DESCRIPTION-CANARY"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "TEXT-CANARY")
    marked = {
        "PNG": save(photo(), "PNG", exif=exif, icc_profile=b"ICC-CANARY", pnginfo=text),
        "JPEG": save(photo(), "JPEG", exif=exif, icc_profile=b"ICC-CANARY", comment=b"COMMENT-CANARY"),
        "WEBP": save(photo(), "WEBP", exif=exif, icc_profile=b"ICC-CANARY", xmp=b"XMP-CANARY"),
    }
    for form, data in marked.items():
        image = decode_picture(data)
        assert image.info == {}, form
        image.info.update(icc_profile=b"ICC-CANARY", comment=b"COMMENT-CANARY", exif=exif.tobytes(), dpi=(9, 9))
        written = encode_picture(image, output_format, 90)
        assert b"CANARY" not in written, form
        found = Image.open(BytesIO(written))
        assert not {"exif", "icc_profile", "xmp", "comment", "dpi"} & set(found.info), form


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_encode_picture_gives_the_same_bytes_again(output_format):
    assert encode_picture(photo(), output_format, 80) == encode_picture(photo(), output_format, 80)


def test_encode_picture_keeps_png_exact_and_lossy_near():
    errors = {}
    for output_format in ("png", "jpeg", "webp"):
        found = np.asarray(Image.open(BytesIO(encode_picture(RGB, output_format, 95))).convert("RGB")).astype(int)
        errors[output_format] = np.abs(found - np.asarray(RGB).astype(int)).mean()
    assert errors["png"] == 0
    assert errors["jpeg"] < 2
    assert errors["webp"] < 4


def test_encode_picture_spends_more_bytes_on_more_quality():
    for output_format in ("jpeg", "webp"):
        assert len(encode_picture(photo(), output_format, 30)) < len(encode_picture(photo(), output_format, 95))


def test_encode_picture_refuses_another_format():
    with pytest.raises(ValueError, match="'gif' is not png, jpeg or webp"):
        encode_picture(photo(), "gif", 90)


def test_encode_picture_says_when_the_encoder_does_not_take_it():
    with pytest.raises(EncodingFailed, match="could not be written as webp"):
        encode_picture(Image.new("RGB", (16_384, 1)), "webp", 90)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_write_picture_measures_the_file_it_wrote(output_format, tmp_path):
    file = write_picture(np.asarray(photo()), tmp_path / "image_0", output_format, 90)
    assert file.path == tmp_path / f"image_0.{output_format}"
    assert (file.content_type, file.height, file.width, file.frames) == (f"image/{output_format}", 48, 64, 1)
    assert file.size_bytes == file.path.stat().st_size
    assert file.sha256 == sha256(file.path.read_bytes()).hexdigest()


def test_write_picture_refuses_one_flat_colour(tmp_path):
    with pytest.raises(BadOutput, match="one flat colour"):
        write_picture(np.zeros((32, 32, 3), np.uint8), tmp_path / "image_0", "png", 90)
    assert list(tmp_path.iterdir()) == []


def test_write_picture_says_when_the_disk_does_not_take_it(tmp_path):
    with pytest.raises(EncodingFailed, match="could not be written"):
        write_picture(np.asarray(photo()), tmp_path / "missing" / "image_0", "png", 90)


def test_write_picture_sees_a_file_that_does_not_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: save(photo(16, 16), "PNG"))
    with pytest.raises(EncodingFailed, match="does not hold the picture"):
        write_picture(np.asarray(photo()), tmp_path / "image_0", "png", 90)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 16), (480, 832), (64, 16), (33, 47)])
def test_fit_picture_gives_exactly_the_size(height, width):
    assert fit_picture(RGB, height, width).size == (width, height)


def test_fit_picture_cuts_the_middle_out_without_distorting():
    stripes = Image.fromarray(np.repeat([[[255, 0, 0]] * 20 + [[0, 255, 0]] * 40 + [[0, 0, 255]] * 20], 40, axis=0).astype(np.uint8))
    assert fit_picture(stripes, 40, 40).getcolors() == [(1600, (0, 255, 0))]


def test_fit_picture_leaves_a_fitting_picture_alone():
    assert fit_picture(RGB, 32, 48).tobytes() == RGB.tobytes()
