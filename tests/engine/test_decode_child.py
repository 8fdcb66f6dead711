"""The decoders of the child: cut and mutated pictures, by the thousand in this process, some in a real child."""

import random
import resource
import zlib

import pytest
from PIL import Image

from engine import decode_child
from engine.pictures import decode_picture
from schemas.errors import InvalidMedia
from tests import zoo
from tests.figures import Count, Figure
from tests.zoo import PNG_MAGIC, chunk, ihdr, photo, save

pytest_plugins = ["tests.figures"]

SENTENCES = {None, zoo.NOT_A_PICTURE, zoo.TOO_LARGE, zoo.TOO_SMALL, zoo.TOO_MANY_SCANS, zoo.DAMAGED, zoo.MEMORY}


@pytest.fixture(autouse=True)
def pixel_limit_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child sets Pillow's limit for its own short life; here it would stay for the tests after this file."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def verdict(data: bytes) -> str | None:
    try:
        decode_picture(data)
    except InvalidMedia as error:
        return error.sentence
    return None


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
    monkeypatch.setattr(decode_child, "png_is_whole", lambda _: True)
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
    "PNG exif": save(
        photo(16, 20), "PNG", exif=b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
    "PNG animated": save(photo(16, 20), "PNG", save_all=True, append_images=[photo(16, 20).rotate(90)]),
    "JPEG exif": save(
        photo(16, 20), "JPEG", exif=b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
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
def test_child_raises_only_from_its_closed_list_for_many_mutants_of(name, figure: Figure):
    assert fuzz(name, 10_000, seed=2) == {True, False}
    figure("mutants of pictures with an exception off the list", Count(0, 10_000))


@pytest.mark.parametrize("name", FUZZED)
def test_decode_picture_answers_mutants_of(name):
    assert {verdict(mutant) for mutant in mutants(FUZZED[name], 3, seed=3)} <= SENTENCES


@pytest.mark.soak
@pytest.mark.parametrize("name", FUZZED)
def test_decode_picture_answers_many_mutants_of(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert {verdict(mutant) for mutant in mutants(FUZZED[name], 200, seed=4)} <= SENTENCES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024
