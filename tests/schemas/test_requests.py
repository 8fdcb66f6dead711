"""What the three requests share: defaults, null, frozen values, media fields, the request as it ran."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.input_schema import INPUT_SCHEMA, effective, media_fields, parse_request, picture_fields
from schemas.request import is_media
from tests.schemas.payloads import FULL, LEAST

LIGHTNING = {**LEAST["video"], "model_type": "wan22_i2v_lightning"}
FREE_NAMES = [(mode, name) for mode, model in INPUT_SCHEMA.items() for name in model.names() if name not in LEAST[mode]]
"""All that the least request of a mode can do without."""


@pytest.mark.parametrize(("mode", "name"), FREE_NAMES)
def test_null_means_the_default(mode: str, name: str) -> None:
    assert parse_request({**LEAST[mode], name: None}) == parse_request(LEAST[mode])


@pytest.mark.parametrize("mode", LEAST)
def test_all_fields_null_are_the_least_request(mode: str) -> None:
    nulls = dict.fromkeys(INPUT_SCHEMA[mode].names())
    assert parse_request({**nulls, **LEAST[mode]}) == parse_request(LEAST[mode])


@pytest.mark.parametrize("mode", FULL)
def test_every_field_reaches_the_request(mode: str) -> None:
    request = parse_request(FULL[mode])
    untouched = {name for name in type(request).model_fields if name not in request.model_fields_set}
    assert untouched <= {"mode", "prompts", "prefix_video", "switch_threshold"}


@pytest.mark.parametrize(
    ("name", "mode"), [("video_generation", "video"), ("i2v", "video"), ("video", "video"), (None, "image")]
)
def test_mode_aliases(name: str | None, mode: str) -> None:
    assert parse_request({**LEAST[mode], "mode": name}).mode == mode


@pytest.mark.parametrize("mode", LEAST)
@pytest.mark.parametrize(("given", "seed"), [(None, None), (-1, None), (0, 0), (2**63 - 1, 2**63 - 1)])
def test_seed(mode: str, given: int | None, seed: int | None) -> None:
    assert parse_request({**LEAST[mode], "seed": given}).seed == seed


def test_video_defaults() -> None:
    request = parse_request(LEAST["video"])
    assert request.explicit() == {
        "mode": "video",
        "model_type": "wan21_i2v_480p",
        "image_url": "iVBORw0KGgo=",
        "prompt": "",
        "negative_prompt": None,
        "num_frames": 81,
        "fps": 16,
        "height": None,
        "width": None,
        "num_inference_steps": 40,
        "guidance_scale": 5.0,
        "seed": None,
    }


def test_video_says_what_has_no_effect() -> None:
    request = parse_request({**LEAST["video"], "negative_prompt": "blur", "guidance_scale": 1})
    assert request.warnings() == [
        "prompt is empty: only the picture leads the clip",
        "negative_prompt has no effect at guidance_scale 1 or less",
    ]


@pytest.mark.parametrize("fields", [{}, {"num_inference_steps": None, "guidance_scale": None}])
def test_lightning_has_defaults_of_its_own_and_they_are_not_given(fields: dict[str, Any]) -> None:
    request = parse_request({**LIGHTNING, **fields})
    assert request.explicit() == {
        **parse_request(LEAST["video"]).explicit(),
        "model_type": "wan22_i2v_lightning",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
    }
    assert request.given("num_inference_steps", "guidance_scale", "model_type") == ["model_type"]


@pytest.mark.parametrize("fields", [{"num_inference_steps": 4}, {"num_inference_steps": 8, "guidance_scale": 1}])
def test_lightning_takes_few_steps_and_no_guidance(fields: dict[str, Any]) -> None:
    request = parse_request({**LIGHTNING, **fields})
    assert request.explicit().items() >= fields.items()
    assert request.given(*fields) == list(fields)


def test_lightning_says_that_nobody_reads_the_negative_prompt() -> None:
    request = parse_request({**LIGHTNING, "prompt": "x", "negative_prompt": "blur"})
    assert request.warnings() == ["negative_prompt has no effect at guidance_scale 1 or less"]


def test_lightning_posted_again_is_the_same_job() -> None:
    first = parse_request({**LIGHTNING, "num_inference_steps": 5})
    again = {**effective(first, 7, {"image_url": "aa"}), "image_url": LEAST["video"]["image_url"]}
    assert parse_request(again).explicit() == {**first.explicit(), "seed": 7}


def test_text_is_taken_as_it_is() -> None:
    decomposed = "cafe\u0301\n\t\r\u202e 🐈"  # neither composed nor trimmed: the tokenizer sees what was written
    assert parse_request({"prompt": f" {decomposed} "}).explicit()["prompt"] == f" {decomposed} "


@pytest.mark.parametrize("mode", FULL)
def test_request_is_frozen_all_through(mode: str) -> None:
    request = parse_request(FULL[mode])
    with pytest.raises(ValidationError):
        request.seed = 1
    hash(request)  # no list inside


def test_request_does_not_take_unknown_fields_past_the_parser() -> None:
    with pytest.raises(ValidationError):
        INPUT_SCHEMA["image"].model_validate({"prompt": "x", "num_frames": 81})


def test_picture_fields_name_what_is_to_be_fetched() -> None:
    payload = {
        **LEAST["svi_endframe"],
        "image_start": ["a", "b"],
        "layout": "flf",
        "prefix_video": "c",
        "image_refs": ["d"],
    }
    request = parse_request(payload)
    assert picture_fields(request) == {
        "image_start": ["a", "b"],
        "image_end": "/9j/4AAQSkZJRg==",
        "image_refs": ["d"],
    }
    assert media_fields(request, "video") == {"prefix_video": "c"}
    assert media_fields(request, "latent") == {}


def test_media_fields_are_marked_in_every_mode() -> None:
    marked = [
        (mode, name) for mode, model in INPUT_SCHEMA.items() for name in model.model_fields if is_media(model, name)
    ]
    assert marked == [
        ("image", "image_url"),
        ("video", "image_url"),
        ("svi_endframe", "image_start"),
        ("svi_endframe", "image_end"),
        ("svi_endframe", "image_refs"),
        ("svi_endframe", "prefix_video"),
        ("svi_endframe", "state"),
    ]


def hashes_of(payload: dict[str, Any]) -> dict[str, str | list[str]]:
    model = INPUT_SCHEMA[parse_request(payload).mode]
    media = {name: payload[name] for name in payload if name in model.model_fields and is_media(model, name)}
    return {name: ["5e" * 32] * len(text) if isinstance(text, list) else "5e" * 32 for name, text in media.items()}


@pytest.mark.parametrize("payload", [*LEAST.values(), *FULL.values()])
def test_effective_makes_the_same_request_again(payload: dict[str, Any]) -> None:
    request = parse_request(payload)
    ran = effective(request, 77, hashes_of(payload))
    media = {name: payload[name] for name in hashes_of(payload)}
    again = parse_request({**ran, **media})
    assert again.explicit() == {**request.explicit(), "seed": 77}
    assert effective(again, 77, hashes_of(payload)) == ran


def test_effective_holds_hashes_in_place_of_media() -> None:
    request = parse_request({**LEAST["svi_endframe"], "image_refs": ["iVBORw0KGgo="]})
    ran = effective(request, 1, {"image_start": "aa", "image_end": "bb", "image_refs": ["aa"]})
    assert (ran["image_start"], ran["image_end"], ran["image_refs"]) == (
        "sha256:aa",
        "sha256:bb",
        ["sha256:aa"],
    )


def test_effective_needs_a_hash_for_each_picture() -> None:
    with pytest.raises(KeyError, match="image_end"):
        effective(parse_request(LEAST["svi_endframe"]), 1, {"image_start": "aa"})


def test_filled_leaves_the_callers_choices_alone() -> None:
    request = parse_request({**LEAST["video"], "height": 480, "width": 832})
    assert request.filled({"height": 64, "width": 64, "negative_prompt": "blur"}).explicit() == {
        **request.explicit(),
        "negative_prompt": "blur",
    }


def test_filled_still_tells_what_the_caller_gave() -> None:
    request = parse_request(LEAST["video"]).filled({"height": 480, "width": 832})
    assert request.given("height", "image_url") == ["image_url"]


def test_filled_refuses_what_the_contract_refuses() -> None:
    with pytest.raises(ValidationError):
        parse_request(LEAST["video"]).filled({"height": 481, "width": 832})


def test_contract_imports_without_the_heavy_libraries() -> None:
    code = (
        "import sys, schemas.input_schema, schemas.output_schema; "
        "print(sorted({'torch', 'numpy', 'PIL', 'engine'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
