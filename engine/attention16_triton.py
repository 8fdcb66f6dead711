"""How far the scores of engine.attention16 reach, found on a card: queries and keys read once.

Imported on a card, and by tests/kernels, which runs it in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention_reach import Reach, reach, score_factor

TILE = 128  # rows a program


@triton.jit(do_not_specialize=["rows"])
def _lengths_kernel(x_at: tl.tensor, longest_at: tl.tensor, sums_at: tl.tensor, rows: int, heads: int,
                    width: tl.constexpr, tile: tl.constexpr) -> None:  # fmt: skip
    """Of this program's rows of a head, the square of the longest and their sum."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, width)
    at = (row.to(tl.int64)[:, None] * heads + tl.program_id(1)) * width + column[None, :]
    x = tl.load(x_at + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    # A maximum need not show a NaN; a sum does.
    longest = tl.max(squares, axis=0) + tl.sum(squares * 0.0, axis=0)
    here = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(longest_at + here, longest)
    tl.store(sums_at + here * width + column, tl.sum(x, axis=0))


def reach_of(query: Tensor, key: Tensor) -> Reach:
    """As engine.attention16.reach_of; both are contiguous."""
    longest_query, _ = _lengths(query)
    longest_key, key_sums = _lengths(key)
    longest = longest_query * score_factor(query.shape[2])
    return reach(longest * longest_key, longest * key_sums.sum(dim=1).norm(dim=1) / len(key))


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, heads, d) -> length of each head's longest row (heads,), sums of a tile's rows (heads, tiles, d), float32."""
    rows, heads, width = x.shape
    tiles = triton.cdiv(rows, TILE)
    longest = x.new_empty((heads, tiles), dtype=torch.float32)
    sums = x.new_empty((heads, tiles, width), dtype=torch.float32)
    _lengths_kernel[tiles, heads](x, longest, sums, rows, heads, width, TILE)
    return longest.amax(dim=1).sqrt(), sums
