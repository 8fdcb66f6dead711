"""What a finished job answers."""

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from engine.backends import Task
from engine.outputs import MediaFile
from engine.profiles import PROFILES
from schemas.input_schema import parse_request
from schemas.output_schema import WORKER_VERSION, success
from tests.schemas.payloads import LEAST

ROOT = Path(__file__).resolve().parents[2]
VIDEO = MediaFile(Path("video.mp4"), "video/mp4", 480, 832, 81, 1_000_000, "ab" * 32, fps=16.0, duration_s=5.0625)
PNG = MediaFile(Path("image_0.png"), "image/png", 1024, 1024, 1, 500_000, "cd" * 32)


@dataclass(frozen=True)
class Made:
    files: tuple[MediaFile, ...]
    notes: tuple[str, ...] = ()
    state: str | None = None


@dataclass(frozen=True)
class Place:
    url: str


def answer(payload: dict[str, Any], profile: str, made: Made, **options: Any) -> dict[str, Any]:
    task = Task(PROFILES[profile], parse_request(payload), seed=7)
    places = [Place(f"https://store/{i}") for i in range(len(made.files))]
    hashes = {"image_url": "aa", "image_start": "aa", "image_end": "bb"}
    return success(task, made, places, hashes, options.get("timings_s", {"denoise": 1.5}))


def test_image_answers_what_worker_sdxl_answers_and_more() -> None:
    response = answer(
        {"prompt": "x", "num_images": 2, "quality": 5}, "sdxl", Made((PNG, PNG), notes=("cut at 77 tokens",))
    )
    effective = response.pop("effective")
    assert (effective["mode"], effective["seed"], effective["num_images"]) == ("image", 7, 2)
    assert response == {
        "mode": "image",
        "profile": "sdxl",
        "seed": 7,
        "width": 1024,
        "height": 1024,
        "size_bytes": 1_000_000,
        "content_type": "image/png",
        "warnings": ["quality has no effect on png", "cut at 77 tokens"],
        "timings_s": {"denoise": 1.5},
        "worker_version": "0.1.0",
        "image_url": "https://store/0",
        "images": ["https://store/0", "https://store/1"],
    }


def test_video_answers_what_was_measured() -> None:
    response = answer({**LEAST["video"], "prompt": "x"}, "wan21_i2v_480p", Made((VIDEO,)))
    effective = response.pop("effective")
    assert (effective["image_url"], effective["height"], effective["width"]) == ("sha256:aa", 480, 832)
    assert response == {
        "mode": "video",
        "profile": "wan21_i2v_480p",
        "seed": 7,
        "width": 832,
        "height": 480,
        "size_bytes": 1_000_000,
        "content_type": "video/mp4",
        "warnings": [],
        "timings_s": {"denoise": 1.5},
        "worker_version": "0.1.0",
        "video_url": "https://store/0",
        "num_frames": 81,
        "frames_requested": 81,
        "fps": 16.0,
        "duration_s": 5.0625,
    }


def test_svi_says_frames_asked_for_and_got_and_how_it_ran() -> None:
    payload = {
        **LEAST["svi_endframe"],
        "prompt": "x",
        "negative_prompt": "y",
        "segments": 2,
        "frame_policy": "window",
    }
    made = Made((replace(VIDEO, frames=154),), state="U1ZJUw==")
    response = answer({**payload, "return_state": True}, "wan_2_2_i2v_lightning_svi_3_3", made)
    assert (response["num_frames"], response["frames_requested"], response["state"]) == (154, 157, "U1ZJUw==")
    assert response["warnings"] == ["negative_prompt has no effect where both guidance scales are 1 or less"]
    effective = response["effective"]
    assert {name: effective[name] for name in ("video_length", "segments", "layout", "resolution", "flow_shift")} == {
        "video_length": 157,
        "segments": 2,
        "layout": "svi_latent",
        "resolution": "832x480",
        "flow_shift": 5.0,
    }
    assert (effective["num_inference_steps"], effective["switch_threshold"]) == (6, 883.0)
    assert (effective["guidance_scale"], effective["guidance2_scale"]) == (1.0, 1.0)


def test_effective_of_a_response_is_a_request_again() -> None:
    response = answer(LEAST["svi_endframe"], "wan_2_2_i2v_lightning_svi_endframe", Made((VIDEO,)))
    again = parse_request({**response["effective"], "image_start": "a", "image_end": "b"})
    assert again.explicit() == {**response["effective"], "image_start": "a", "image_end": "b"}


def test_chain_with_a_prompt_for_each_clip_is_answered_and_its_effective_is_a_request_again() -> None:
    payload = {**LEAST["svi_endframe"], "prompts": ["dusk falls", "the stars come out"], "segments": 2}
    response = answer(payload, "wan_2_2_i2v_lightning_svi_3_3", Made((replace(VIDEO, frames=157),)))
    assert response["effective"]["prompts"] == ["dusk falls", "the stars come out"]
    assert response["warnings"] == []
    again = parse_request({**response["effective"], "image_start": "a", "image_end": "b"})
    assert again.explicit() == {**response["effective"], "image_start": "a", "image_end": "b"}


@pytest.mark.parametrize("mode", ["video", "svi_endframe"])
def test_size_that_no_request_may_ask_for_stays_open(mode: str) -> None:
    profile = {"video": "wan21_i2v_480p", "svi_endframe": "wan_2_2_i2v_lightning_svi_3_3"}[mode]
    effective = answer(LEAST[mode], profile, Made((replace(VIDEO, height=16, width=6400),)))["effective"]
    assert [effective.get(name) for name in ("height", "width", "resolution")] == [None, None, None]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_success_refuses_what_is_no_json(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        answer({"prompt": "x"}, "sdxl", Made((PNG,)), timings_s={"denoise": seconds})


def test_success_is_plain_json() -> None:
    response = answer(LEAST["video"], "wan21_i2v_480p", Made((VIDEO,)))
    assert json.loads(json.dumps(response, allow_nan=False)) == response


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == WORKER_VERSION
