"""What the contract says about the profiles of `video` is what the engine's rows say."""

import pytest

from engine.profiles import DEFAULTS, PROFILES, resolve
from schemas.input_schema import VideoRequest, parse_request
from schemas.video_schema import LIGHTNING_STEPS, OWN_DEFAULTS
from tests.schemas.payloads import LEAST

OF_VIDEO = [name for name, row in PROFILES.items() if "video" in row.modes]


def test_model_types_are_the_rows_of_the_mode() -> None:
    properties = VideoRequest.model_json_schema()["properties"]
    assert properties["model_type"]["enum"] == OF_VIDEO
    assert properties["model_type"]["default"] == DEFAULTS["video"].name == "wan21_i2v_480p"


@pytest.mark.parametrize("name", OF_VIDEO)
def test_defaults_are_the_rows(name: str) -> None:
    request = parse_request({**LEAST["video"], "model_type": name})
    assert isinstance(request, VideoRequest)
    row = resolve(request)
    assert row.name == name
    assert request.num_inference_steps == row.schedule.steps
    assert {phase.guidance_scale for phase in row.phases} == {request.guidance_scale}
    assert (request.num_frames, request.fps) == (row.frames, row.fps)


def test_own_defaults_lie_within_their_own_bounds() -> None:
    (own,) = OWN_DEFAULTS.values()
    assert LIGHTNING_STEPS[0] <= own["num_inference_steps"] <= LIGHTNING_STEPS[1]
