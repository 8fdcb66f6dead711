"""Queries and keys of engine.attention8 rounded on a card: each number read once, its int8 written once.

Imported on a card, and by tests/kernels, which runs them in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention8 import INT8, Rounded8
from engine.attention_reach import KEY_TILE, score_factor
from engine.linear8 import SMALLEST_AMAX

QUERY_TILE = 64  # rows a program: 64 numbers a thread
# Added and taken away again, 1.5 * 2**23 makes a float32 whole, of two equally near numbers the even one.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _tile(x_at: tl.tensor, rows: int, heads: int, width: tl.constexpr, tile: tl.constexpr,
          block: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of this program, `tile` rows of a head: their numbers in the tensor, where they lie, which exist, and they."""
    place = tl.arange(0, block)
    row = tl.program_id(0) * tile + place
    inside = ((place < tile) & (row < rows))[:, None]
    at = (row.to(tl.int64)[:, None] * heads + tl.program_id(1)) * width + tl.arange(0, width)[None, :]
    return row, at, inside, tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _whole(x: tl.tensor) -> tl.tensor:
    return (x + WHOLE) - WHOLE


@triton.jit
def _length(x: tl.tensor) -> tl.tensor:
    return tl.sqrt(tl.sum(x * x, axis=1))


@triton.jit(do_not_specialize=["rows"])
def _round_queries_kernel(x_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor, longest_at: tl.tensor,
                          rows: int, heads: int, width: tl.constexpr, tile: tl.constexpr, factor: tl.constexpr,
                          smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    row, at, inside, x = _tile(x_at, rows, heads, width, tile, tile)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), smallest)
    whole = _whole(x * (limit / largest)[:, None])
    # A NaN where a number is none, or no finite one: a whole number cannot be, and a maximum need not show it.
    broken = tl.sum(x * 0.0, axis=1)
    scales = largest * (factor / limit) + broken
    head = tl.program_id(1).to(tl.int64)
    tl.store(values_at + at, whole.to(tl.int8), mask=inside)
    tl.store(scales_at + head * rows + row, scales, mask=row < rows)
    longest = tl.max(_length(whole) * scales, axis=0) + tl.sum(broken, axis=0)
    tl.store(longest_at + head * tl.num_programs(0) + tl.program_id(0), longest)


@triton.jit(do_not_specialize=["rows"])
def _round_keys_kernel(x_at: tl.tensor, means_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor,
                       longest_at: tl.tensor, rows: int, heads: int, width: tl.constexpr, tile: tl.constexpr,
                       block: tl.constexpr, smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    _, at, inside, x = _tile(x_at, rows, heads, width, tile, block)
    mean = tl.load(means_at + tl.program_id(1) * width + tl.arange(0, width))
    x = tl.where(inside, x - mean[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), smallest)
    whole = _whole(x * (limit / largest))
    scale = largest / limit + tl.sum(tl.sum(x * 0.0, axis=1), axis=0)
    here = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(values_at + at, whole.to(tl.int8), mask=inside)
    tl.store(scales_at + here, scale)
    tl.store(longest_at + here, tl.max(_length(whole), axis=0) * scale)


def round_queries(query: Tensor) -> Rounded8:
    """As engine.attention8.round_queries; `query` is contiguous."""
    rows, heads, width = query.shape
    tiles = triton.cdiv(rows, QUERY_TILE)
    values = torch.empty_like(query, dtype=INT8.dtype)
    scales = query.new_empty((heads, rows), dtype=torch.float32)
    longest = query.new_empty((heads, tiles), dtype=torch.float32)
    _round_queries_kernel[tiles, heads](
        query, values, scales, longest, rows, heads, width, QUERY_TILE, score_factor(width), SMALLEST_AMAX, INT8.limit
    )
    return Rounded8(values, scales, longest.amax(dim=1))


def round_keys(key: Tensor) -> Rounded8:
    """As engine.attention8.round_keys; `key` is contiguous."""
    rows, heads, width = key.shape
    tiles = triton.cdiv(rows, KEY_TILE)
    values = torch.empty_like(key, dtype=INT8.dtype)
    scales, longest = (key.new_empty((heads, tiles), dtype=torch.float32) for _ in range(2))
    means = key.mean(dim=0, dtype=torch.float32)
    _round_keys_kernel[tiles, heads](
        key, means, values, scales, longest, rows, heads, width, KEY_TILE, triton.next_power_of_2(KEY_TILE),
        SMALLEST_AMAX, INT8.limit,
    )  # fmt: skip
    return Rounded8(values, scales, longest.amax(dim=1))
