"""What a `video` request means to any of its models: the size of the video, its first frame, its words embedded."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from engine.denoise import Prompts
from engine.frames import from_uint8
from engine.geometry import VideoShape, fit_area
from engine.pictures import fit_picture
from engine.text import MAX_TOKENS, PromptEncoder
from schemas.video_schema import VideoRequest


class Words(NamedTuple):
    """A request's prompts as a transformer reads them, and what its caller should know about them."""

    embedded: Prompts
    notes: tuple[str, ...]


def asked_shape(request: VideoRequest, picture: Image.Image, max_area: int) -> VideoShape:
    """As asked; else the picture's aspect within `max_area` pixels."""
    if request.height is not None and request.width is not None:
        return VideoShape(request.num_frames, request.height, request.width)
    return VideoShape(request.num_frames, *fit_area(picture.width / picture.height, max_area))


def read_picture(picture: Image.Image, shape: VideoShape) -> Tensor:
    """The first frame (1, 3, 1, H, W) fp32 in [-1, 1]."""
    return from_uint8(np.asarray(fit_picture(picture, shape.height, shape.width))[None])


def read_words(request: VideoRequest, encoder: PromptEncoder) -> Words:
    """Embed the prompt and, where guidance will read it, the negative one."""
    prompt = encoder.encode(request.prompt)
    negative: Tensor | None = None
    if request.guidance_scale > 1:  # as diffusers' pipelines decide it
        negative = encoder.encode(request.negative_prompt or "").hidden
    notes: tuple[str, ...] = ()
    if prompt.unread_tokens:
        notes = (f"the prompt is {prompt.tokens} tokens long; the model reads the first {MAX_TOKENS}",)
    return Words(Prompts(prompt.hidden, negative), notes)
