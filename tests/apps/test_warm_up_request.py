"""The request that a worker gives itself before it takes any."""

import pytest

from apps.warm_up_request import warm_up_request
from engine import inputs
from engine.demand import demand
from engine.geometry import VideoShape
from engine.profiles import resolve
from engine.settings import MODES, Settings
from schemas.input_schema import parse_request


@pytest.mark.parametrize("mode", MODES)
def test_request_is_taken_as_a_callers_would_be(mode: str) -> None:
    request = parse_request(warm_up_request(mode))
    assert request.mode == mode
    pictures = inputs.load(request, Settings(), lambda: None).pictures
    assert {picture.size for picture in pictures.values()} <= {(832, 480)}


@pytest.mark.parametrize(
    ("mode", "shape", "forwards"),
    [
        ("image", VideoShape(1, 1024, 1024), 8),  # two of each UNet, guided
        ("video", VideoShape(81, 480, 832), 4),  # two, guided
        ("svi_endframe", VideoShape(81, 480, 832), 2),  # one of each expert
    ],
)
def test_request_has_the_size_of_a_default_one_and_few_forwards(mode: str, shape: VideoShape, forwards: int) -> None:
    request = parse_request(warm_up_request(mode))
    wanted = demand(request, resolve(request))
    assert wanted is not None
    assert (wanted.shape, wanted.forwards) == (shape, forwards)
    assert not request.given("height", "width", "resolution", "num_frames", "video_length")
