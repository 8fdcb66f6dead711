"""The smallest jobs there are: of each mode, of each way to fail, and one that runs until it is stopped."""

import base64
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests import zoo
from tests.conftest import data_uri, photo
from tests.servers.swift import Swift

CANARY = "canary-of-a-fox"
"""In every prompt and every key that a request brings: it may stand in no log."""


@dataclass(frozen=True)
class Job:
    """`code`: how it must be answered, "" with success. `top_level`: what stands beside `input`."""

    payload: Any
    code: str = ""
    top_level: tuple[tuple[str, Any], ...] = ()


@cache
def pictures() -> tuple[str, str]:
    return data_uri(photo(48, 64)), data_uri(photo(48, 64, seed=1), "jpeg")


def good(mode: str, number: int, seed: int | None = None) -> Job:
    """A job of 1 or 2 steps. `number` makes its prompt new, and so its text embeddings."""
    start, end = pictures()
    prompt = {"prompt": f"{CANARY} {number}", "seed": seed}
    image = {"height": 64, "width": 64, "num_inference_steps": 1, "refiner_inference_steps": 4}
    size = {"num_frames": 5, "height": 32, "width": 32}
    return Job({
        "image": prompt | image,
        "video": prompt | size | {"mode": "video", "image_url": start, "num_inference_steps": 1},
        "svi_endframe": prompt
        | size
        | {"mode": "svi_endframe", "image_start": start, "image_end": end, "num_inference_steps": 2},
    }[mode])  # fmt: skip


def endless(number: int) -> Job:
    """A job of minutes, to be stopped."""
    video = good("video", number).payload
    return Job(video | {"num_frames": 49, "height": 96, "width": 96, "num_inference_steps": 500}, code="stopped")


def failing(number: int, swift: Swift, broken_url: str) -> Job:
    """One of five that must fail, each in another part of the worker.

    `broken_url`: a picture server that answers 500.
    """
    video = good("video", number).payload
    cut = base64.b64encode(zoo.save(zoo.photo(), "PNG")[:400]).decode()
    wrong = {
        "accessId": CANARY,
        "accessSecret": CANARY,
        "bucketName": "bucket",
        "endpointUrl": swift.endpoint,
    }
    return (
        Job(video | {"num_frames": 6, "prompt": [CANARY]}, "invalid_input"),
        Job(video | {"image_url": cut}, "invalid_media"),
        Job(video | {"image_url": f"http://169.254.169.254/{CANARY}?X-Amz-Signature={CANARY}"}, "fetch_failed"),
        Job(video | {"image_url": f"{broken_url}?token={CANARY}"}, "fetch_failed"),
        Job(video, "delivery_failed", (("s3Config", wrong),)),
    )[number % 5]
