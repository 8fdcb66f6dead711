"""Self-attention as every exact kernel computes it, without a look for the maximum where a head's scores allow it.

Why. Self-attention is two thirds of a forward at 832x480x81, and on an H200 its fastest kernel stands at the card's
power limit, so what is left out of it is time. Shifted by what is known beforehand (engine.attention_reach) a softmax
needs neither its maxima nor the shrinking of what was summed: 33.0 ms a call in place of flash-attn-4's 36.3, in turns
on a hot card. The mathematics is the same, summed otherwise, so this is the first choice on Hopper.

How. One pass over queries and keys finds the longest of each head and the keys' mean. The kernel
(engine.attention16_hopper) goes the usual way for the heads whose scores reach too far.
"""

import torch
from torch import Tensor

from engine import attention_check
from engine.attention_reach import WIDTH, Reach, reach, score_factor
from engine.hopper_kernels import hopper_kernel
from engine.operators import operator


@operator("attend16", lambda query, *_: query.new_empty(query.shape))
def attend16(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (b, n, heads, 128), key and value (b, m, heads, 128) bf16 -> (b, n, heads, 128).

    Raises:
        ValueError: another type or width.
    """
    if query.shape[3] != WIDTH or {x.dtype for x in (query, key, value)} != {torch.bfloat16}:
        raise ValueError(f"this attention takes bf16, heads of {WIDTH}; not {query.dtype} {tuple(query.shape)}")
    out = query.new_empty(query.shape)
    for q, k, v, to in zip(query, key, value, out, strict=True):
        _attend(q.contiguous(), k.contiguous(), v.contiguous(), to)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Without the dimension of batches, into `out`."""
    if query.device.type == "cpu":
        out.copy_(in_float32(query, key, value))
        return
    from engine import attention16_triton

    reached = attention16_triton.reach_of(query, key)
    hopper_kernel("attention16")(query, key, value, out, reached.span, reached.shift)


def reach_of(query: Tensor, key: Tensor) -> Reach:
    """(n, heads, d), (m, heads, d) -> how far each head's scores reach."""
    longest = query.float().norm(dim=2).amax(dim=0) * score_factor(query.shape[2])
    return reach(longest * key.float().norm(dim=2).amax(dim=0), longest * key.float().mean(dim=0).norm(dim=1))


def in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """-> (n, heads, d) float32: what the card computes, in one piece."""
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key.float())
    return torch.einsum("hnm,mhd->nhd", torch.softmax(scores / query.shape[2] ** 0.5, dim=-1), value.float())


def problem(device: str) -> str | None:
    """Why the card's kernel is not to be used, or None; see engine.attention_check."""
    return attention_check.problem(attend16, in_float32, device)
