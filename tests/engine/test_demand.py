"""What a request asks for, counted from its fields, is what the engine then does."""

from dataclasses import replace

import pytest
import torch

from engine.chain import Wish, plan
from engine.chain_state import ChainState, pack_state
from engine.demand import Demand, Size, demand
from engine.geometry import VideoShape, clip_lengths
from engine.profiles import PROFILES, resolve
from engine.smaller import Ask, fewer_frames, fewer_steps, more_clips, smaller_sizes
from engine.svi_schedule import schedule_for
from schemas.errors import InvalidInput
from schemas.input_schema import parse_request

VIDEO = {"mode": "video", "prompt": "a fox", "image_url": "data:,"}
SVI = {"mode": "svi_endframe", "prompt": "a fox", "image_start": "data:,", "image_end": "data:,"}


def count(payload: dict) -> Demand:
    request = parse_request(payload)
    found = demand(request, resolve(request))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (VIDEO, Demand(VideoShape(81, 480, 832), 80, 81)),
        ({**VIDEO, "guidance_scale": 1, "height": 256, "width": 512}, Demand(VideoShape(81, 256, 512), 40, 81)),
        (SVI, Demand(VideoShape(81, 480, 832), 6, 81)),
        ({**SVI, "model_type": "wan_2_2_i2v_lightning_svi_endframe"}, Demand(VideoShape(81, 480, 832), 8, 81)),
        ({**SVI, "video_length": 157}, Demand(VideoShape(81, 480, 832), 6, 162)),
        ({**SVI, "video_length": 81, "segments": 2}, Demand(VideoShape(45, 480, 832), 6, 86)),
        ({**SVI, "high_steps": 3, "low_steps": 5, "guidance_scale": 2}, Demand(VideoShape(81, 480, 832), 11, 81)),
        ({"prompt": "a fox"}, Demand(VideoShape(1, 1024, 1024), 80)),
        ({"prompt": "a fox", "high_noise_frac": 0.8, "num_images": 2}, Demand(VideoShape(1, 1024, 1024), 60, images=2)),
    ],
)
def test_demand_counts_frames_pictures_and_forwards(payload: dict, expected: Demand) -> None:
    assert count(payload) == expected


def test_work_of_the_default_requests_in_gigapixels() -> None:
    assert count(VIDEO).work_gpx == pytest.approx(2.59, abs=0.01)
    assert count(SVI).work_gpx == pytest.approx(0.194, abs=0.001)
    assert count({"prompt": "a fox"}).work_gpx == pytest.approx(0.084, abs=0.001)


@pytest.mark.parametrize("model_type", ["wan_2_2_i2v_lightning_svi_3_3", "wan_2_2_i2v_lightning_svi_endframe"])
@pytest.mark.parametrize("steps", [2, 3, 6, 17, 50])
@pytest.mark.parametrize("extra", [{}, {"flow_shift": 3.0}, {"guidance_scale": 4.0}, {"guidance2_scale": 2.0}])
def test_forwards_are_those_of_the_schedule(model_type: str, steps: int, extra: dict) -> None:
    payload = {**SVI, "model_type": model_type, "num_inference_steps": steps, **extra}
    request = parse_request(payload)
    try:
        schedule = schedule_for(PROFILES[model_type], request)
    except InvalidInput:  # an expert without a step: refused later, whatever it was counted as
        return
    assert count(payload).forwards == sum(phase.forwards for phase in schedule.phases)


@pytest.mark.parametrize("frames", [5, 81, 85, 157, 161, 401, 1221])
@pytest.mark.parametrize("overlap", [4, 8])
def test_clips_are_those_that_the_chain_makes(frames: int, overlap: int) -> None:
    clips = plan(Wish(frames, ("a fox",), 0, "svi", overlap=overlap))
    assert clip_lengths(frames, len(clips), overlap) == tuple(clip.frames for clip in clips)


def test_more_frames_of_a_chain_never_count_as_a_shorter_clip() -> None:
    longest = [count({**SVI, "video_length": frames}).shape.frames for frames in range(5, 400, 4)]
    assert longest == sorted(longest)


def test_size_of_a_state_counts() -> None:
    state = pack_state(ChainState(torch.zeros(1, 16, 1, 90, 160), 7, 1, bytes(32)))
    assert count({**SVI, "state": state}).shape == VideoShape(81, 720, 1280)


def test_smaller_requests_go_down_from_the_next_one() -> None:
    request = parse_request({**SVI, "resolution": "96x64", "video_length": 13})
    ask, row = Ask(request, Size(64, 96)), resolve(request)
    assert [one.request.video_length for one in fewer_frames(ask, row)] == [9, 5]
    assert next(one.request.segments for one in more_clips(ask, row)) == 2
    assert [one.request.num_inference_steps for one in fewer_steps(ask, row)] == [5, 4, 3, 2]
    assert [one.request.resolution for one in smaller_sizes(ask, replace(row, min_side=32))] == [
        "80x48",
        "64x48",
        "48x32",
    ]
