"""The kernels of engine.text_attention: one looks the text's rows through, one attends to those that are not repeated.

Imported on a card, and by tests/kernels, which runs them in Triton's interpreter.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.linear8 import KINDS, SMALLEST_AMAX

FP8 = KINDS["fp8"]
# 64 queries a program, four warps of 128 registers: four programs fit a multiprocessor, and each hides what the others
# read and write. On an H200 34,320 queries take 0.22, 0.28, 0.40 and 1.28 ms for prompts of 12, 60, 100 and 512 tokens;
# with 64 keys a tile and 168 registers 0.29, 0.30, 0.38 and 1.14; flash-attn-4 over all 512 keys 0.65 to 0.68. One
# stage: a short prompt has one tile or two, and nothing to fetch ahead of it.
QUERIES, KEYS, WARPS, REGISTERS, STAGES = 64, 32, 4, 128, 1
ROUND_REGISTERS = 168  # of the kernel that norms its queries too: 0.53 ms at 120 tokens in place of 0.57
ROW_WARPS = 8  # of the kernels whose program takes a row of all heads
SMALLEST_PRODUCT = 16  # a side of what the card multiplies at once


@triton.jit
def _survey_kernel(key_at: tl.tensor, value_at: tl.tensor, found_at: tl.tensor, keys: tl.constexpr,
                   width: tl.constexpr, block: tl.constexpr) -> None:  # fmt: skip
    """Into `found`, which is 0 before: 1 + the last row that is not the last row, bit for bit, and the largest
    magnitude of all values, as the bits of a bf16. A program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < width
    last = (keys - 1) * width + columns
    key = tl.load(key_at + row * width + columns, mask=inside, other=0)
    value = tl.load(value_at + row * width + columns, mask=inside, other=0)
    differs = (key != tl.load(key_at + last, mask=inside, other=0)) | (
        value != tl.load(value_at + last, mask=inside, other=0)
    )
    tl.atomic_max(found_at, row + 1, mask=tl.max(differs.to(tl.int32), axis=0) > 0)
    # Without their sign the bits of larger numbers are larger, an infinity's larger still, and a NaN's the largest.
    tl.atomic_max(found_at + 1, tl.max(value.to(tl.int32) & 0x7FFF, axis=0))


@triton.jit
def _root_kernel(x_at: tl.tensor, roots_at: tl.tensor, width: tl.constexpr, block: tl.constexpr,
                 eps: tl.constexpr) -> None:  # fmt: skip
    """What an RMS norm multiplies a row with. A program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    value = tl.load(x_at + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(roots_at + row, tl.rsqrt(tl.sum(value * value, axis=0) / width + eps))


@triton.jit
def _tile(tokens: tl.tensor, heads: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
          queries: tl.constexpr) -> tuple[tl.tensor, ...]:  # fmt: skip
    """A tile of queries of one head a program; the heads of a tile, which lie side by side, come one after another.

    Its head and its queries' numbers, where each of its numbers lies, and which of them exist.
    """
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * queries
    column = tl.arange(0, block)
    row = tl.arange(0, queries)
    at = (first.to(tl.int64) * heads + head) * width + row[:, None] * (heads * width) + column[None, :]
    return head, first + row, at, (first + row < tokens)[:, None] & (column < width)[None, :]


@triton.jit
def _attend(query: tl.tensor, key_at: tl.tensor, value_at: tl.tensor, head: tl.tensor, count: tl.tensor,
            keys: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, block: tl.constexpr, queries: tl.constexpr,
            tile: tl.constexpr, scale: tl.constexpr, stages: tl.constexpr) -> tl.tensor:  # fmt: skip
    """(queries, block) fp32: what queries (queries, block) of a head see in the text."""
    column = tl.arange(0, block)
    # Row `count` is the first of those that are equal: it stands for keys - count of them. Logits are powers of two.
    repeats = tl.log2((keys - count).to(tl.float32))
    largest = tl.full((queries,), float("-inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    found = tl.zeros((queries, block), tl.float32)
    for start in tl.range(0, count + 1, tile, num_stages=stages):
        index = start + tl.arange(0, tile)
        there = (index <= count)[:, None] & (column < width)[None, :]
        key_of = (index[:, None] * heads + head) * width + column[None, :]
        key = tl.load(key_at + key_of, mask=there, other=0.0)
        logits = tl.dot(query, tl.trans(key)) * scale + tl.where(index == count, repeats, 0.0)[None, :]
        logits = tl.where((index <= count)[None, :], logits, float("-inf"))
        value = tl.load(value_at + key_of, mask=there, other=0.0)  # here, so that its registers are free until now
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - larger[:, None])
        fade = tl.exp2(largest - larger)
        total = total * fade + tl.sum(weights, axis=1)
        found = tl.dot(weights.to(value.dtype), value, found * fade[:, None])
        largest = larger
    return found / total[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _attend_kernel(query_at: tl.tensor, key_at: tl.tensor, value_at: tl.tensor, found_at: tl.tensor,
                   out_at: tl.tensor, tokens: tl.tensor, keys: tl.constexpr, heads: tl.constexpr,
                   width: tl.constexpr, block: tl.constexpr, queries: tl.constexpr, tile: tl.constexpr,
                   scale: tl.constexpr, stages: tl.constexpr) -> None:  # fmt: skip
    head, _, at, inside = _tile(tokens, heads, width, block, queries)
    query = tl.load(query_at + at, mask=inside, other=0.0)
    seen = _attend(
        query, key_at, value_at, head, tl.load(found_at), keys, heads, width, block, queries, tile, scale, stages
    )
    tl.store(out_at + at, seen.to(out_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _attend_round_kernel(query_at: tl.tensor, key_at: tl.tensor, value_at: tl.tensor, found_at: tl.tensor,
                         roots_at: tl.tensor, weight_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor,
                         tokens: tl.tensor, keys: tl.constexpr, heads: tl.constexpr, width: tl.constexpr,
                         block: tl.constexpr, queries: tl.constexpr, tile: tl.constexpr, scale: tl.constexpr,
                         stages: tl.constexpr, smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    head, number, at, inside = _tile(tokens, heads, width, block, queries)
    column = tl.arange(0, block)
    exists = number < tokens
    value = tl.load(query_at + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(roots_at + number, mask=exists, other=0.0)
    weight = tl.load(weight_at + head * width + column, mask=column < width, other=0.0).to(tl.float32)
    query = (value * root[:, None] * weight[None, :]).to(query_at.dtype.element_ty)
    seen = _attend(
        query, key_at, value_at, head, tl.load(found_at), keys, heads, width, block, queries, tile, scale, stages
    )
    bound = (tl.load(found_at + 1) << 16).to(tl.float32, bitcast=True)
    bound = tl.where(bound < smallest, smallest, bound)  # a maximum would take the number for a NaN
    tl.store(values_at + at, (seen * (limit / bound)).to(values_at.dtype.element_ty), mask=inside)
    tl.store(scales_at + number, tl.zeros((queries,), tl.float32) + bound / limit, mask=exists & (head == 0))


def survey(key: Tensor, value: Tensor) -> Tensor:
    """Of (1, m, heads, d) bf16: (2,) int32 that stays on the card.

    First `distinct_rows`, as engine.text_attention has it; then the bits of the value that is largest without its sign.
    """
    _, keys, heads, width = key.shape
    row = heads * width
    found = torch.zeros(2, dtype=torch.int32, device=key.device)
    _survey_kernel[(keys,)](
        key.view(torch.int16), value.view(torch.int16), found, keys, row, triton.next_power_of_2(row),
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return found


def attend_text(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (1, n, heads, d), key and value (1, m, heads, d), bf16 and contiguous -> (1, n, heads, d)."""
    out = torch.empty_like(query)
    tokens = query.shape[1]
    given = query, key, value, survey(key, value), out, tokens
    _launch(_attend_kernel, tokens, key.shape, *given, maxnreg=REGISTERS)
    return out


def attend_text_round(query: Tensor, weight: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As engine.text_attention's; all contiguous."""
    tokens, row = query.shape
    values = torch.empty_like(query, dtype=FP8.dtype)
    scales, roots = (torch.empty(tokens, 1, dtype=torch.float32, device=query.device) for _ in range(2))
    _root_kernel[(tokens,)](query, roots, row, triton.next_power_of_2(row), eps, num_warps=ROW_WARPS)
    given = query, key, value, survey(key, value), roots, weight, values, scales, tokens
    rounding = {"smallest": SMALLEST_AMAX, "limit": FP8.limit, "maxnreg": ROUND_REGISTERS}
    _launch(_attend_round_kernel, tokens, key.shape, *given, **rounding)
    return values, scales


def _launch(kernel: Any, tokens: int, text: torch.Size, *given: Any, **more: float) -> None:
    """Run a kernel over all tiles of all heads. `text`: (1, m, heads, d), the keys' shape."""
    _, keys, heads, width = text
    kernel[(triton.cdiv(tokens, QUERIES) * heads,)](
        *given, keys=keys, heads=heads, width=width, block=max(SMALLEST_PRODUCT, triton.next_power_of_2(width)),
        queries=QUERIES, tile=KEYS, scale=math.log2(math.e) / math.sqrt(width), stages=STAGES,
        num_warps=WARPS, **more,
    )  # fmt: skip
