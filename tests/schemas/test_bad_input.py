"""What is refused, in the caller's own words: each sentence is written out, since people act on it."""

from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from schemas.errors import InvalidInput
from schemas.input_schema import parse_request
from schemas.sentences import problems_of as problems_of_pydantic
from tests.schemas.payloads import LEAST

FEW = "must be 4 to 8 with model_type wan22_i2v_lightning"
UNGUIDED = "must be 1 with model_type wan22_i2v_lightning"
FIELDS_OF_VIDEO = (
    "the fields of mode video are mode, model_type, image_url, prompt, negative_prompt, num_frames, fps, height, "
    "width, num_inference_steps, guidance_scale, seed"
)


def problems_of(payload: object) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_request(payload)
    return [str(problem) for problem in caught.value.problems]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (None, "the input must be an object, got null"),
        ([], "the input must be an object, got a list of 0"),
        ("a red fox", 'the input must be an object, got "a red fox"'),
        (True, "the input must be an object, got true"),
        (nested(100_000), "the input must be an object, got a list of 1"),
        (float("nan"), "the input must be an object, got nan"),
    ],
    ids=["null", "list", "string", "bool", "deep", "nan"],
)
def test_parse_refuses_what_is_no_object(payload: object, sentence: str) -> None:
    assert problems_of(payload) == [sentence]


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("vidoe", 'mode: must be image, video or svi_endframe, got "vidoe"; did you mean video?'),
        ("txt", 'mode: must be image, video or svi_endframe, got "txt"'),
        (1, "mode: must be image, video or svi_endframe, got 1"),
        (["image"], "mode: must be image, video or svi_endframe, got a list of 1"),
        ("\ud800", 'mode: must be image, video or svi_endframe, got "\\ud800"'),
    ],
)
def test_parse_refuses_an_unknown_mode(mode: object, sentence: str) -> None:
    assert problems_of({"mode": mode, "prompt": "x"}) == [sentence]


BAD_FIELDS: list[tuple[str, str, Any, str]] = [
    ("image", "height", 1001, "height: must be a multiple of 8, got 1001; the nearest are 1000 and 1008"),
    ("image", "width", 16, "width: must be a multiple of 8 from 32 to 4096, got 16"),
    ("image", "width", 10**5000, "width: must be a multiple of 8 from 32 to 4096, got a huge number"),
    ("image", "height", "1024", 'height: must be a whole number, got "1024"'),
    ("image", "height", 1024.0, "height: must be a whole number, got 1024.0"),
    ("image", "height", True, "height: must be a whole number, got true"),
    ("image", "seed", -2, "seed: must be at least -1, got -2"),
    ("image", "seed", 2**63, "seed: must be at most 9223372036854775807, got 9223372036854775808"),
    ("image", "seed", 10**5000, "seed: must be at most 9223372036854775807, got a huge number"),
    ("image", "seed", False, "seed: must be a whole number, got false"),
    ("image", "num_images", 0, "num_images: must be at least 1, got 0"),
    ("image", "num_images", 5, "num_images: must be at most 4, got 5"),
    ("image", "num_inference_steps", 0, "num_inference_steps: must be at least 1, got 0"),
    ("image", "num_inference_steps", 501, "num_inference_steps: must be at most 500, got 501"),
    ("image", "guidance_scale", float("nan"), "guidance_scale: must be a finite number, got nan"),
    ("image", "guidance_scale", float("inf"), "guidance_scale: must be a finite number, got inf"),
    ("image", "guidance_scale", "7.5", 'guidance_scale: must be a number, got "7.5"'),
    ("image", "guidance_scale", True, "guidance_scale: must be a number, got true"),
    ("image", "guidance_scale", 10**400, "guidance_scale: must be a number, got a huge number"),
    ("image", "guidance_scale", -0.5, "guidance_scale: must be at least 0, got -0.5"),
    ("image", "strength", 1.5, "strength: must be at most 1, got 1.5"),
    (
        "image",
        "strength",
        0.01,
        "strength: must leave the refiner a step, got 0.01 of 50 refiner_inference_steps; their product "
        "must be 1 or more",
    ),
    ("image", "high_noise_frac", [0.8], "high_noise_frac: must be a number, got a list of 1"),
    (
        "image",
        "scheduler",
        "EULER",
        "scheduler: must be PNDM, KLMS, DDIM, K_EULER, K_EULER_ANCESTRAL, DPMSolverMultistep or "
        'DPMSolverSinglestep, got "EULER"; did you mean K_EULER?',
    ),
    ("image", "output_format", "gif", 'output_format: must be png, jpeg or webp, got "gif"'),
    ("image", "quality", 0, "quality: must be at least 1, got 0"),
    ("image", "prompt", 5, "prompt: must be a string, got 5"),
    ("image", "prompt", {"secret": 1}, "prompt: must be a string, got an object"),
    ("image", "prompt", b"bytes", "prompt: must be a string, got no JSON value"),
    (
        "image",
        "prompt",
        "x" * 5001,
        "prompt: must have at most 5000 characters, got a string of 5001 characters",
    ),
    ("image", "prompt", "a\0b", "prompt: holds a control character (U+0000) at position 1; remove it"),
    ("image", "prompt", "a\x1bb", "prompt: holds a control character (U+001B) at position 1; remove it"),
    ("image", "prompt", "a\x7f", "prompt: holds a control character (U+007F) at position 1; remove it"),
    (
        "image",
        "prompt",
        "a\ud800",
        "prompt: must be text without half surrogate pairs, got a string of 2 characters",
    ),
    ("image", "prompt", nested(100_000), "prompt: must be a string, got a list of 1"),
    (
        "image",
        "image_url",
        "file:///etc/passwd",
        "image_url: must be an http(s) URL, a data URI or base64, not another kind of address",
    ),
    (
        "video",
        "image_url",
        "sha256:00",
        "image_url: holds only the hash that `effective` shows; put the media itself back in",
    ),
    ("video", "image_url", "", "image_url: must not be empty, got a string of 0 characters"),
    (
        "video",
        "image_url",
        "https://example.com/" + "a" * 8192,
        "image_url: must be a URL of at most 8192 characters, got 8212",
    ),
    ("video", "num_frames", 80, "num_frames: must be 4k + 1, got 80; the nearest are 77 and 81"),
    ("video", "num_frames", 1, "num_frames: must be 4k + 1 from 5 to 161, got 1"),
    ("video", "num_frames", 165, "num_frames: must be 4k + 1 from 5 to 161, got 165"),
    ("video", "fps", 0, "fps: must be at least 1, got 0"),
    ("video", "fps", 29.97, "fps: must be a whole number, got 29.97"),
    (
        "video",
        "width",
        832,
        "height: must come with width; give both, or neither to follow the picture's aspect",
    ),
    (
        "svi_endframe",
        "resolution",
        "768*576",
        'resolution: must be width x height in pixels, such as "832x480", got "768*576"',
    ),
    (
        "svi_endframe",
        "resolution",
        "770x5",
        "resolution: width must be a multiple of 16, got 770; the nearest are 768 and 784; height must be "
        "a multiple of 16 from 32 to 1280, got 5",
    ),
    ("svi_endframe", "image_refs", ["a", "b"], "image_refs: must hold 1 entry, got 2"),
    ("svi_endframe", "image_refs", "a", "image_refs: must be a list, got a string of 1 characters"),
    ("svi_endframe", "image_refs", [5], "image_refs[0]: must be a string, got 5"),
    ("svi_endframe", "image_start", ["a", None], "image_start[1]: must be a string, got null"),
    ("svi_endframe", "image_start", ["a"] * 10, "image_start: must hold 1 to 9 entries, got 10"),
    ("svi_endframe", "overlap", 5, "overlap: must be a multiple of 4, got 5; the nearest are 4 and 8"),
    ("svi_endframe", "svi2pro", "false", 'svi2pro: must be true or false, got "false"'),
    ("svi_endframe", "svi2pro", 0, "svi2pro: must be true or false, got 0"),
    ("svi_endframe", "flow_shift", 0, "flow_shift: must be at least 0.01, got 0"),
    # 1e-17 would be a division by zero on the grid
    ("svi_endframe", "flow_shift", 1e-17, "flow_shift: must be at least 0.01, got 1e-17"),
    ("svi_endframe", "low_steps", 100, "low_steps: must be at most 99, got 100"),
    ("svi_endframe", "state", "not base64!", "state: must be base64, got a string of 11 characters"),
    (
        "svi_endframe",
        "loras_multipliers",
        "1;0 0;1 1.2,0 0;1",
        'loras_multipliers[2]: must be one strength, or one for each phase as in "1.2;0", got "1.2,0"',
    ),
    (
        "svi_endframe",
        "loras_multipliers",
        ["99;0"],
        'loras_multipliers[0]: must stay within -10 and 10, got "99;0"',
    ),
    (
        "svi_endframe",
        "loras_multipliers",
        1.2,
        'loras_multipliers: must be a string such as "1;0 0;1 1.2;0 0;1" or a list of such, got 1.2',
    ),
    ("svi_endframe", "loras_multipliers", [float("nan")], "loras_multipliers[0]: must be a string, got nan"),
]


@pytest.mark.parametrize(
    ("mode", "field", "value", "sentence"),
    BAD_FIELDS,
    ids=[f"{mode}-{field}-{i}" for i, (mode, field, _, _) in enumerate(BAD_FIELDS)],
)
def test_parse_refuses_a_bad_field(mode: str, field: str, value: Any, sentence: str) -> None:
    assert problems_of({**LEAST[mode], field: value}) == [sentence]


@pytest.mark.parametrize("mode", LEAST)
def test_parse_takes_the_request_that_the_bad_fields_are_added_to(mode: str) -> None:
    assert parse_request(LEAST[mode]).mode == mode


@pytest.mark.parametrize(
    ("mode", "field", "sentence"),
    [
        ("video", "num_frmes", "num_frmes: is not a field of mode video; did you mean num_frames?"),
        ("video", "NUM_FRAMES", "NUM_FRAMES: is not a field of mode video; did you mean num_frames?"),
        ("video", "image_end", "image_end: is not a field of mode video; svi_endframe has it"),
        ("video", "last_image", "last_image: is not a field of mode video; svi_endframe has it as image_end"),
        ("video", "scheduler", "scheduler: is not a field of mode video; image has it"),
        ("video", "steps", "steps: is not a field of mode video; did you mean num_inference_steps?"),
        ("image", "num_frames", "num_frames: is not a field of mode image; video and svi_endframe have it"),
        (
            "svi_endframe",
            "image_url",
            "image_url: is not a field of mode svi_endframe; did you mean image_start?",
        ),
        ("svi_endframe", "length", "length: is not a field of mode svi_endframe; did you mean num_frames?"),
    ],
)
def test_parse_names_the_field_that_was_meant(mode: str, field: str, sentence: str) -> None:
    assert problems_of({**LEAST[mode], field: None}) == [sentence]


def test_parse_lists_the_fields_when_nothing_is_near() -> None:
    assert problems_of({**LEAST["video"], "zzz": 1, "fp": 1}) == [
        "zzz: is not a field of mode video",
        "fp: is not a field of mode video; did you mean fps?",
        FIELDS_OF_VIDEO,
    ]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (5, "the name of a field must be a string, got 5"),
        (None, "the name of a field must be a string, got null"),
        ((1, 2), "the name of a field must be a string, got a list of 2"),
        ("a\ud800\n", "a\\ud800\\n: is not a field of mode video"),
        ("x" * 100, "x" * 39 + "…: is not a field of mode video"),
    ],
)
def test_parse_survives_strange_field_names(key: Any, sentence: str) -> None:
    assert problems_of({**LEAST["video"], key: 1}) == [sentence, FIELDS_OF_VIDEO]


def test_parse_counts_the_unknown_fields_after_the_twentieth() -> None:
    found = problems_of({**LEAST["video"], **{f"zzz{i}": i for i in range(1000)}})
    assert found[20:] == ["980 more fields are unknown", FIELDS_OF_VIDEO]


def test_parse_counts_a_long_list_instead_of_describing_it() -> None:
    payload = {**LEAST["svi_endframe"], "prompts": [5] * 100_000}
    assert problems_of(payload) == ["prompts: must hold 1 to 16 entries, got 100000"]


def test_parse_lists_every_problem_at_once() -> None:
    payload = {
        "mode": "video",
        "promt": "x",
        "num_frames": 80,
        "fps": True,
        "width": 64,
        "guidance_scale": "5",
    }
    assert problems_of(payload) == [
        "promt: is not a field of mode video; did you mean prompt?",
        "image_url: is missing",
        "num_frames: must be 4k + 1, got 80; the nearest are 77 and 81",
        "fps: must be a whole number, got true",
        'guidance_scale: must be a number, got "5"',
        "height: must come with width; give both, or neither to follow the picture's aspect",
    ]


def test_parse_leaves_out_rules_about_fields_that_are_wrong_themselves() -> None:
    assert problems_of({"mode": "video", "image_url": "aaaa", "height": "tall", "width": 64}) == [
        'height: must be a whole number, got "tall"'
    ]
    assert problems_of({"prompt": 5}) == ["prompt: must be a string, got 5"]


LIGHTNING = {**LEAST["video"], "model_type": "wan22_i2v_lightning"}


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        ({"num_inference_steps": 3}, [f"num_inference_steps: {FEW}, got 3: it is distilled for few steps"]),
        ({"num_inference_steps": 9}, [f"num_inference_steps: {FEW}, got 9: it is distilled for few steps"]),
        ({"guidance_scale": 0}, [f"guidance_scale: {UNGUIDED}, got 0: guidance is distilled into it; leave it out"]),
        (
            {"num_inference_steps": 40, "guidance_scale": 5.5},
            [
                f"num_inference_steps: {FEW}, got 40: it is distilled for few steps",
                f"guidance_scale: {UNGUIDED}, got 5.5: guidance is distilled into it; leave it out",
            ],
        ),
        ({"num_frames": 6}, ["num_frames: must be 4k + 1, got 6; the nearest are 5 and 9"]),
        ({"guidance_scale": "1"}, ['guidance_scale: must be a number, got "1"']),
        (
            {"fps": 0, "num_inference_steps": 40},
            [
                "fps: must be at least 1, got 0",
                f"num_inference_steps: {FEW}, got 40: it is distilled for few steps",
            ],
        ),
    ],
)
def test_lightning_refuses_many_steps_and_guidance(fields: dict[str, Any], sentences: list[str]) -> None:
    assert problems_of({**LIGHTNING, **fields}) == sentences


@pytest.mark.parametrize("value", ["wan22_i2v_lightening", 5, ["wan22_i2v_lightning"], {}, True])
def test_model_type_of_no_profile_is_one_problem(value: object) -> None:
    (sentence,) = problems_of({**LEAST["video"], "model_type": value})
    assert sentence.startswith("model_type: must be wan21_i2v_480p or wan22_i2v_lightning, got ")


def test_parse_joins_all_problems_in_the_sentence_of_the_error() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request({"prompt": 5, "seed": "x"})
    assert caught.value.sentence == 'prompt: must be a string, got 5; seed: must be a whole number, got "x"'


def test_error_of_a_kind_that_no_sentence_is_written_for_is_still_a_sentence() -> None:
    class Other(BaseModel):
        day: date

    with pytest.raises(ValidationError) as caught:
        Other(day="tomorrow")
    assert list(map(str, problems_of_pydantic(caught.value, Other))) == ['day: is not valid, got "tomorrow"']


def test_parse_never_repeats_a_prompt_or_picture() -> None:
    payload = {
        "prompt": "canary\0",
        "negative_prompt": ["canary"],
        "image_url": "ftp://canary",
        "mode": "image",
    }
    assert not [sentence for sentence in problems_of(payload) if "canary" in sentence]
