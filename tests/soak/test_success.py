"""The judge of the long runs: it must see a success that is none."""

import io

import pytest
from PIL import Image

from tests.soak.success import is_true, key_of

PICTURE = io.BytesIO()
Image.new("RGB", (4, 2)).save(PICTURE, "PNG")
BODY = PICTURE.getvalue()
OUTPUT = {
    "image_url": "http://store:9000/bucket/worker/ab/image-0.png?X-Amz-Signature=x",
    "content_type": "image/png",
    "size_bytes": len(BODY),
    "width": 4,
    "height": 2,
}
VIDEO = OUTPUT | {"content_type": "video/mp4", "num_frames": 1}


def test_is_true_believes_the_object_that_is_there() -> None:
    assert key_of(OUTPUT) == "worker/ab/image-0.png"
    assert is_true(OUTPUT, {"worker/ab/image-0.png": BODY})


@pytest.mark.parametrize(
    ("output", "body"),
    [
        (OUTPUT, None),
        (OUTPUT, BODY[:-1]),
        (OUTPUT, bytes(len(BODY))),
        (OUTPUT | {"width": 5}, BODY),
        (VIDEO, BODY[:10] + bytes(len(BODY) - 10)),
        (VIDEO | {"num_frames": 2}, BODY),
    ],
    ids=["missing", "short", "no picture", "another size", "no video", "too few frames"],
)
def test_is_true_sees_an_object_that_is_not_what_was_said(output: dict, body: bytes | None) -> None:
    assert not is_true(output, {} if body is None else {"worker/ab/image-0.png": body})
