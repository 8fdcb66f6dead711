"""The decoder's passes as kernels, against the same in float64, and against torch's operators bit for bit."""

import math

import pytest
import torch
from torch import Tensor

from engine.passes import TORCH, agree, place
from engine.passes_triton import TILE, TRITON

DECODERS_CHANNELS = [96, 192, 384]
# Of one program and of several, a tile that is exactly full and one pixel more, odd sides.
SHAPES = [(1, 1, 1), (1, 4, 4), (1, 1, 17), (2, 3, 5), (2, 7, 19)]
CHANNELS = [1, 3, 16, 96]
HALF_A_BF16 = 2.0**-8  # relative: what one rounding to 8 bits of significand may cost
FP32 = 2.0**-20  # sixteen roundings to fp32: sums over channels, a root, a division, products


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
    kept, room = torch.zeros(2, *x.shape[1:], dtype=x.dtype), torch.empty(2 + x.shape[0], *x.shape[1:], dtype=x.dtype)
    TRITON.norm_silu(x, bias, gamma, kept, room)
    return room[2:]


def exact_norm(x: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
    y = x.double() if bias is None else x.double() + bias.double()
    length = y.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return y * math.sqrt(x.shape[-1]) / length * gamma.double()


def is_near(made: Tensor, normed: Tensor, rounding: float) -> bool:
    """Whether it is SiLU(normed). The exponential turns an error of its argument into |argument| times that error."""
    wanted = normed / (1 + torch.exp(-normed))
    allowed = (rounding + FP32 * (1 + normed.abs())) * wanted.abs() + 2.0**-126
    return bool(((made.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 0.0), (torch.bfloat16, HALF_A_BF16)])
@pytest.mark.parametrize("biased", [True, False])
def test_norm_silu_is_rounded_once(shape, channels, dtype, rounding, biased):
    x, gamma = draw(*shape, channels, dtype=dtype), draw(channels, seed=1, dtype=dtype)
    bias = draw(channels, seed=2, dtype=dtype) if biased else None
    assert is_near(norm_silu(x, bias, gamma), exact_norm(x, bias, gamma), rounding)


def test_norm_silu_of_large_and_small_values_does_not_overflow():
    x = draw(1, 2, 3, 96)
    x[0, 0] *= 2.0**55  # squares up to 2**114, and 96 of them stay below 2**128
    x[0, 1] *= 2.0**-40
    gamma = draw(96, seed=1)
    x[0, 1, 2] = 0.0
    made = norm_silu(x, None, gamma)
    assert is_near(made[0, 0], exact_norm(x[0, 0], None, gamma), 0.0)
    assert is_near(made[0, 1, :2], exact_norm(x[0, 1, :2], None, gamma), 0.0)
    assert (made[0, 1, 2] == 0.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_silu_lets_no_pixel_spoil_another(bad):
    x, gamma = draw(1, 3, 5, 24), draw(24, seed=1)
    right = norm_silu(x, None, gamma)
    x[0, 1, 2, 7] = bad
    made, torchs = norm_silu(x, None, gamma), torch.empty(3, 3, 5, 24)
    TORCH.norm_silu(x, None, gamma, torch.zeros(2, 3, 5, 24), torchs)
    assert made[0, 1, 2].isnan().any()
    assert torch.equal(made.isnan(), torchs[2:].isnan())
    assert torch.equal(made.flatten(0, 2)[:7], right.flatten(0, 2)[:7])
    assert torch.equal(made.flatten(0, 2)[8:], right.flatten(0, 2)[8:])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 3), (8, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stacked", [True, False])
def test_norm_silu_places_the_bits_of_every_frame_where_torch_does(shape, channels, dtype, stacked):
    frames, *picture = shape
    x, gamma = draw(*shape, channels, dtype=dtype), draw(channels, seed=1, dtype=dtype)
    before = draw(2, *picture, channels, seed=2, dtype=dtype)
    before.flatten()[:: max(1, before.numel() // 4)] = math.nan
    room = torch.empty(frames, *picture, 3 * channels) if stacked else torch.empty(2 + frames, *picture, channels)
    mine, torchs = ((before.clone(), torch.empty_like(room, dtype=dtype)) for _ in range(2))
    TRITON.norm_silu(x, None, gamma, *mine)
    place(norm_silu(x, None, gamma), *torchs)
    assert all(torch.equal(bits(made), bits(wanted)) for made, wanted in zip(mine, torchs, strict=True))


@pytest.mark.parametrize("name", ["norm_silu", "norm_silu, stacked", "add"])
def test_nothing_but_the_room_given_is_written(name):
    around, before, bias = torch.full((11, 3, 5, 24), 7.0), draw(2, 3, 5, 24), draw(24, seed=2)
    kept, room = around[1:3], around[4:10] if "stacked" in name else around[4:8]
    kept.zero_()
    if name == "add":
        room.copy_(torch.cat([before, before]))
        assert TRITON.add(room, bias, room.clone()).data_ptr() == room.data_ptr()
    else:
        TRITON.norm_silu(before, bias, bias, kept, room.view(2, 3, 5, 72) if "stacked" in name else room)
    assert (around[[0, 3, 10]] == 7.0).all()
    assert (around[8:] == 7.0).all() or "stacked" in name
    assert (room != 7.0).all()


def test_input_that_does_not_lie_channels_last_is_read_right():
    x, gamma = draw(2, 24, 3, 5).permute(0, 2, 3, 1), draw(24, seed=1)
    assert torch.equal(norm_silu(x, None, gamma), norm_silu(x.contiguous(), None, gamma))
    assert torch.equal(TRITON.double_size(x), TORCH.double_size(x))
    assert torch.equal(TRITON.add(x, gamma, x), TORCH.add(x, gamma, x))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_is_the_sum_in_fp32_rounded_once(shape, channels, dtype):
    x, other = draw(*shape, channels, dtype=dtype), draw(*shape, channels, seed=1, dtype=dtype)
    bias = draw(channels, seed=2, dtype=dtype)
    wanted = (x.float() + bias.float() + other.float()).to(dtype)
    assert torch.equal(bits(TRITON.add(x, bias, other)), bits(wanted))


def test_add_hides_no_value_that_is_not_finite():
    x, other = torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3)
    x[0, 0, 0, 0], x[0, 0, 1, 1], x[0, 0, 2, 2], other[0, 0, 2, 2] = math.nan, -math.inf, math.inf, -math.inf
    made = TRITON.add(x, torch.zeros(3), other)
    wanted = torch.zeros(1, 1, 4, 3)
    wanted[0, 0, 0, 0], wanted[0, 0, 1, 1], wanted[0, 0, 2, 2] = math.nan, -math.inf, math.nan
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_size_copies_every_bit(shape, channels, dtype):
    x = draw(*shape, channels, dtype=dtype)
    x.flatten()[:: max(1, x.numel() // 4)] = torch.tensor(math.nan, dtype=dtype)
    assert torch.equal(bits(TRITON.double_size(x)), bits(TORCH.double_size(x)))


@pytest.mark.parametrize("channels", [24, *DECODERS_CHANNELS])
def test_agree_accepts_the_kernels(channels):
    assert agree(TRITON, "cpu", channels)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(pixel < pixels)", "(pixel < pixels - 1)"),
        ("(channel < channels)[None, :]", "(channel < channels - 1)[None, :]"),
        ("mask=channel < channels,", "mask=channel < channels - 1,"),
        ("            x += bias\n", "            x += 0.0\n"),
        ("    x += _each_channel(bias_at, channel, channels)\n    x += tl", "    x += tl"),
        ("(root / length)[:, None] * gamma", "(root / length)[:, None]"),
        ("x * x, axis=1", "x, axis=1"),
        ("y * tl.sigmoid(y)", "tl.sigmoid(y)"),
        ("down * 2 * width", "down * width"),
        ("mask=inside)\n    # Line", "mask=inside & (at > 0))\n    # Line"),
        ("oldest, mask=inside)\n            tl", "oldest, mask=inside & (at > 0))\n            tl"),
        ("            tl.store(room_at + channels + to, older, mask=inside)\n", ""),
        ("room_at + 2 * channels + to, new", "room_at + channels + to, new"),
        ("tl.store(room_at + to, oldest, mask=inside)\n        tl", "tl"),
        ("tl.store(room_at + frame + to, older", "tl.store(room_at + to, older"),
        ("room_at += 2 * frame", "room_at += frame"),
        ("room_at += 3 * frame", "room_at += 2 * frame"),
        ("            room_at += frame\n", ""),
        ("        x_at += frame\n", ""),
        ("        oldest = older\n", ""),
        ("        older = new\n", ""),
        ("oldest = older\n        older = new", "older = new\n        oldest = older"),
        ("[:, None] * 2 * channels", "[:, None] * channels"),
        ("oldest = tl.load(kept_at + at,", "oldest = tl.load(kept_at + frame + at,"),
        ("older = tl.load(kept_at + frame + at,", "older = tl.load(kept_at + at,"),
        ("tl.store(kept_at + at, oldest", "tl.store(kept_at + at, older"),
        ("    tl.store(kept_at + at, oldest, mask=inside)\n", ""),
        ("    tl.store(kept_at + frame + at, older, mask=inside)\n", ""),
        ("kept_at + frame + at, older, mask=inside", "kept_at + frame + at, older, mask=inside & (at > 0)"),
    ],
    ids=[
        "a pixel too few", "a channel too few", "a channel's bias or gamma too few", "no bias in the norm",
        "no bias in the sum", "no gamma", "no squares", "no SiLU", "lower lines in another place", "a value not read",
        "a value of the oldest not stacked", "the middle one not stacked", "the newest in the middle's place",
        "the oldest kept not placed", "both kept in one place", "the first over what is kept", "stacks that overlap",
        "all frames in one place", "one frame read for all", "the oldest stays", "the middle one stays",
        "the newest twice", "stacked pixels that overlap", "the second kept twice", "the first kept twice",
        "the last kept twice", "the last but one not kept", "the last not kept", "a value of the last not kept",
    ],
)  # fmt: skip
def test_agree_refuses_a_kernel_that_is_wrong(changed, old, new):
    assert not agree(changed("passes_triton", old, new).TRITON, "cpu", 24)


def test_shapes_of_these_tests_fill_a_tile_leave_one_open_and_need_several():
    pixels = [math.prod(shape) for shape in SHAPES]
    tile = TILE // 128  # of 96 channels
    assert tile in pixels
    assert tile + 1 in pixels
    assert min(pixels) < tile < max(pixels) // 10
