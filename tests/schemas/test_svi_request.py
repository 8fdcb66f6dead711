"""`svi_endframe`: the paper's task, other names of fields, and what must go together."""

from typing import Any

import pytest

from schemas.errors import InvalidInput
from schemas.input_schema import SviEndframeRequest, parse_request
from tests.schemas.payloads import LEAST, PAPER_TASK

PADDING = "svi_pad_empty_frames_with_anchor"
LEAST_SVI = LEAST["svi_endframe"]


def parse(**fields: Any) -> SviEndframeRequest:
    request = parse_request({**LEAST_SVI, **fields})
    assert isinstance(request, SviEndframeRequest)
    return request


def problems_of(**fields: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_request({**LEAST_SVI, **fields})
    return [str(problem) for problem in caught.value.problems]


def test_task_of_the_paper_works_unchanged() -> None:
    request = parse_request(PAPER_TASK)
    assert isinstance(request, SviEndframeRequest)
    assert (request.size, request.total_frames, request.chosen_layout) == ((576, 768), 81, "svi_latent")
    assert request.image_refs == ("https://your-bucket.supabase.co/path/to/start.png",)
    assert request.warnings() == ["video_prompt_type has no effect: image_refs always counts"]


def test_alternative_task_of_the_paper_works_unchanged() -> None:
    request = parse(model_type="wan_2_2_i2v_lightning_svi_endframe", svi2pro=False, prompt="x")
    assert (request.chosen_layout, request.warnings()) == ("flf", [])


@pytest.mark.parametrize(
    ("alias", "value", "field", "meant"),
    [
        ("num_frames", 77, "video_length", 77),
        ("guidance_scale_2", 2, "guidance2_scale", 2.0),
        ("lora_multipliers", "1;0 0;1", "loras_multipliers", ("1;0", "0;1")),
        ("svi_empty_frames_mode", "noise", "empty_frames", "noise"),
        ("svi_pad_empty_frames_with_anchor", True, "empty_frames", "anchor"),
        ("svi_pad_empty_frames_with_anchor", False, "empty_frames", "zeros"),
    ],
)
def test_alias_means_its_field(alias: str, value: Any, field: str, meant: Any) -> None:
    assert getattr(parse(**{alias: value}), field) == meant


def test_width_and_height_mean_resolution() -> None:
    assert parse(width=832, height=480).size == (480, 832)
    assert parse().size is None


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        (
            {"num_frames": 81, "video_length": 81},
            ["num_frames: means the same as video_length, which is given too; keep one"],
        ),
        (
            {"width": 832, "height": 480, "resolution": "832x480"},
            [
                "width: means the same as resolution, which is given too; keep one",
                "height: means the same as resolution, which is given too; keep one",
            ],
        ),
        ({"width": 832}, ["width: is half of a size; give width and height, or resolution"]),
        (
            {"width": 830, "height": True},
            [
                "width: must be a multiple of 16, got 830; the nearest are 816 and 832",
                "height: must be a whole number, got true",
            ],
        ),
        (
            {"svi_pad_empty_frames_with_anchor": True, "svi_empty_frames_mode": "zeros"},
            [PADDING + ": means the same as empty_frames, which is given too; keep one"],
        ),
        (
            {"svi_pad_empty_frames_with_anchor": 1},
            ["svi_pad_empty_frames_with_anchor: must be true or false, got 1"],
        ),
        ({"num_frames": 80}, ["num_frames: must be 4k + 1, got 80; the nearest are 77 and 81"]),
        (
            {"lora_multipliers": ["1;0", "x"]},
            ['lora_multipliers[1]: must be one strength, or one for each phase as in "1.2;0", got "x"'],
        ),
    ],
)
def test_wrong_alias_is_named_as_the_caller_named_it(fields: dict[str, Any], sentences: list[str]) -> None:
    assert problems_of(**fields) == sentences


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"image_start": None},
            "image_start: is missing; give the start picture, image_refs or prefix_video",
        ),
        (
            {"image_end": None},
            "image_end: is missing; layout svi_latent ends on it (layout svi ends where it will)",
        ),
        (
            {"image_end": None, "svi2pro": False},
            "image_end: is missing; layout flf ends on it (layout svi ends where it will)",
        ),
        (
            {"layout": "svi"},
            "image_end: has no place in layout svi, which has no end; leave one of the two out",
        ),
        (
            {"layout": "svi_latent", "svi2pro": False},
            "layout: svi_latent is one of SVI's layouts, and svi2pro is false; leave one of the two out",
        ),
        (
            {"layout": "flf", "svi2pro": True},
            "layout: flf is none of SVI's layouts, and svi2pro is true; leave one of the two out",
        ),
        (
            {"image_start": ["a", "b", "c"]},
            "image_start: must be one picture in layout svi_latent, got 3; layouts for several: svi_pixel4, "
            "flf, kijai_end; or give prefix_video",
        ),
        (
            {"state": "aaaa", "prefix_video": "aaaa"},
            "state: and prefix_video both say what the video goes on from; leave one of the two out",
        ),
        (
            {"layout": "flf", "state": "aaaa"},
            "layout: flf makes one clip of at most 81 frames, and neither takes nor returns a state; "
            "for more: svi, svi_latent, svi_upstream",
        ),
        (
            {"layout": "flf", "video_length": 85},
            "layout: flf makes one clip of at most 81 frames, and neither takes nor returns a state; "
            "for more: svi, svi_latent, svi_upstream",
        ),
        (
            {"segments": 2, "video_length": 233},
            "segments: must be 3 to 16 for 233 frames, got 2; a clip has at most 81",
        ),
        (
            {"segments": 2, "video_length": 9},
            "segments: must be 1 to 1 for 9 frames, got 2; a clip has at most 81",
        ),
        (
            {"video_length": 1221, "overlap": 20},
            "video_length: must be at most 981 with overlap 20, got 1221: a video has at most 16 clips",
        ),
        (
            {"state": "aaaa", "video_length": 5},
            "video_length: must be at least 9, got 5: 5 frames repeat what was before",
        ),
        ({"prompt": "a", "prompts": ["b"]}, "prompts: and prompt are both given; keep one"),
        (
            {"prompts": ["a", "b", "c"]},
            "prompts: must be at most one for each of 1 clips, got 3; set segments to 3",
        ),
        (
            {"prompts": ["a", "b", "c"], "video_length": 13},
            "prompts: must be at most one for each of 1 clips, got 3; 13 frames make at most 2",
        ),
        (
            {"prompts": ["a", "b"], "layout": "flf"},
            "prompts: must be at most one for each of 1 clips, got 2: layout flf makes one clip",
        ),
        ({"high_steps": 2}, "high_steps: and low_steps go together; give both or neither"),
        (
            {"high_steps": 60, "low_steps": 60},
            "high_steps: and low_steps must be at most 100 together, got 60 + 60",
        ),
        (
            {"image_start": ["a"] * 5, "layout": "flf", "video_length": 5},
            "image_start: must be at most 4 of the 5 frames in layout flf, got 5 pictures",
        ),
        (
            {"image_start": ["a"] * 6, "layout": "svi_pixel4", "num_frames": 9},
            "image_start: must be at most 5 of the 9 frames in layout svi_pixel4, got 6 pictures",
        ),
        (
            {"image_start": ["a"] * 6, "layout": "kijai_end", "video_length": 5},
            "image_start: must be at most 5 of the 5 frames in layout kijai_end, got 6 pictures",
        ),
        (
            {"high_steps": 2, "low_steps": 4, "num_inference_steps": 8},
            "num_inference_steps: must be 2 + 4 = 6 as high_steps and low_steps say, got 8",
        ),
        (
            {"high_steps": 2, "low_steps": 4, "switch_threshold": 883},
            "switch_threshold: and high_steps with low_steps both say where the experts change; leave one "
            "of the two out",
        ),
        (
            {"layout": "flf", "lock_end": True},
            "lock_end: must be left out: layout flf does not decode its end alone",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], sentence: str) -> None:
    assert problems_of(**fields) == [sentence]


@pytest.mark.parametrize(
    "fields",
    [
        {"image_start": None, "image_refs": ["a"]},
        {"image_start": None, "prefix_video": "a"},
        {"image_end": None, "layout": "svi"},
        {"layout": "svi_pixel4", "svi2pro": True},
        {"image_start": ["a", "b", "c"], "layout": "svi_pixel4"},
        {"image_start": ["a"]},
        {"state": "aaaa", "video_length": 9},
        {"layout": "flf", "video_length": 81, "segments": 1},
        {"layout": "flf", "prefix_video": "a"},
        {"segments": 16},
        {"segments": 16, "video_length": 233},
        {"video_length": 981, "overlap": 20},
        {"prompts": ["a", "b", "c"], "segments": 3},
        {"prompts": ["a"], "segments": 3},
        {"prompts": ["a", "b"], "segments": 2, "video_length": 13},
        {"high_steps": 2, "low_steps": 4, "num_inference_steps": 6},
        {"high_steps": 1, "low_steps": 99},
        {"image_start": ["a"] * 5, "layout": "kijai_end", "video_length": 5},
        {"image_start": ["a"] * 9, "layout": "flf", "video_length": 9, "prefix_video": "a"},
        {"layout": "kijai_end", "lock_end": True},
        {"layout": "flf", "lock_end": False},
    ],
)
def test_fields_that_do_go_together_are_taken(fields: dict[str, Any]) -> None:
    assert parse(**fields).mode == "svi_endframe"


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({}, "svi_latent"),
        ({"svi2pro": True}, "svi_latent"),
        ({"svi2pro": False}, "flf"),
        ({"model_type": "wan_2_2_i2v_lightning_svi_endframe"}, "flf"),
        ({"model_type": "wan_2_2_i2v_lightning_svi_endframe", "svi2pro": True}, "svi_latent"),
        ({"layout": "kijai_end", "svi2pro": False}, "kijai_end"),
    ],
)
def test_chosen_layout(fields: dict[str, Any], layout: str) -> None:
    assert parse(**fields).chosen_layout == layout


@pytest.mark.parametrize(
    ("fields", "frames", "clips"),
    [
        ({}, 81, 1),
        ({"video_length": 85}, 85, 2),
        ({"video_length": 157}, 157, 2),
        ({"video_length": 161}, 161, 3),
        ({"video_length": 233}, 233, 3),
        ({"video_length": 1221}, 1221, 16),
        ({"segments": 1}, 81, 1),
        ({"segments": 3}, 233, 3),
        ({"segments": 16}, 1221, 16),
        ({"segments": 3, "overlap": 8}, 225, 3),
        ({"segments": 4, "video_length": 161}, 161, 4),
    ],
)
def test_length_and_clips(fields: dict[str, Any], frames: int, clips: int) -> None:
    request = parse(**fields)
    assert (request.total_frames, request.clip_count) == (frames, clips)


def test_last_prompt_holds_for_further_clips() -> None:
    assert parse(prompts=["a", "b"], segments=4).clip_prompts == ("a", "b", "b", "b")
    assert parse(prompt="a", segments=3).clip_prompts == ("a", "a", "a")


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("1;0 0;1 1.2;0 0;1", ("1;0", "0;1", "1.2;0", "0;1")),
        (["1;0", 1, 0.5, "-.5"], ("1;0", "1", "0.5", "-.5")),
        ("1", ("1",)),
    ],
)
def test_lora_multipliers_have_one_form(value: Any, meant: tuple[str, ...]) -> None:
    assert parse(loras_multipliers=value).loras_multipliers == meant


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"prompt": ""}, "prompt is empty: only the pictures lead the video"),
        (
            {"image_refs": ["b"]},
            "layout svi_latent starts on the anchor in image_refs, not on image_start",
        ),
        (
            {"image_refs": ["b"], "layout": "flf"},
            "layout flf starts on image_start, not on the anchor in image_refs",
        ),
        (
            {"svi_pad_empty_frames_with_anchor": True},
            "empty_frames anchor is known to repeat the first frame; SVI Pro was trained on zeros",
        ),
        (
            {"frame_policy": "window", "layout": "flf"},
            "frame_policy has no effect: layout flf always returns what was asked for",
        ),
        (
            {"layout": "flf", "prefix_video": "v"},
            "layout flf starts on the newest frames of prefix_video, not on image_start",
        ),
        (
            {"layout": "kijai_end", "prefix_video": "v", "image_refs": ["b"]},
            "layout kijai_end starts on the newest frames of prefix_video, not on image_start or image_refs",
        ),
        ({"overlap": 8}, "overlap has no effect on a single clip"),
        (
            {"negative_prompt": "x", "guidance_scale": 1, "guidance2_scale": 1},
            "negative_prompt has no effect where both guidance scales are 1 or less",
        ),
    ],
)
def test_what_is_legal_and_may_surprise_is_said(fields: dict[str, Any], warning: str) -> None:
    assert parse(**{"prompt": "x", **fields}).warnings() == [warning]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_refs": [LEAST_SVI["image_start"]]},
        {"frame_policy": "window"},
        {"overlap": 8, "segments": 2},
        {"overlap": 8, "return_state": True},
        {"layout": "flf", "prefix_video": "v", "image_start": None},
        {"prefix_video": "v"},
        {"negative_prompt": "x", "guidance_scale": 3, "guidance2_scale": 1},
        {"negative_prompt": "x"},
    ],
)
def test_an_ordinary_request_earns_no_warning(fields: dict[str, Any]) -> None:
    assert parse(prompt="x", **fields).warnings() == []


def test_explicit_says_the_length_that_segments_mean() -> None:
    explicit = parse(segments=3, prompts=["a"]).explicit()
    assert (explicit["video_length"], explicit["segments"], explicit["prompt"]) == (233, 3, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ["a", "b"], "segments": 2},
        {"prompts": ["a"]},
        {"segments": 16, "overlap": 20},
        {"high_steps": 1, "low_steps": 99},
        {"loras_multipliers": "1;0 0;1 1.2;0 0;1", "seed": -1},
    ],
)
def test_filled_takes_every_request_that_the_parser_takes(fields: dict[str, Any]) -> None:
    request = parse(**fields)
    filled = request.filled({"num_inference_steps": 6, "switch_threshold": 883.0, "resolution": "832x480"})
    assert (filled.resolution, filled.seed) == ("832x480", None)
    assert (filled.total_frames, filled.clip_count) == (request.total_frames, request.clip_count)
    assert filled.clip_prompts == request.clip_prompts
    assert filled.given(*fields) == request.given(*fields)


def test_filled_keeps_the_callers_own_split() -> None:
    profile = {"num_inference_steps": 6, "switch_threshold": 883.0, "flow_shift": 5.0}
    request = parse(high_steps=3, low_steps=4).filled(profile)
    assert (request.num_inference_steps, request.switch_threshold, request.flow_shift) == (7, None, 5.0)
