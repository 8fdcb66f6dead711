"""Self-attention whose scores are products of 8-bit whole numbers; weights and values stay as they are.

Why. Self-attention is two thirds of a forward at 832x480x81, and the fastest bf16 kernel holds an H200 at its power
limit. That card multiplies int8 twice as fast as bf16 and for less power, so the half of attention that makes the
scores may cost half.

How. A query has a scale of its own for each head. From the keys their mean over all tokens is taken first: it adds the
same to every score of a query, so that no softmax sees it, and in published models what lies far out in keys is mostly
that (SageAttention, arXiv 2410.02367). What is left has a scale for each tile of keys that the kernel takes at a time.
A score is then an exact sum of whole numbers.

No maximum. A softmax takes each row's largest score away first, so that no exponential overflows; to find it, and to
shrink what was summed before whenever it grows, is an eighth of the time (31.3 ms a call in place of 27.2). But no
score is larger than the length of its query times that of the longest key (Cauchy-Schwarz), and both are known when
they are rounded. Where that bound is small, 2**score is itself far inside float32 at both ends. Heads with a larger
bound go the usual way.

Error. Uniform steps: 1.2 % of the result on normal numbers, where the 8-bit layers around it err by 3.7 %, and e4m3 for
queries, keys and values by 6 to 11. It rounds, so it is chosen by name only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.linear8 import KINDS, SMALLEST_AMAX

INT8 = KINDS["int8"]
KEY_TILE = 80  # keys that share a scale: what a block of engine.attention8_hopper takes at a time
# Largest score, as a power of two, that is used as it is: the sum of 2**20 weights of 2**60 with values of 2**40 is
# in float32, and so is one weight of 2**-60.
MOST_BOUND = 60.0
WIDTH = 128  # of a head, the one size that the card's kernel takes

MAX_RELATIVE_ERROR = 0.01  # against the same whole numbers in float32: twice what weights and result in bf16 err by
TEST_ROWS = 400, 330  # of queries and keys: tiles that are not full


@dataclass(frozen=True)
class Rounded8:
    """Queries or keys, of which each number is that of `values` times its scale."""

    values: Tensor
    """int8 (n, heads, d)."""
    scales: Tensor
    """float32, of queries (heads, n), of keys (heads, tiles)."""
    longest: Tensor
    """float32 (heads,): length of a head's longest row. Of a query times that of a key: no score is larger."""


@torch.library.custom_op("svi_worker::attend8", mutates_args=())
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
        return _in_float32(round_queries(query), round_keys(key), value).to(query.dtype)[None]
    from engine import attention8_hopper, attention8_triton

    rounded = attention8_triton.round_queries(query), attention8_triton.round_keys(key)
    return attention8_hopper.attend(*rounded, value)[None]


@attend8.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 the operator's own signature
    return query.new_empty(query.shape)


def score_factor(width: int) -> float:
    """What a softmax over heads of this width multiplies its products with, to be a power of two."""
    return math.log2(math.e) / math.sqrt(width)


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
    """Why the card's kernel is not to be used, or None, beside what every kernel is tested for (engine.attention).

    Those numbers are spread so far that their heads' maxima are looked for. Here are heads of both ways side by side.
    """
    query, key, value = _drawn(device)
    wanted = _in_float32(round_queries(query[0]), round_keys(key[0]), value[0])
    error = float((attend8(query, key, value)[0].float() - wanted).norm() / wanted.norm())
    if not error < MAX_RELATIVE_ERROR:  # a NaN is not
        return f"its result is off (relative error {error:.3f})"
    return "it hides a NaN" if any(_hides_a_nan((query, key, value), at) for at in range(3)) else None


def _drawn(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of four heads, the last two with scores whose bound is too large."""
    generator = torch.Generator(device).manual_seed(8)
    queries, keys = TEST_ROWS
    query, key, value = (
        torch.randn(1, rows, 4, WIDTH, generator=generator, device=device) for rows in (queries, keys, keys)
    )
    query[:, :, 2:] *= 3
    key[:, :, 3] += 5
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def _hides_a_nan(drawn: tuple[Tensor, ...], at: int) -> bool:
    """Whether one in row 7 of query, key or value, in a head of each way, is not in what it enters, or elsewhere."""
    given = [x.clone() for x in drawn]
    given[at][0, 7, 1:3, 5] = float("nan")
    entered = torch.zeros_like(given[0][0], dtype=torch.bool)
    rows, columns = (7 if at == 0 else slice(None)), (5 if at == 2 else slice(None))
    entered[rows, 1:3, columns] = True
    return not torch.equal(attend8(*given)[0].isnan(), entered)
