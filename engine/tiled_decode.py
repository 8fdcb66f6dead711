"""Decoding latents in overlapping tiles: slower, a little different, and in a fraction of the memory.

For the second run after the card ran out of memory. A decoder's activations grow with the area; a tile's do not.
Where tiles overlap the pixels of both are mixed, each with a weight that falls to its edge, so no seam shows. Far from
the seams a tile's pixels equal those of the whole wherever the decoder does not look across the frame: its
convolutions do not, its one attention (and SDXL's norms) do, which is why this is never the first choice.

Tiles run one after the other over the whole clip, for the features that a causal decoder keeps are most of what it
takes; the pixels wait in host memory. So the first chunk is there when nearly all is done: `stepped` tells of each that
was computed, and a cancel or a watch need not wait for it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Decode = Callable[[Tensor], Iterable[Tensor]]
"""Latents (..., h, w) -> chunks of pixels (..., scale h, scale w), the same number and lengths for every tile."""


@dataclass(frozen=True)
class Tiling:
    """In latents. No tile has a side over `side`; neighbours share about `overlap`, less than half of it.

    32 and 8 at Wan's stride of 8 are 256 and 64 pixels.
    """

    side: int = 32
    overlap: int = 8

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Where tiles begin and end along an axis: as few as may be, of one length, evenly spread."""
        count = max(1, -(-(length - self.overlap) // (self.side - self.overlap)))
        tile = -(-(length + (count - 1) * self.overlap) // count)
        starts = [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]
        return [(start, start + tile) for start in starts]

    def count(self, height: int, width: int) -> int:
        """How many tiles latents of this size are cut into."""
        return len(self.spans(height)) * len(self.spans(width))


def decode_tiled(decode: Decode, latents: Tensor, tiling: Tiling = Tiling()) -> Iterator[Tensor]:
    """Decode `latents` (..., h, w) tile by tile, and yield chunks as `decode` would of the whole, fp32 on the CPU."""
    rows, columns = tiling.spans(latents.shape[-2]), tiling.spans(latents.shape[-1])
    film = list[Tensor]()
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            tile = latents[..., top:bottom, left:right]
            for k, chunk in enumerate(decode(tile)):
                scale = chunk.shape[-1] // tile.shape[-1]
                if k == len(film):
                    film.append(torch.zeros(*chunk.shape[:-2], *(scale * side for side in latents.shape[-2:])))
                share = _shares(rows, i, scale)[:, None] * _shares(columns, j, scale)
                film[k][..., scale * top : scale * bottom, scale * left : scale * right] += chunk.float().cpu() * share
    while film:
        yield film.pop(0)


def steps(latents: Tensor, in_tiles: bool) -> int:
    """How often `stepped` steps for latents (..., T, h, w) of which each of T makes one chunk."""
    *_, frames, height, width = latents.shape
    return frames * (Tiling().count(height, width) if in_tiles else 1)


def stepped(decode: Decode, latents: Tensor, in_tiles: bool, step: Callable[[], None]) -> Iterator[Tensor]:
    """Decode `latents` whole or in tiles, and call `step` after each chunk computed; what it raises ends the decode."""

    def counted(part: Tensor) -> Iterator[Tensor]:
        for chunk in decode(part):
            yield chunk
            step()

    return decode_tiled(counted, latents) if in_tiles else counted(latents)


def _shares(spans: list[tuple[int, int]], i: int, scale: int) -> Tensor:
    """What tile i has in each of its pixels along one axis, (scale * length,). Those of all tiles add up to 1."""
    start, end = spans[i]
    shares = torch.ones(scale * (end - start))
    for before, after in pairwise(spans):
        if spans[i] in (before, after):
            common = scale * (before[1] - after[0])
            rising = (torch.arange(common) + 0.5) / common
            part = shares[:common] if spans[i] == after else shares[-common:]
            part *= rising if spans[i] == after else rising.flip(0)
    return shares
