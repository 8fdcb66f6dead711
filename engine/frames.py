"""Float pixels of a decoder -> the bytes of a picture or video, refusing what has no colour."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from schemas.errors import BadOutput

if TYPE_CHECKING:
    import numpy as np


def to_uint8(frames: Tensor) -> "np.ndarray":
    """(C, F, H, W) float in [-1, 1] on any device -> (F, H, W, C) uint8, rounded to the nearest level.

    Computed where the tensor is, in fp32, so that a card sends bytes and not floats to the host.

    Raises:
        BadOutput: a value is NaN or infinite. Cast to bytes it would become black without a word.
    """
    if not torch.isfinite(frames).all():
        raise BadOutput("the model made pixels that are no numbers; another seed or precision may help")
    levels = frames.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def image_to_uint8(image: Tensor) -> "np.ndarray":
    """(1, C, H, W) float in [-1, 1] -> (H, W, C) uint8.

    Raises:
        BadOutput: as `to_uint8`.
    """
    (frame,) = to_uint8(image.transpose(0, 1))
    return frame
