"""The kernels of engine.text_attention: one counts the rows that are not repeated, one attends to as many and one more.

Imported on a card, and by tests/kernels, which runs them in Triton's interpreter.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# 64 queries a program, four warps of 128 registers: four programs fit a multiprocessor, and each hides what the others
# read and write. On an H200 34,320 queries take 0.22, 0.28, 0.40 and 1.28 ms for prompts of 12, 60, 100 and 512 tokens;
# with 64 keys a tile and 168 registers 0.29, 0.30, 0.38 and 1.14; flash-attn-4 over all 512 keys 0.65 to 0.68. One
# stage: a short prompt has one tile or two, and nothing to fetch ahead of it.
QUERIES, KEYS, WARPS, REGISTERS, STAGES = 64, 32, 4, 128, 1
COUNT_WARPS = 8
SMALLEST_PRODUCT = 16  # a side of what the card multiplies at once


@triton.jit
def _distinct_keys_kernel(key_at: tl.tensor, value_at: tl.tensor, count_at: tl.tensor, keys: tl.constexpr,
                          width: tl.constexpr, block: tl.constexpr) -> None:  # fmt: skip
    """1 + the last row that is not the last row, bit for bit, into `count`, which is 0 before. A program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < width
    last = (keys - 1) * width + columns
    key = tl.load(key_at + row * width + columns, mask=inside, other=0)
    value = tl.load(value_at + row * width + columns, mask=inside, other=0)
    differs = (key != tl.load(key_at + last, mask=inside, other=0)) | (
        value != tl.load(value_at + last, mask=inside, other=0)
    )
    tl.atomic_max(count_at, row + 1, mask=tl.max(differs.to(tl.int32), axis=0) > 0)


@triton.jit(do_not_specialize=["tokens"])
def _text_attention_kernel(query_at: tl.tensor, key_at: tl.tensor, value_at: tl.tensor, count_at: tl.tensor,
                           out_at: tl.tensor, tokens: tl.tensor, keys: tl.constexpr, heads: tl.constexpr,
                           width: tl.constexpr, block: tl.constexpr, queries: tl.constexpr, tile: tl.constexpr,
                           scale: tl.constexpr, stages: tl.constexpr) -> None:  # fmt: skip
    """A tile of queries of one head a program; the heads of a tile, which lie side by side, come one after another."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * queries
    column = tl.arange(0, block)
    row = tl.arange(0, queries)
    here = (first.to(tl.int64) * heads + head) * width
    inside = (first + row < tokens)[:, None] & (column < width)[None, :]
    at = row[:, None] * (heads * width) + column[None, :]
    query = tl.load(query_at + here + at, mask=inside, other=0.0)
    count = tl.load(count_at)
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
    tl.store(out_at + here + at, (found / total[:, None]).to(out_at.dtype.element_ty), mask=inside)


def distinct_rows(key: Tensor, value: Tensor) -> Tensor:
    """As engine.text_attention's, of (1, m, heads, d), but (1,) int32 that stays on the card."""
    _, keys, heads, width = key.shape
    row = heads * width
    count = torch.zeros(1, dtype=torch.int32, device=key.device)
    _distinct_keys_kernel[(keys,)](
        key.view(torch.int16), value.view(torch.int16), count, keys, row, triton.next_power_of_2(row),
        num_warps=COUNT_WARPS,
    )  # fmt: skip
    return count


def attend_text(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (1, n, heads, d), key and value (1, m, heads, d), bf16 and contiguous -> (1, n, heads, d)."""
    _, tokens, heads, width = query.shape
    keys = key.shape[1]
    out = torch.empty_like(query)
    count = distinct_rows(key, value)
    _text_attention_kernel[(triton.cdiv(tokens, QUERIES) * heads,)](
        query, key, value, count, out, tokens, keys, heads, width,
        max(SMALLEST_PRODUCT, triton.next_power_of_2(width)), QUERIES, KEYS, math.log2(math.e) / math.sqrt(width),
        STAGES, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out
