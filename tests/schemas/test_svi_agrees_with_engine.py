"""What the contract says about layouts, clips and profiles is what the engine does."""

from typing import Any

import pytest
import torch

from engine.chain import SEED_STRIDE, Wish, plan
from engine.conditioning import LAYOUTS, Given, condition
from engine.geometry import VideoShape
from engine.profiles import PROFILES
from schemas import svi_rules
from schemas.input_schema import SviEndframeRequest, parse_request
from tests.schemas.payloads import LEAST


def test_layouts_are_the_engines() -> None:
    properties = SviEndframeRequest.model_json_schema()["properties"]
    assert properties["layout"]["anyOf"][0]["enum"] == list(LAYOUTS)
    assert tuple(name for name, layout in LAYOUTS.items() if layout.takes_motion) == svi_rules.CHAINABLE
    assert tuple(name for name, layout in LAYOUTS.items() if layout.from_start) == svi_rules.SEVERAL_STARTS
    assert set(svi_rules.END_ALONE) == {name for name, layout in LAYOUTS.items() if layout.end_alone}
    assert [name for name, layout in LAYOUTS.items() if not layout.needs_end] == ["svi"]


def test_windowed_layouts_are_those_whose_first_implementation_returns_other_frames() -> None:
    windowed = {name for name, layout in LAYOUTS.items() if layout.end_alone or layout.window_cut is not None}
    assert set(svi_rules.WINDOWED) == windowed


@pytest.mark.parametrize("layout", svi_rules.SEVERAL_STARTS)
@pytest.mark.parametrize("frames", [5, 9, 13])
def test_as_many_starts_are_taken_as_the_condition_has_room_for(layout: str, frames: int) -> None:
    (clip,) = plan(Wish(frames, ("",), 0, layout))
    most = frames - svi_rules.END_FRAMES[layout]

    def build(starts: int) -> torch.Tensor:
        picture = torch.zeros(1, 3, 1, 8, 8)
        given = Given(picture, picture.expand(-1, -1, starts, -1, -1), picture)
        return condition(layout, clip.latent_frames, given, lambda pixels: torch.zeros(1, 16, shape_of(pixels), 1, 1))

    def shape_of(pixels: torch.Tensor) -> int:
        return VideoShape(pixels.shape[2], 8, 8).latent().frames

    assert build(most).shape[2] == clip.latent_frames
    with pytest.raises(ValueError, match="known start frames and end"):
        build(most + 1)


@pytest.mark.parametrize("model_type", svi_rules.DEFAULT_LAYOUTS)
def test_default_layout_is_the_profiles(model_type: str) -> None:
    assert PROFILES[model_type].layout == svi_rules.DEFAULT_LAYOUTS[model_type]


@pytest.mark.parametrize("model_type", svi_rules.DEFAULT_LAYOUTS)
def test_defaults_named_in_the_descriptions_are_the_profiles(model_type: str) -> None:
    profile = PROFILES[model_type]
    schedule = profile.schedule
    assert (schedule.steps, schedule.flow_shift, schedule.switch_threshold) == (6, 5.0, 883.0)
    assert profile.phases[1].guidance_scale == 1.0


@pytest.mark.parametrize(
    "fields",
    [{"video_length": frames} for frames in (5, 81, 85, 157, 161, 1221)]
    + [{"segments": n, "overlap": overlap} for n in (1, 2, 7, 16) for overlap in (4, 8, 20) if n < 13 or overlap == 4]
    + [{"segments": 4, "video_length": 161}, {"state": "aaaa", "video_length": 9}],
)
def test_chain_is_planned_as_the_request_counts_it(fields: dict[str, Any]) -> None:
    request = parse_request({**LEAST["svi_endframe"], **fields})
    assert isinstance(request, SviEndframeRequest)
    wish = Wish(
        frames=request.total_frames,
        prompts=request.clip_prompts,
        seed=2**63 - 1,
        layout=request.chosen_layout,
        segments=request.segments,
        overlap=request.overlap,
        continues=request.state is not None,
    )
    clips = plan(wish)
    assert len(clips) == request.clip_count
    assert max(clip.seed for clip in clips) < 2**64  # torch takes no larger one
    assert clips[-1].seed == 2**63 - 1 + SEED_STRIDE * (len(clips) - 1)
