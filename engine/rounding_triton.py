"""The kernels of engine.rounding: the row in registers, read once, computed once, written once.

Most are a program a row. That of the norms is a few programs a multiprocessor, each taking every so-many-th row:
weight and bias stay in its registers, where a program a row would read two to four times as many bytes of them as of
the row, and the next row is on its way while one is computed. At the clock that an H200 keeps at its power limit that
is 0.44 ms in place of 0.56 for 34,320 rows of 5,120 with a residual sum, and 0.20 in place of 0.31 without.

Imported on a card, and by tests/kernels, which runs them in Triton's interpreter.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.linear8 import KINDS, SMALLEST_AMAX

FP8 = KINDS["fp8"]
ELEMENTS_A_THREAD = 128
ELEMENTS_A_NORM_THREAD = 64  # beside two parameters of each
NORMS_A_MULTIPROCESSOR = 2  # programs: all that its registers hold at the models' width, 5,120
# Each at least so many, or weight and bias are read for little. And so the self-test's few rows go round the loop on
# any card, however many programs it holds.
ROWS_A_NORM_PROGRAM = 4
THREADS_A_WARP = 32


@triton.jit
def _store_rounded(value: tl.tensor, inside: tl.tensor, values_at: tl.tensor, scale_at: tl.tensor,
                   smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    largest = tl.max(tl.where(inside, tl.abs(value), 0.0), axis=0)
    largest = tl.maximum(largest, smallest)
    # One division a row. What is a bit above the limit is rounded to it; an infinity times 0 is a NaN, which stays one.
    rounded = value * (limit / largest)
    tl.store(values_at, rounded.to(values_at.dtype.element_ty), mask=inside)
    tl.store(scale_at, largest / limit)


@triton.jit
def _norm(value: tl.tensor, inside: tl.tensor, weight: tl.tensor, bias: tl.tensor, width: tl.constexpr,
          eps: tl.constexpr) -> tl.tensor:  # fmt: skip
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(inside, value - mean, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * spread * weight + bias


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", constraints="=r,r", args=[x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _plain_round_kernel(x_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor, width: tl.constexpr,
                        block: tl.constexpr, smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    here = row * width + columns
    value = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    _store_rounded(value, inside, values_at + here, scales_at + row, smallest, limit)


@triton.jit
def _gelu_round_kernel(x_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor, width: tl.constexpr,
                       block: tl.constexpr, smallest: tl.constexpr, limit: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    here = row * width + columns
    value = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    # torch's gelu(approximate="tanh"), with the card's own tanh. That errs by 2**-11, so the result by up to v / 4096,
    # where three bits err by a sixteenth of the result; a sigmoid is two such operations, and their rate, not memory,
    # was what the kernel waited for.
    bent = _tanh(value * (0.7978845608028654 + 0.035677408136300125 * value * value))
    half = 0.5 * value
    value = half * bent + half
    _store_rounded(value, inside, values_at + here, scales_at + row, smallest, limit)


@triton.jit(do_not_specialize=["rows"])
def _norm_round_kernel(x_at: tl.tensor, added_at: tl.tensor, gate_at: tl.tensor, weight_at: tl.tensor,
                       bias_at: tl.tensor, sum_at: tl.tensor, values_at: tl.tensor, scales_at: tl.tensor,
                       rows: tl.tensor, width: tl.constexpr, block: tl.constexpr, eps: tl.constexpr,
                       has_added: tl.constexpr, has_gate: tl.constexpr, smallest: tl.constexpr,
                       limit: tl.constexpr) -> None:  # fmt: skip
    first, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, block)
    inside = columns < width
    weight = tl.load(weight_at + columns, mask=inside, other=0.0)
    bias = tl.load(bias_at + columns, mask=inside, other=0.0)
    here = first.to(tl.int64) * width  # where a row begins
    x = tl.load(x_at + here + columns, mask=inside, other=0.0)
    if has_added:
        added = tl.load(added_at + here + columns, mask=inside, other=0.0)
    for row in range(first, rows, step):
        value = x.to(tl.float32)
        there = here + step.to(tl.int64) * width
        follows = inside & (row + step < rows)
        x = tl.load(x_at + there + columns, mask=follows, other=0.0)
        if has_added:
            more = added.to(tl.float32)
            added = tl.load(added_at + there + columns, mask=follows, other=0.0)
            if has_gate:  # in no register: with it they would hold one program less
                more = more * tl.load(gate_at + columns, mask=inside, other=0.0)
            total = (value + more).to(sum_at.dtype.element_ty)
            tl.store(sum_at + here + columns, total, mask=inside)
            value = total.to(tl.float32)
        value = _norm(value, inside, weight, bias, width, eps)
        _store_rounded(value, inside, values_at + here + columns, scales_at + row, smallest, limit)
        here = there


@triton.jit
def _norm_rotate_kernel(x_at: tl.tensor, weight_at: tl.tensor, cos_at: tl.tensor, sin_at: tl.tensor,
                        out_at: tl.tensor, width: tl.constexpr, block: tl.constexpr, head: tl.constexpr,
                        eps: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(x_at + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    normed = value * root * tl.load(weight_at + columns, mask=inside, other=0.0).to(tl.float32)
    # A thread holds both of a pair: they change places in its registers, where a load of columns ^ 1 is 2 bytes wide.
    even, odd = tl.split(tl.reshape(normed, (block // 2, 2)))
    partner = tl.reshape(tl.join(-odd, even), (block,))
    angle = row * head + columns % head
    cos = tl.load(cos_at + angle, mask=inside, other=0.0)
    sin = tl.load(sin_at + angle, mask=inside, other=0.0)
    turned = normed * cos + partner * sin
    tl.store(out_at + row * width + columns, turned.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _add_gated_kernel(x_at: tl.tensor, added_at: tl.tensor, gate_at: tl.tensor, sum_at: tl.tensor,
                      width: tl.constexpr, block: tl.constexpr) -> None:  # fmt: skip
    columns = tl.arange(0, block)
    inside = columns < width
    here = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(added_at + here, mask=inside, other=0.0).to(tl.float32)
    gated = added * tl.load(gate_at + columns, mask=inside, other=0.0)
    tl.store(sum_at + here, (x + gated).to(sum_at.dtype.element_ty), mask=inside)


def plain_round(x: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(_plain_round_kernel, x)


def gelu_round(x: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(_gelu_round_kernel, x)


def _rounded(kernel: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = _room(x)
    rows, width = x.shape
    kernel[(rows,)](x, values, scales, width, _block(width), SMALLEST_AMAX, FP8.limit, num_warps=_warps(width))
    return values, scales


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    rows, width = x.shape
    _norm_rotate_kernel[(rows,)](
        x, weight, cos, sin, out, width, _block(width), cos.shape[1], eps, num_warps=_warps(width)
    )
    return out


def add_gated(x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    total = torch.empty_like(x)
    rows, width = x.shape
    _add_gated_kernel[(rows,)](x, added, gate, total, width, _block(width), num_warps=_warps(width))
    return total


def norm_round(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values, scales = _room(x)
    _normalise(x, None, None, weight, bias, None, values, scales, eps)
    return values, scales


def add_norm_round(
    x: Tensor, added: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = _room(x)
    total = torch.empty_like(x)
    _normalise(x, added, gate, weight, bias, total, values, scales, eps)
    return total, values, scales


def _normalise(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    total: Tensor | None,
    values: Tensor,
    scales: Tensor,
    eps: float,
) -> None:
    rows, width = x.shape
    programs = min(triton.cdiv(rows, ROWS_A_NORM_PROGRAM), _most_norm_programs(x.device))
    _norm_round_kernel[(programs,)](
        x,
        x if added is None else added,  # some address: not read without has_added
        weight if gate is None else gate,
        weight,
        bias,
        x if total is None else total,
        values,
        scales,
        rows,
        width,
        _block(width),
        eps,
        added is not None,
        gate is not None,
        SMALLEST_AMAX,
        FP8.limit,
        num_warps=_warps(width, ELEMENTS_A_NORM_THREAD),
    )


def _room(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8.dtype), torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _block(width: int) -> int:
    block: int = triton.next_power_of_2(width)
    return block


def _warps(width: int, elements_a_thread: int = ELEMENTS_A_THREAD) -> int:
    return max(1, min(16, _block(width) // (elements_a_thread * THREADS_A_WARP)))


@cache
def _most_norm_programs(device: torch.device) -> int:
    """The interpreter, which has no card, plays one of a single multiprocessor."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return count * NORMS_A_MULTIPROCESSOR
