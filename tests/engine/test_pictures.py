import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from engine import decode_child, pictures, sandbox, spares
from engine.pictures import decode_picture, encode_picture, fit_picture, has_too_many_scans, write_picture
from schemas.errors import BadOutput, DiskFull, EncodingFailed, InvalidMedia
from tests.figures import Figure, Worst
from tests.zoo import DAMAGED, QUARTERS, TOO_LARGE, TOO_SMALL, photo, png, save, scan_bomb, zoo

pytest_plugins = ["tests.figures"]

SPECIMENS = list(zoo())


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
    assert verdict(specimen.data) == specimen.verdict


def test_decode_picture_would_make_100_megabytes_of_5_kilobytes_without_the_pixel_limit(monkeypatch):
    bomb = png(4096, 8192, depth=1, colour=0)
    assert len(bomb) < 5000
    assert verdict(bomb) == TOO_LARGE
    monkeypatch.setattr(pictures, "MAX_PIXELS", 2**40)
    monkeypatch.setattr(pictures, "_LIMITS", sandbox.Limits(result_bytes=2**27))  # else the kernel ends it there
    assert len(decode_picture(bomb).tobytes()) == 100_663_296


@pytest.mark.parametrize(
    ("limit", "without", "width", "height"), [("MAX_SIDE", 2**30, 1_000_000, 16), ("MIN_SIDE", 1, 1, 8192)]
)
def test_decode_picture_would_take_any_shape_without_the_limits_of_a_side(limit, without, width, height, monkeypatch):
    sliver = png(width, height, depth=1, colour=0)
    assert verdict(sliver) in (TOO_LARGE, TOO_SMALL)
    monkeypatch.setattr(pictures, limit, without)
    assert decode_picture(sliver).size == (width, height)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_zoo_costs_the_parent_no_memory_and_no_child_more_than_its_limit(every, tmp_path, figure: Figure):
    """In a process of its own, whose children are these only. A started child counts its parent's memory as its own."""
    for number, specimen in enumerate(SPECIMENS[::every]):
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
    figure("hostile pictures: memory of a child", Worst(children / 2**30, "GiB", 1.1))
    figure("hostile pictures: growth of the worker", Worst(growth / 2**20, "MiB", 16))
    assert growth < 16 * 2**20
    assert children < 1.1 * 2**30


@pytest.mark.parametrize("scans", [65, 1000, 5000, 50_000])
def test_decode_picture_refuses_a_scan_bomb_before_decoding(scans, monkeypatch):
    data = scan_bomb(scans)
    monkeypatch.setattr(sandbox, "decode", None)
    started = time.thread_time()  # of this thread: servers of other tests may be at work
    assert verdict(data) == "the JPEG has more than 64 scans"
    assert time.thread_time() - started < 0.05


def test_decode_picture_would_take_long_over_a_scan_bomb_without_that(monkeypatch):
    monkeypatch.setattr(pictures, "has_too_many_scans", lambda _: False)
    monkeypatch.setattr(pictures, "_LIMITS", sandbox.Limits(wall_s=1.0, cpu_s=1))
    assert verdict(scan_bomb(5000)) == "the picture takes too long to decode"


@pytest.mark.soak
def test_child_ends_a_scan_bomb_within_its_limits_without_that(monkeypatch, figure: Figure):
    monkeypatch.setattr(pictures, "has_too_many_scans", lambda _: False)
    data = scan_bomb(50_000)
    started = time.monotonic()
    assert verdict(data) == "the picture takes too long to decode"
    seconds = time.monotonic() - started
    figure("a JPEG of 50,000 scans without the scan count", Worst(seconds, "s", 5.5))
    assert 4.5 < seconds < 5.5


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


def dear_png() -> bytes:
    """134 MB of samples in seven passes, each row filtered by the dearest filter (4: Paeth)."""
    noise = b"\4" + np.random.default_rng(0).bytes(16_383)
    rows = b""
    for top, left, down, right in decode_child.ADAM7:
        columns = len(range(left, 4096, right))
        row = (noise * 3)[: 1 + 8 * columns]
        rows += row * len(range(top, 4096, down))
    return png(4096, 4096, rows, depth=16, colour=6, interlace=1)


WORST = {
    "png": lambda: save(photo(4096, 4096), "PNG", compress_level=1),
    "png of 16-bit rgba, interlaced": dear_png,
    "webp lossless with alpha": lambda: save(photo(4096, 4096).convert("RGBA"), "WEBP", lossless=True, method=0),
    "jpeg progressive": lambda: save(photo(4096, 4096), "JPEG", progressive=True, quality=100),
    "jpeg of 64 scans": lambda: scan_bomb(64),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", WORST)
def test_worst_pictures_are_decoded_or_refused_in_time(name, figure: Figure):
    data = WORST[name]()
    started = time.monotonic()
    assert verdict(data) in (None, "the picture takes too long to decode")
    seconds = time.monotonic() - started
    figure("the worst pictures within the limits", Worst(seconds, "s", 5.5))
    assert seconds < 5.5


def test_decode_picture_calls_it_damaged_when_the_child_gives_a_reason_that_pictures_do_not_have(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text('print(\'{"refused": "codec"}\')')
    monkeypatch.setattr(spares, "CHILD", child)
    assert verdict(save(photo(), "PNG")) == DAMAGED


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
        found = np.asarray(Image.open(BytesIO(encode_picture(QUARTERS, output_format, 95))).convert("RGB")).astype(int)
        errors[output_format] = np.abs(found - np.asarray(QUARTERS).astype(int)).mean()
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


def test_write_picture_says_when_the_disk_is_full(tmp_path):
    (tmp_path / "image_0.png").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"^the worker's disk is full$"):
        write_picture(np.asarray(photo()), tmp_path / "image_0", "png", 90)


def test_write_picture_sees_a_file_that_was_broken_on_the_disk(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    whole = encode_picture(Image.fromarray(noise), "png", 90)
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    monkeypatch.setattr(Path, "read_bytes", lambda _: whole[:second] + b"\0\0\0\0" + whole[second + 4 :])
    with pytest.raises(EncodingFailed, match="could not be written"):
        write_picture(noise, tmp_path / "image_0", "png", 90)


def test_write_picture_sees_a_file_that_does_not_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda _: save(photo(16, 16), "PNG"))
    with pytest.raises(EncodingFailed, match="does not hold the picture"):
        write_picture(np.asarray(photo()), tmp_path / "image_0", "png", 90)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 16), (480, 832), (64, 16), (33, 47)])
def test_fit_picture_gives_exactly_the_size(height, width):
    assert fit_picture(QUARTERS, height, width).size == (width, height)


def test_fit_picture_cuts_the_middle_out_without_distorting():
    stripes = Image.fromarray(
        np.repeat([[[255, 0, 0]] * 20 + [[0, 255, 0]] * 40 + [[0, 0, 255]] * 20], 40, axis=0).astype(np.uint8)
    )
    assert fit_picture(stripes, 40, 40).getcolors() == [(1600, (0, 255, 0))]


def test_fit_picture_leaves_a_fitting_picture_alone():
    assert fit_picture(QUARTERS, 32, 48).tobytes() == QUARTERS.tobytes()
