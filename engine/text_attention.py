"""Attention to a text of which most is padding: equal keys with equal values count as one.

Why. A video transformer reads 512 text tokens, and of a prompt of 12 the encoder leaves 500 zero. After the text's
projections these are one key and one value, 500 times. In a softmax that is one key whose logit is larger by
log(500): 13 products a query in place of 512, and what is left is reading the queries and writing the result.

How. The rows at the end that are equal in key and value, bit for bit, are counted on the card, from the tensors: no
length is handed over, the host waits for nothing, and a prompt of another length is no other graph. So the result is
that of plain attention whatever the encoder did; where no row is repeated it is plain attention.

Rounded. What the heads see goes into an 8-bit layer. The usual scale of a row is known when its last head is, so
rounding would be one more pass over memory. But what a query sees is a mean of the text's values, and no mean is larger
than the largest of them: that one, known before, serves as the scale of every row. A float format loses nothing by a
scale that is too large: e4m3 keeps its three bits down to 1/28,672 of the bound. In the same way the norm of a query is
a factor a row and one a channel, and needs no copy of the queries.

Cost. At 34,320 queries and 40 heads of 128 a short prompt is 0.7 GB of memory traffic and 23 GFLOP, in one tile of 32
keys: 0.23 ms on an H200, where flash-attn-4 takes 0.65 for all keys, and 0.32 with norm and rounding, which took 0.56
in three passes. At 200 tokens attention alone is as fast as flash-attn-4. A prompt of all 512 is sixteen tiles and no
product less than plain attention, by a simpler kernel: 0.6 ms more than flash-attn-4.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import TEXT_TOKENS, deviation
from engine.linear8 import KINDS, SMALLEST_AMAX
from engine.linear8_check import MIN_SNR_DB, snr_db
from engine.operators import operator
from engine.proof import Proof

FP8 = KINDS["fp8"]
MAX_RELATIVE_ERROR = 0.01  # against float32, as of the other bf16 kernels: they err by 0.003
# Of queries: one tile, and one that is not full. Heads and their width are the 14B models' own.
TEST_TOKENS, TEST_HEADS, TEST_HEAD = 100, 40, 128
# Rows of key and of value that are not repeated: a short prompt, one whose padding begins a tile, a whole one;
# and equal keys with other values, and the other way round, which are no padding.
TEST_TEXTS = ((12, 12), (64, 64), (TEXT_TOKENS, TEXT_TOKENS), (12, 300), (300, 12))
TEST_ROUNDED_TEXT = 70  # two tiles and a part: the kernel that rounds attends by the same code


def _fake_round(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=FP8.dtype), query.new_empty((query.shape[0], 1), dtype=torch.float32)


@operator("attend_text", lambda query, *_: query.new_empty(query.shape))
def attend_text(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (1, n, heads, d), key and value (1, m, heads, d) bf16 -> (1, n, heads, d).

    A NaN or an infinity in any row is in the result as plain attention has it.

    Raises:
        ValueError: a batch of more than one, each of which would have a padding of its own; a type that is not bf16,
            whose bits the card would compare two by two.
    """
    _check(query, key, value)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if query.device.type == "cpu":
        return _in_float32(query[0], key[0], value[0]).to(query.dtype)[None]
    from engine.text_attention_triton import attend_text as on_card

    return on_card(query, key, value)


@operator("attend_text_round", _fake_round)
def attend_text_round(query: Tensor, weight: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`attend_text` of RMSNorm(query) * weight, rounded: e4m3 (n, heads * d) and float32 scales (n, 1), all the same.

    query (n, heads * d) bf16 as its projection gives it; the norm is over the row, all heads together. `weight`:
    (heads * d,) bf16 or float32. key and value (1, m, heads, d) bf16. A NaN or an infinity in a row of query or key is
    in the product as the unrounded one has it; one in a value makes all of the product NaN.

    Raises:
        ValueError: as `attend_text`.
    """
    _check(query, key, value)
    query, weight, key, value = query.contiguous(), weight.contiguous(), key.contiguous(), value.contiguous()
    if query.device.type == "cpu":
        normed = functional.rms_norm(query.float(), weight.shape, weight.float(), eps).to(query.dtype)
        seen = _in_float32(normed.unflatten(1, key.shape[2:]), key[0], value[0]).flatten(1)
        bound = value.float().abs().max().clamp_min(SMALLEST_AMAX)
        rounded = (seen * (FP8.limit / bound)).clamp(-FP8.limit, FP8.limit).to(FP8.dtype)
        return rounded, (bound / FP8.limit).repeat(len(query), 1)
    from engine.text_attention_triton import attend_text_round as on_card

    return on_card(query, weight, key, value, eps)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[0] != 1:
        raise ValueError(f"attention to a text takes one video at a time, not {key.shape[0]}")
    types = {x.dtype for x in (query, key, value)}
    if types != {torch.bfloat16}:
        raise ValueError(f"attention to a text takes bf16, not {', '.join(sorted(map(str, types)))}")


def _in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (n, heads, d), key and value (m, heads, d) -> (n, heads, d) float32."""
    count = distinct_rows(key, value)
    q, k, v = query.float(), key[: count + 1].float(), value[: count + 1].float()
    logits = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(query.shape[2])
    logits[..., count] += math.log(len(key) - count)
    return torch.einsum("hnm,mhd->nhd", logits.softmax(dim=-1), v).contiguous()


def distinct_rows(key: Tensor, value: Tensor) -> int:
    """How many rows of (m, heads, d) stand before those at the end that are all equal: 0 ... m - 1.

    Rows are equal where key and value are, bit for bit: a NaN is equal to itself, and 0 is not -0.
    """
    bits = torch.cat([key.flatten(1), value.flatten(1)], dim=1).view(torch.uint8)
    differs = (bits != bits[-1]).any(dim=1)
    return int((differs * torch.arange(1, len(key) + 1)).max())


@Proof
def problem(device: str) -> str | None:
    """Why the card's kernels are not to be used, or None: they are compared with float32, once a process."""
    try:
        ratio = _rounded_snr_db(device)
        if ratio < MIN_SNR_DB:
            return f"its rounded result is off (SNR {ratio:.1f} dB)"
        for repeated_from in TEST_TEXTS:
            error = _relative_error(device, *repeated_from)
            if error > MAX_RELATIVE_ERROR:
                return f"its result is off (relative error {error:.3f})"
        return "it hides a NaN" if _hides_a_nan(device) else None
    except Exception as failure:  # noqa: BLE001 a compiler may raise anything
        return f"it fails ({type(failure).__name__})"


def _relative_error(device: str, keys: int, values: int) -> float:
    """The kernel's `deviation`, the rows of key and value repeated from there on."""
    query, key, value = _drawn(device, keys, values)
    return deviation(attend_text(query, key, value), query, key, value)


def _rounded_snr_db(device: str) -> float:
    """Of `attend_text_round` against float32. Rows of other sizes, so that each needs its own norm."""
    query, key, value = _drawn(device, TEST_ROUNDED_TEXT, TEST_ROUNDED_TEXT)
    rows = (query[0].flatten(1).float() * torch.linspace(0.1, 9, TEST_TOKENS, device=device)[:, None]).to(query.dtype)
    weight = torch.linspace(0.5, 2, rows.shape[1], device=device).to(query.dtype)
    normed = functional.rms_norm(rows.float(), weight.shape, weight.float(), 1e-6).to(query.dtype)
    q, k, v = (x.float() for x in (normed.unflatten(1, key.shape[2:]), key[0], value[0]))
    weights = torch.softmax(torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[2]), dim=-1)
    wanted = torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)
    values_q, scales = attend_text_round(rows, weight, key, value, 1e-6)
    return snr_db(wanted, values_q.float() * scales)


def _hides_a_nan(device: str) -> bool:
    """Whether one that is in one row of the padding, of one head, is not in all that this head gives."""
    query, key, value = _drawn(device, 12, 12)
    key[0, 40, 0, 3] = float("nan")
    seen = attend_text(query, key, value).isnan()
    rounded, _ = attend_text_round(query[0].flatten(1), torch.ones_like(query[0, 0].flatten()), key, value, 1e-6)
    heads = rounded.float().isnan().unflatten(1, key.shape[2:])
    return any(not bool(found[:, 0].all()) or bool(found[:, 1:].any()) for found in (seen[0], heads))


def _drawn(device: str, keys: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, bf16, the rows of key and value repeated from there on.

    Twice the usual spread gives a peaked softmax, as in engine.attention.
    """
    generator = torch.Generator(device).manual_seed(7)
    query, key, value = (
        (2 * torch.randn(1, rows, TEST_HEADS, TEST_HEAD, generator=generator, device=device)).to(torch.bfloat16)
        for rows in (TEST_TOKENS, TEXT_TOKENS, TEXT_TOKENS)
    )
    key[:, keys:], value[:, values:] = key[:, -1:], value[:, -1:]
    return query, key, value
