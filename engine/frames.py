"""Between a model's float pixels and the bytes of pictures and videos. What has no colour becomes no byte."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.errors import BadOutput

# Level -> pixel, with the roundings of diffusers' VideoProcessor. There are 256, so they are looked up: on a CPU that
# is a tenth of the time of the same arithmetic over a picture.
PIXELS = (2.0 * (torch.arange(256, dtype=torch.float32) / 255.0) - 1.0).numpy()

# Chunks in flight from a card: it computes the next two, which come together, while the host takes these. With more the
# launches of a third pair wait until the card's queue has room for them, and frames that are ready wait with them.
AHEAD = 2


def stream_uint8(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """`to_uint8` of each chunk (C, F, H, W), in their order.

    A card does not wait for the host: bytes go through page-locked memory while the next chunks are computed.

    Raises:
        BadOutput: as `to_uint8`, when the chunk's turn comes.
    """
    sent: deque[_Sent] = deque()
    for frames in chunks:
        sent.append(_send(frames))
        if len(sent) > (AHEAD if frames.is_cuda else 0):
            yield sent.popleft().receive()
    while sent:
        yield sent.popleft().receive()


def to_uint8(frames: Tensor) -> np.ndarray:
    """(C, F, H, W) float in [-1, 1] on any device -> (F, H, W, C) uint8, rounded to the nearest level.

    Computed where the tensor is, in fp32, so that a card sends bytes and not floats to the host.

    Raises:
        BadOutput: a value is NaN or infinite. Cast to bytes it would become black without a word.
    """
    return _send(frames).receive()


def from_uint8(levels: np.ndarray) -> Tensor:
    """(F, H, W, C) uint8 -> (1, C, F, H, W) fp32 in [-1, 1] on the CPU."""
    return torch.from_numpy(PIXELS.take(np.ascontiguousarray(levels.transpose(3, 0, 1, 2))))[None]


@dataclass(frozen=True)
class _Sent:
    """Bytes on their way to the host. `arrival` is None where they did not have to travel."""

    levels: Tensor
    is_finite: Tensor
    arrival: torch.cuda.Event | None

    def receive(self) -> np.ndarray:
        if self.arrival is not None:
            self.arrival.synchronize()
        if not self.is_finite:
            raise BadOutput("the model made pixels that are no numbers; another seed or precision may help")
        return self.levels.numpy()


def _send(frames: Tensor) -> _Sent:
    is_finite = torch.isfinite(frames).all()
    levels = frames.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    levels = levels.permute(1, 2, 3, 0).contiguous()
    if not frames.is_cuda:
        return _Sent(levels, is_finite, None)
    # The allocator of page-locked memory does not give a block away before the copy into it has ended.
    here = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True).copy_(levels, non_blocking=True)
    verdict = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_finite, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(frames.device))
    return _Sent(here, verdict, arrival)


def image_to_uint8(image: Tensor) -> np.ndarray:
    """(1, C, H, W) float in [-1, 1] -> (H, W, C) uint8.

    Raises:
        BadOutput: as `to_uint8`.
    """
    (frame,) = to_uint8(image.transpose(0, 1))
    return frame
