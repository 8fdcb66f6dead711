"""The request that a worker gives itself before it takes any."""

import pytest

from apps.warm_up_request import warm_up_request
from engine import inputs
from engine.demand import demand
from engine.geometry import VideoShape
from engine.profiles import resolve
from engine.settings import MODES, Settings
from schemas.errors import InvalidInput
from schemas.input_schema import parse_request


@pytest.mark.parametrize("mode", MODES)
def test_request_is_taken_as_a_callers_would_be(mode: str) -> None:
    request = parse_request(warm_up_request(mode))
    assert request.mode == mode
    pictures = inputs.load(request, Settings(), lambda: None).pictures
    assert {picture.size for picture in pictures.values()} <= {(832, 480)}


@pytest.mark.parametrize(
    ("wanted", "shape", "forwards"),
    [
        ("image", VideoShape(1, 1024, 1024), 8),  # two of each UNet, guided
        ("video", VideoShape(81, 480, 832), 4),  # two, guided
        ("svi_endframe", VideoShape(81, 480, 832), 2),  # one of each expert
        ("svi_endframe:wan_2_2_i2v_lightning_svi_endframe", VideoShape(81, 480, 832), 3),  # its first is guided
        ("video:wan22_i2v_lightning", VideoShape(81, 480, 832), 4),  # its fewest
    ],
)
def test_request_has_the_size_of_a_default_one_and_few_forwards(wanted: str, shape: VideoShape, forwards: int) -> None:
    request = parse_request(warm_up_request(wanted))
    _, _, model_type = wanted.partition(":")
    assert not model_type or resolve(request).name == model_type
    asked = demand(request, resolve(request))
    assert asked is not None
    assert (asked.shape, asked.forwards) == (shape, forwards)
    assert not request.given("height", "width", "resolution", "num_frames", "video_length")


def test_request_for_a_model_that_its_mode_does_not_have_is_refused_as_a_callers_would_be() -> None:
    with pytest.raises(InvalidInput, match="model_type: must be wan21_i2v_480p or wan22_i2v_lightning"):
        parse_request(warm_up_request("video:wan22_i2v_svi"))
    with pytest.raises(InvalidInput, match="model_type: is not a field of mode image"):
        parse_request(warm_up_request("image:sdxl"))
