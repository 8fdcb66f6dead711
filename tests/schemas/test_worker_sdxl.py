"""Everything that clients of runpod-workers/worker-sdxl post goes on working, and means the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import InvalidInput
from schemas.input_schema import ImageRequest, parse_request

ROOT = Path(__file__).resolve().parents[2]
README_EXAMPLE = {
    "prompt": "A majestic steampunk dragon soaring through a cloudy sky, intricate clockwork details, golden "
    "hour lighting, highly detailed",
    "negative_prompt": "blurry, low quality, deformed, ugly, text, watermark, signature",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 25,
    "refiner_inference_steps": 50,
    "guidance_scale": 7.5,
    "strength": 0.3,
    "high_noise_frac": 0.8,
    "seed": 42,
    "scheduler": "K_EULER",
    "num_images": 1,
}
PAYLOADS: dict[str, dict[str, Any]] = {
    "README example": README_EXAMPLE,
    "test_input.json": {**README_EXAMPLE, "image_url": None},
    ".runpod/tests.json": {**README_EXAMPLE, "seed": 1337, "image_url": None},
    "prompt alone": {"prompt": "A cute dog"},
    "picture alone": {"image_url": "https://example.com/dog.png"},
    "picture and prompt": {"image_url": "https://example.com/dog.png", "prompt": "a cat", "strength": 0.5},
    "data URI of the analysis paper": {"image_url": "data:image/jpeg;base64,/9j/4AAQ", "prompt": "a cat"},
    "two images": {"prompt": "x", "num_images": 2},
    "whole number for a fraction": {"prompt": "x", "guidance_scale": 7},
    "empty picture, as forms send it": {"prompt": "x", "image_url": ""},
    "empty prompt": {"prompt": ""},
}

DEFAULTS = {
    "negative_prompt": None,
    "height": 1024,
    "width": 1024,
    "seed": None,
    "scheduler": "DDIM",
    "num_inference_steps": 25,
    "refiner_inference_steps": 50,
    "guidance_scale": 7.5,
    "strength": 0.3,
    "image_url": None,
    "num_images": 1,
    "high_noise_frac": None,
}
"""Source: INPUT_SCHEMA of runpod-workers/worker-sdxl."""


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_payload_of_worker_sdxl_means_the_same(payload: dict[str, Any]) -> None:
    request = parse_request(payload)
    assert isinstance(request, ImageRequest)
    expected = {**DEFAULTS, **{name: value or None for name, value in payload.items() if name == "image_url"}}
    expected |= {name: value for name, value in payload.items() if name != "image_url"}
    assert {name: getattr(request, name) for name in expected} == expected


def test_own_test_input_has_the_shape_of_worker_sdxls() -> None:
    payload = json.loads((ROOT / "test_input.json").read_text())["input"]
    assert set(payload) == set(PAYLOADS["test_input.json"])
    assert parse_request(payload).warnings() == []


@pytest.mark.parametrize("name", ["README example", "test_input.json", ".runpod/tests.json", "prompt alone"])
def test_published_payloads_of_worker_sdxl_earn_no_warning(name: str) -> None:
    assert parse_request(PAYLOADS[name]).warnings() == []


@pytest.mark.parametrize(
    "scheduler",
    ["PNDM", "KLMS", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"],
)
def test_schedulers_of_worker_sdxl_are_taken(scheduler: str) -> None:
    assert parse_request({"prompt": "x", "scheduler": scheduler}).warnings() == []


def test_image_without_prompt_and_picture_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request({"seed": 1, "image_url": ""})
    assert caught.value.sentence == "prompt: is missing; give a prompt, an image_url or both"


@pytest.mark.parametrize(
    ("payload", "splits"),
    [
        ({"high_noise_frac": 0.8}, True),
        ({"high_noise_frac": 0}, False),
        ({"high_noise_frac": 1.0}, False),
        ({"high_noise_frac": 0.8, "image_url": "aaaa"}, False),
        ({}, False),
    ],
)
def test_base_and_refiner_split_one_schedule(payload: dict[str, Any], splits: bool) -> None:
    request = parse_request({"prompt": "x", **payload})
    assert isinstance(request, ImageRequest)
    assert request.splits is splits


def test_strength_that_leaves_no_step_is_fine_where_strength_has_no_effect() -> None:
    assert parse_request({"prompt": "x", "strength": 0, "high_noise_frac": 0.8}).warnings() == [
        "strength has no effect with high_noise_frac: the refiner goes on where the base stopped"
    ]


@pytest.mark.parametrize(
    ("payload", "warnings"),
    [
        (
            {"image_url": "aaaa", "height": 512, "width": 1024, "scheduler": "PNDM"},
            [
                "height has no effect with image_url: only the refiner runs, at the picture's size",
                "scheduler has no effect with image_url: only the refiner runs, at the picture's size",
            ],
        ),
        (
            {"prompt": "x", "high_noise_frac": 1},
            ["high_noise_frac 1 splits nothing: the base runs all its steps"],
        ),
        ({"prompt": "x", "quality": 50}, ["quality has no effect on png"]),
        (
            {"prompt": "x", "negative_prompt": "y", "guidance_scale": 1, "refiner_guidance_scale": 1},
            ["negative_prompt has no effect where guidance is 1 or less in every model that runs"],
        ),
        (
            {"image_url": "aaaa", "negative_prompt": "y", "refiner_guidance_scale": 0},
            ["negative_prompt has no effect where guidance is 1 or less in every model that runs"],
        ),
        ({"prompt": "x", "negative_prompt": "y", "guidance_scale": 1}, []),
        ({"prompt": "x", "guidance_scale": 1, "refiner_guidance_scale": 1}, []),
        ({"prompt": "x", "quality": 50, "output_format": "jpeg"}, []),
    ],
)
def test_fields_without_effect_are_said(payload: dict[str, Any], warnings: list[str]) -> None:
    assert parse_request(payload).warnings() == warnings
