"""What a request shows the model: its pictures as pixels of one size, and what it goes on from."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from engine.chain import newest_frames
from engine.conditioning import LAYOUTS, Given
from engine.frames import from_uint8
from engine.pictures import fit_picture
from engine.svi_request import frames_of
from schemas.errors import InvalidInput, Problem
from schemas.svi_schema import SviEndframeRequest


@dataclass(frozen=True)
class Scene:
    """A request's pictures. Pixels are (1, 3, f, H, W) fp32 in [-1, 1] on the CPU."""

    given: Given
    prefix: Tensor | None
    """The newest frames of the video to go on from, where the layout takes their motion."""


def read_scene(request: SviEndframeRequest, pictures: Mapping[str, Any], height: int, width: int) -> Scene:
    """Fit every picture to one size, by the same scaling and the same cut, and give each its part.

    The anchor is `image_refs`, else the start, else the first frame that a prefix video is gone on from.

    Raises:
        InvalidInput: the prefix video is too short.
    """
    with ThreadPoolExecutor(max(1, len(pictures)), thread_name_prefix="fitting") as threads:
        # Pillow scales without the interpreter; a photo of 12 megapixels takes 0.1 s, in which the card has no work.
        fitted = {name: threads.submit(_pixels, frames_of(one), height, width) for name, one in pictures.items()}
        pixels = {name: one.result() for name, one in fitted.items()}
    prefix = None
    if "prefix_video" in pixels:
        prefix = newest_frames(pixels["prefix_video"], request.overlap)
    anchor = pixels.get("image_refs", pixels.get("image_start", prefix))
    if anchor is None:
        raise InvalidInput([Problem("image_start", "is missing; give the start picture, or image_refs")])
    start = pixels.get("image_start", anchor)
    if prefix is not None and LAYOUTS[request.chosen_layout].from_start:
        start, prefix = prefix[:, :, -request.overlap :], None
    return Scene(Given(anchor[:, :, :1], start, pixels.get("image_end")), prefix)


def _pixels(frames: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """(1, 3, f, height, width) fp32 in [-1, 1]."""
    return from_uint8(np.stack([np.asarray(fit_picture(frame, height, width)) for frame in frames]))
