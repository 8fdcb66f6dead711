"""The passes of engine.passes as Triton kernels: each value is read once and written to where it is read next.

Imported on a card, and by tests/kernels, which runs them in Triton's interpreter.

Each program takes a tile of whole pixels, so that the norm over a pixel's channels stays in registers. Sums are fp32
and rounded once, where the operators of torch round after every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.passes import SMALLEST_NORM, Passes

TILE = 2048  # elements a program: 16 a thread with 4 warps


@triton.jit
def _tile(
    pixels: int, channels: tl.constexpr, block: tl.constexpr, tile: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of this program: its pixels, the channels, which of both exist, and where each value lies."""
    pixel = tl.program_id(0) * tile + tl.arange(0, tile)
    channel = tl.arange(0, block)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]  # 64 bits: long chunks pass 2**31 elements
    return pixel, channel, inside, at


@triton.jit
def _each_channel(values_at: tl.tensor, channel: tl.tensor, channels: tl.constexpr) -> tl.tensor:
    """A bias or gamma, to be used on every pixel of a tile."""
    return tl.load(values_at + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["frames", "pixels"])
def _norm_silu_kernel(
    x_at: tl.tensor,
    bias_at: tl.tensor,
    gamma_at: tl.tensor,
    kept_at: tl.tensor,
    room_at: tl.tensor,
    frames: int,
    pixels: int,
    channels: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
    root: tl.constexpr,
    smallest: tl.constexpr,
    has_bias: tl.constexpr,
    stacked: tl.constexpr,
) -> None:
    """`pixels`: of a frame. A program has its own of every frame in turn, and so those of the two before at hand."""
    pixel, channel, inside, at = _tile(pixels, channels, block, tile)
    frame = tl.cast(pixels, tl.int64) * channels  # 64 bits as in _tile
    gamma = _each_channel(gamma_at, channel, channels)
    if has_bias:
        bias = _each_channel(bias_at, channel, channels)
    oldest = tl.load(kept_at + at, mask=inside)
    older = tl.load(kept_at + frame + at, mask=inside)
    if stacked:
        to = at + pixel.to(tl.int64)[:, None] * 2 * channels
    else:
        to = at
        tl.store(room_at + to, oldest, mask=inside)
        tl.store(room_at + frame + to, older, mask=inside)
        room_at += 2 * frame
    for _ in range(frames):
        x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            x += bias
        length = tl.sqrt(tl.sum(x * x, axis=1))
        length = tl.where(length < smallest, smallest, length)  # a maximum would take the number for a NaN
        y = x * (root / length)[:, None] * gamma
        new = (y * tl.sigmoid(y)).to(room_at.dtype.element_ty)
        if stacked:
            tl.store(room_at + to, oldest, mask=inside)
            tl.store(room_at + channels + to, older, mask=inside)
            tl.store(room_at + 2 * channels + to, new, mask=inside)
            room_at += 3 * frame
        else:
            tl.store(room_at + to, new, mask=inside)
            room_at += frame
        x_at += frame
        oldest = older
        older = new
    tl.store(kept_at + at, oldest, mask=inside)
    tl.store(kept_at + frame + at, older, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _add_kernel(
    x_at: tl.tensor,
    bias_at: tl.tensor,
    other_at: tl.tensor,
    pixels: int,
    channels: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    _, channel, inside, at = _tile(pixels, channels, block, tile)
    x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
    x += _each_channel(bias_at, channel, channels)
    x += tl.load(other_at + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_at + at, x.to(x_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "width"])
def _double_size_kernel(
    x_at: tl.tensor,
    out_at: tl.tensor,
    pixels: int,
    width: int,
    channels: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    pixel, channel, inside, at = _tile(pixels, channels, block, tile)
    x = tl.load(x_at + at, mask=inside)
    # Line r of the picture becomes lines 2r and 2r + 1, each 2 * width pixels long.
    line, column = pixel // width, pixel % width
    upper = line.to(tl.int64) * 4 * width + 2 * column
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            to = upper + down * 2 * width + right
            tl.store(out_at + to[:, None] * channels + channel[None, :], x, mask=inside)


def _norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, kept: Tensor, room: Tensor) -> None:
    assert kept.is_contiguous(), "read and written by offset"
    assert room.is_contiguous(), "written by offset"
    x = x.contiguous()
    grid, pixels, channels, block, tile = _cut(x[0])
    _norm_silu_kernel[grid](
        x,
        gamma if bias is None else bias,  # some address; not read without has_bias
        gamma,
        kept,
        room,
        x.shape[0],
        pixels,
        channels,
        block,
        tile,
        root=channels**0.5,
        smallest=SMALLEST_NORM,
        has_bias=bias is not None,
        stacked=room.shape[-1] != channels,
    )


def _add(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    x, other = x.contiguous(), other.contiguous()
    grid, pixels, channels, block, tile = _cut(x)
    _add_kernel[grid](x, bias, other, pixels, channels, block, tile)
    return x


def _double_size(x: Tensor) -> Tensor:
    x = x.contiguous()
    f, h, w, c = x.shape
    out = torch.empty(f, 2 * h, 2 * w, c, dtype=x.dtype, device=x.device)
    grid, pixels, channels, block, tile = _cut(x)
    _double_size_kernel[grid](x, out, pixels, w, channels, block, tile)
    return out


def _cut(x: Tensor) -> tuple[tuple[int], int, int, int, int]:
    """Grid, pixels, channels, channels rounded up to a power of two, pixels a program."""
    channels = x.shape[-1]
    pixels = x.numel() // channels
    block = triton.next_power_of_2(channels)
    tile = max(1, TILE // block)
    return (triton.cdiv(pixels, tile),), pixels, channels, block, tile


TRITON = Passes(_norm_silu, _add, _double_size)
