"""The request that a worker gives itself before it takes any."""

import pytest

from apps.warm_up_request import warm_up_request
from engine import inputs
from engine.profiles import resolve
from engine.settings import MODES, Settings
from schemas.input_schema import parse_request


@pytest.mark.parametrize("mode", MODES)
def test_request_is_taken_as_a_callers_would_be(mode: str) -> None:
    request = parse_request(warm_up_request(mode))
    assert request.mode == mode
    pictures = inputs.load(request, Settings(), lambda: None).pictures
    assert {picture.size for picture in pictures.values()} <= {(832, 480)}


@pytest.mark.parametrize(("mode", "frames"), [("image", 1), ("video", 81), ("svi_endframe", 81)])
def test_request_has_the_size_of_a_default_one(mode: str, frames: int) -> None:
    request = parse_request(warm_up_request(mode))
    assert resolve(request).frames == frames
    assert not request.given("height", "width", "resolution", "num_frames", "video_length")
