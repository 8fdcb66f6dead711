"""The requests that are measured: one a mode, the same for every arm.

Every run has a new prompt and new pictures, so that nothing an arm remembers from the run before makes it look fast.
Pictures are grain, weights are random.
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from bench.work import IMAGE_TOKENS
from engine import profiles, weights
from engine.backends import Task
from engine.geometry import VideoShape
from engine.profile import Profile
from engine.settings import Settings
from engine.weights import MANIFEST, Parts
from schemas.input_schema import parse_request

GIB = 2**30
CAP_GIB = 44.5  # what a 48 GB card leaves to one process with ECC on
SEED = 7
GIVEN = "data:,"  # a picture is handed over beside the request, already decoded
HEAD: dict[str, Any] = {"prompt": "the tide comes in at dusk", "seed": SEED}


@dataclass(frozen=True)
class Job:
    """A request at full size and at a twin's size, and the counts that its arms must agree on."""

    mode: str
    payload: dict[str, Any]
    small: dict[str, Any]
    """What the twin's request says differently."""
    pictures: tuple[str, ...]
    shape: VideoShape
    forwards: int
    """Of the transformers, or of the UNets, guidance included."""
    image_tokens: int = 0

    def take(self, number: int) -> dict[str, Any]:
        """The payload of the job's n-th run: a prompt that nobody has embedded yet."""
        return {**self.payload, "prompt": f"{self.payload['prompt']}, take {number}"}

    def given(self, number: int) -> dict[str, Image.Image]:
        """Its pictures, new ones each time."""
        return {name: picture(100 * number + i, self.shape) for i, name in enumerate(self.pictures)}

    def task(self, profile: Profile, number: int, changes: Mapping[str, Any] = MappingProxyType({})) -> Task:
        return Task(profile, parse_request({**self.take(number), **changes}), SEED, self.given(number))

    def whole(self, number: int, changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The payload as a client posts it, its pictures in it."""
        sent = {name: data_uri(image) for name, image in self.given(number).items()}
        return {**self.take(number), **sent, **changes}

    def changes(self, layout: str | None, steps: int | None, *, is_small: bool = False) -> dict[str, Any]:
        """What a variant's request says differently. `layout`: of LAYOUTS, None where the mode has none.

        Raises:
            ValueError: the mode has no such layout, or no number of steps that could be set.
        """
        if layout is not None and self.mode != "svi_endframe":
            raise ValueError(f"{self.mode} has no layouts")
        if steps is not None and self.mode == "image":
            raise ValueError("image has two numbers of steps; it is measured with its own")
        return {
            **(self.small if is_small else {}),
            **(LAYOUTS[layout] if layout is not None else {}),
            **({"num_inference_steps": steps} if steps is not None else {}),
        }


VIDEO_480P = VideoShape(81, 480, 832)

LAYOUTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "svi_latent": {},
        "flf": {"layout": "flf"},
        "window": {"frame_policy": "window"},
    }
)
"""Ways of the same 81 frames. svi_latent: 22 latent frames, all 81 returned. flf: 21, the arithmetic that plain
diffusers does. window: svi_latent with 21 and 78 frames returned."""

JOBS = {
    "svi_endframe": Job(
        "svi_endframe",
        {**HEAD, "mode": "svi_endframe", "resolution": "832x480", "image_start": GIVEN, "image_end": GIVEN},
        {"resolution": "64x64", "video_length": 13},
        ("image_start", "image_end"),
        VIDEO_480P,
        forwards=6,
    ),
    # A second of film in a forward of each expert: for many jobs in a row.
    "short": Job(
        "svi_endframe",
        {
            **HEAD,
            "mode": "svi_endframe",
            "resolution": "832x480",
            "video_length": 17,
            "num_inference_steps": 2,
            "image_start": GIVEN,
            "image_end": GIVEN,
        },
        {"resolution": "64x64", "video_length": 13},
        ("image_start", "image_end"),
        VideoShape(17, 480, 832),
        forwards=2,
    ),
    # 4 of the usual 40 steps: each costs the same, so the rest is told by multiplication, and the table says so.
    "video": Job(
        "video",
        {**HEAD, "mode": "video", "height": 480, "width": 832, "num_inference_steps": 4, "image_url": GIVEN},
        {"height": 64, "width": 64, "num_frames": 13},
        ("image_url",),
        VIDEO_480P,
        forwards=8,
        image_tokens=IMAGE_TOKENS,
    ),
    "lightning": Job(
        "video",
        {
            **HEAD,
            "mode": "video",
            "model_type": "wan22_i2v_lightning",
            "height": 480,
            "width": 832,
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "image_url": GIVEN,
        },
        {"height": 64, "width": 64, "num_frames": 13},
        ("image_url",),
        VIDEO_480P,
        forwards=4,
    ),
    # base 25 steps; refiner int(50 * 0.3) = 15: worker-sdxl's defaults
    "image": Job(
        "image",
        {**HEAD, "mode": "image"},
        {"height": 64, "width": 64},
        (),
        VideoShape(1, 1024, 1024),
        forwards=40,
    ),
}


def located(mode: str, twins: Path) -> tuple[Profile, Parts]:
    """The mode's profile as a customer runs it, and the twin's parts of it."""
    profile = profiles.resolve(parse_request(JOBS[mode].payload))
    return profile, weights.locate(profile, Settings(weights_dir=twins)).parts()


def as_real(profile: Profile, twins: Path, folder: Path) -> Path:
    """Make `folder` a weights folder in which the twin of `profile` passes for the real one; returns it.

    For handler.run: it finds a profile by its files, and the models it then asks for are loaded already.
    """
    twins = twins.resolve()
    for entry in twins.iterdir():
        if entry.name != profile.folder:
            (folder / entry.name).symlink_to(entry)
    (folder / profile.folder).mkdir()
    for entry in (twins / profile.folder).iterdir():
        if entry.name != MANIFEST:
            (folder / profile.folder / entry.name).symlink_to(entry)
    manifest = weights.read_manifest(twins / profile.folder / MANIFEST)
    (folder / profile.folder / MANIFEST).write_text(json.dumps({**manifest, "twin": False}))
    return folder


def data_uri(image: Image.Image) -> str:
    """The picture as clients send it, PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@lru_cache(maxsize=4)  # two jobs': an arm draws the next one's before its clock begins
def picture(seed: int, shape: VideoShape) -> Image.Image:
    """A gradient with grain: nothing in it is constant. Nobody may write to it."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 200, shape.width)[None, :, None]
    grain = rng.integers(0, 56, (shape.height, shape.width, 3))
    return Image.fromarray((slope + grain).astype(np.uint8))
