"""Pictures to CLIP embeddings, as Wan2.1 reads them, computed once a picture."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from PIL import Image
from torch import Tensor

from engine.passage import to_device
from engine.remembered import Remembered


class PictureEncoder:
    """CLIP's picture encoder, and what it made remembered.

    The key is the picture's size and every byte of its pixels. `use_encoder` brings the encoder to where it computes
    for the length of a block; a remembered picture never calls it.
    """

    def __init__(self, processor: Any, use_encoder: Callable[[], AbstractContextManager[Any]]) -> None:
        self._processor = processor
        self._use_encoder = use_encoder
        self._remembered: Remembered[tuple[tuple[int, int], str], Tensor] = Remembered()

    def encode(self, picture: Image.Image) -> Tensor:
        """The hidden states before CLIP's last layer: (1, 257, 1280) on the CPU, of the encoder's dtype.

        Source: WanImageToVideoPipeline.encode_image, to the last bit.
        """
        key = (picture.size, hashlib.sha256(picture.tobytes()).hexdigest())
        return self._remembered.get(key, lambda: self._compute(picture))

    def _compute(self, picture: Image.Image) -> Tensor:
        pixels = self._processor(images=picture, return_tensors="pt").pixel_values
        with self._use_encoder() as encoder:
            states = encoder(pixel_values=to_device(pixels, encoder.device), output_hidden_states=True).hidden_states
            return states[-2].cpu().clone()
