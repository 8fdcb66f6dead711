import threading

import numpy as np
import pytest
import torch
from PIL import Image

from engine import svi_scene
from engine.pictures import fit_picture
from engine.svi_scene import read_scene
from schemas.errors import InvalidInput
from schemas.input_schema import parse_request
from tests.engine.svi_parts import picture

GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def request(**fields):
    return parse_request({"mode": "svi_endframe", "image_start": "data:,x", "image_end": "data:,x", **fields})


def scene(pictures, **fields):
    return read_scene(request(**fields), {"image_end": GREY, **pictures}, 32, 48)


def test_pixels_run_from_minus_one_to_one_with_red_first():
    red = Image.new("RGB", (48, 32), (255, 0, 127))
    pixels = scene({"image_start": red}).given.start

    assert pixels.shape == (1, 3, 1, 32, 48)
    assert pixels.dtype == torch.float32
    assert pixels[0, :, 0, 0, 0].tolist() == pytest.approx([1.0, -1.0, 2 * 127 / 255 - 1], abs=1e-7)


def test_every_picture_gets_the_same_cut():
    bars = np.zeros((64, 64, 3), np.uint8)
    bars[11:53] = 255  # 64x64 fills 48 wide and loses (48 - 32) / 2 rows above and below: 10.7 of 64
    image = Image.fromarray(bars)

    given = read_scene(request(), {"image_start": image, "image_refs": [image], "image_end": image}, 32, 48).given

    assert torch.equal(given.start, given.end)
    assert torch.equal(given.start, given.anchor)
    assert given.start[..., 2:-2, :].min() > 0.9


def test_anchor_is_the_start_unless_image_refs_names_another():
    start, other = picture(1, 32, 48), picture(2, 32, 48)

    assert torch.equal(scene({"image_start": start}).given.anchor, scene({"image_start": start}).given.start)
    both = scene({"image_start": start, "image_refs": [other]}).given
    assert torch.equal(both.anchor, scene({"image_start": other}).given.start)
    assert not torch.equal(both.anchor, both.start)


def test_anchor_is_one_frame_also_where_the_start_is_several():
    given = scene({"image_start": [picture(1), picture(2)]}, layout="flf").given

    assert given.anchor.shape[2] == 1
    assert given.start.shape[2] == 2


def test_prefix_alone_gives_anchor_and_motion_frames():
    past = [picture(seed, 32, 48) for seed in range(12)]
    found = scene({"prefix_video": past})

    assert found.prefix.shape[2] == 9
    assert torch.equal(found.given.anchor, scene({"image_start": past[3]}).given.start)


def test_prefix_gives_the_pixel_layouts_its_last_frames_as_start():
    past = [picture(seed, 32, 48) for seed in range(12)]
    found = scene({"image_start": GREY, "prefix_video": past}, layout="svi_pixel4", prefix_video="data:,x")

    assert found.prefix is None
    assert torch.equal(found.given.start, scene({"image_start": past[8:]}).given.start)


def test_nothing_to_start_on_is_refused():
    with pytest.raises(InvalidInput, match="image_start: is missing"):
        scene({})


def test_pictures_are_fitted_beside_each_other(monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def fit(image, height, width):
        both.wait()  # one after the other would break it
        return fit_picture(image, height, width)

    monkeypatch.setattr(svi_scene, "fit_picture", fit)
    assert scene({"image_start": GREY}).given.end is not None


def test_picture_that_cannot_be_fitted_ends_the_job_and_leaves_no_thread(monkeypatch):
    def fit(image, height, width):
        raise MemoryError("no room")

    monkeypatch.setattr(svi_scene, "fit_picture", fit)
    with pytest.raises(MemoryError, match="no room"):
        scene({"image_start": GREY})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fitting")]
