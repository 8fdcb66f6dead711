"""Self-attention whose scores are products of 8-bit whole numbers; weights and values stay as they are.

Why. Self-attention is two thirds of a forward at 832x480x81, and the fastest bf16 kernel holds an H200 at its power
limit. That card multiplies int8 twice as fast as bf16 and for less power, so the half of attention that makes the
scores may cost half.

How. A query has a scale of its own for each head. From the keys their mean over all tokens is taken first: it adds the
same to every score of a query, so that no softmax sees it, and in published models what lies far out in keys is mostly
that (SageAttention, arXiv 2410.02367). What is left has a scale for each tile of keys that the kernel takes at a time.
A score is then an exact sum of whole numbers.

Where a head's scores do not reach too far, no maximum is looked for (engine.attention_reach): 27.2 ms a call in place
of 31.3.

Error. Uniform steps: 1.2 % of the result on normal numbers, where the 8-bit layers around it err by 3.7 %, and e4m3 for
queries, keys and values by 6 to 11. It rounds, so it is chosen by name only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import attention_check
from engine.attention_reach import KEY_TILE, WIDTH, Reach, reach, score_factor
from engine.hopper_kernels import hopper_kernel
from engine.linear8 import KINDS, SMALLEST_AMAX
from engine.operators import operator

INT8 = KINDS["int8"]
# How long the mean of rounded keys may be, against the longest, whose largest number is 127 steps: half a step in each.
MEAN_LEFT = math.sqrt(WIDTH) / 2 / INT8.limit


@dataclass(frozen=True)
class Rounded8:
    """Queries or keys, of which each number is that of `values` times its scale."""

    values: Tensor
    """int8 (n, heads, d)."""
    scales: Tensor
    """float32, of queries (heads, n), of keys (heads, tiles)."""
    longest: Tensor
    """float32 (heads,): length of a head's longest row. Of a query times that of a key: no score is larger."""


@operator("attend8", lambda query, *_: query.new_empty(query.shape))
def attend8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (1, n, heads, 128), key and value (1, m, heads, 128) bf16 -> (1, n, heads, 128).

    A NaN or an infinity in query, key or value makes all that it enters a NaN.

    Raises:
        ValueError: a batch of more than one, another type or width.
    """
    if query.shape[0] != 1 or query.shape[3] != WIDTH or {x.dtype for x in (query, key, value)} != {torch.bfloat16}:
        raise ValueError(f"8-bit attention takes one video, bf16, heads of {WIDTH}; not {tuple(query.shape)}")
    query, key, value = (x[0].contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        return _reference(query, key, value).to(query.dtype)[None]
    from engine import attention8_triton

    q, k, out = attention8_triton.round_queries(query), attention8_triton.round_keys(key), torch.empty_like(query)
    reached = reach_of(q, k)
    hopper_kernel("attention8")(q.values, k.values, value, out, q.scales, k.scales, reached.span, reached.shift)
    return out[None]


def reach_of(query: Rounded8, key: Rounded8) -> Reach:
    """Of their scores: the keys' mean was taken away before they were rounded."""
    bound = query.longest * key.longest
    return reach(bound, bound * MEAN_LEFT)


def round_queries(query: Tensor) -> Rounded8:
    """(n, heads, d) -> a scale for each row, in which the softmax's own factor is: scores become powers of two."""
    x = query.float()
    largest = x.abs().amax(dim=2).clamp_min(SMALLEST_AMAX)
    scales = largest * (score_factor(query.shape[2]) / INT8.limit)
    values = (x * (INT8.limit / largest)[..., None]).round()
    return Rounded8(values.to(INT8.dtype), scales.t().contiguous(), (values.norm(dim=2) * scales).amax(dim=0))


def round_keys(key: Tensor) -> Rounded8:
    """(m, heads, d) -> a scale for each tile of keys, of what is left when each head's mean is taken away."""
    x = key.float()
    x = x - x.mean(dim=0)
    values, scales, longest = [], [], []
    for tile in x.split(KEY_TILE):
        largest = tile.abs().amax(dim=(0, 2)).clamp_min(SMALLEST_AMAX)
        scale = largest / INT8.limit
        whole = (tile * (INT8.limit / largest)[None, :, None]).round()
        values.append(whole.to(INT8.dtype))
        scales.append(scale)
        longest.append((whole.norm(dim=2) * scale).amax(dim=0))
    return Rounded8(torch.cat(values), torch.stack(scales, dim=1), torch.stack(longest).amax(dim=0))


def _in_float32(query: Rounded8, key: Rounded8, value: Tensor) -> Tensor:
    """-> (n, heads, d) float32: what the card computes, in one piece."""
    tiles = torch.arange(len(key.values), device=value.device) // KEY_TILE
    scores = torch.einsum("nhd,mhd->hnm", query.values.float(), key.values.float())
    scores = scores * query.scales[:, :, None] * key.scales[:, None, tiles]
    weights = torch.softmax(scores * math.log(2), dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, value.float())


def problem(device: str) -> str | None:
    """Why the card's kernel is not to be used, or None; see engine.attention_check."""
    return attention_check.problem(attend8, _reference, device)


def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _in_float32(round_queries(query), round_keys(key), value)
