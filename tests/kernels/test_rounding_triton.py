"""The roundings as kernels: in fp32 against float64, in 8 bits against literal values, and nothing hidden."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import rounding, rounding_triton
from engine.linear8 import widened_product
from engine.rounding import FP8

EPS = 1e-6
ROWS = 5
WIDTHS = [1, 16, 100, 513, 5120]  # one value, a power of two, none, one past, the models' own
# (n, d): one pair, one head of a power of two and of none, several heads of each, the models' own
HEADS = [(2, 2), (16, 16), (10, 10), (48, 16), (90, 6), (5120, 128)]
HALF_STEP = 2.0**-8  # of bf16, in parts of a value
FP32 = 2.0**-20  # sixteen roundings to fp32, in parts of a row's largest value
# Of 128 and 448 the format's own: what is left to round is nothing.
EVEN, ODD = [1.0, -1.0] * 8, [3.0, -3.0, 1.0, -1.0, 0.0]  # mean 0, deviation 1 and 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_gelu(x: Tensor) -> Tensor:
    v = x.double()
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    v = x.double()
    centred = v - v.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / spread * weight.double() + bias.double()


def exact_norm_rotate(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
    """`angles`: (rows, d / 2), one a pair."""
    v = x.double()
    normed = v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    even, odd = normed.unflatten(1, (-1, angles.shape[1], 2)).unbind(-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(1)


def tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each angle twice."""
    twice = angles.double().repeat_interleave(2, dim=1)
    return twice.cos().float(), twice.sin().float()


def check(made: tuple[Tensor, Tensor], wanted: Tensor, computed_at: Tensor | None = None) -> None:
    """Values of -448 ... 448 and a scale a row, before the values are rounded to 8 bits.

    `computed_at`: numbers of the size at which sums were rounded, where that is not the result's.
    """
    values, scale = made
    largest = wanted.abs().amax(-1, keepdim=True)
    error = FP32 * (largest if computed_at is None else computed_at.double().abs().amax(-1, keepdim=True))
    assert (values.dtype, scale.shape) == (torch.float32, (wanted.shape[0], 1))
    assert values.abs().max() <= 448.0 * (1 + 2**-22)  # up to 464 rounds to 448
    assert ((scale.double() * 448 - largest).abs() <= error).all()
    assert ((values.double() * scale.double() - wanted).abs() <= error).all()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels write fp32 where they write 8 bits else."""
    monkeypatch.setattr(rounding_triton, "FP8", replace(FP8, dtype=torch.float32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.usefixtures("wide")
def test_plain_round_scales_what_it_is_given(rows, width):
    x = draw(rows, width).bfloat16()
    check(rounding_triton.plain_round(x), x.double())


@pytest.mark.parametrize(("width", "head"), HEADS)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("times", [1.0, EPS])  # of the second, eps is all that counts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_rotate_norms_the_row_and_turns_each_head(rows, width, head, times, dtype, monkeypatch):
    x, weight = (times * draw(rows, width)).bfloat16(), draw(width, seed=1).to(dtype)
    angles = 3 * draw(rows, head // 2, seed=2)
    wanted = exact_norm_rotate(x, weight, angles)
    out = rounding_triton.norm_rotate(x, weight, *tables(angles), EPS)
    assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)
    fp32 = FP32 * wanted.abs().amax(-1, keepdim=True)
    assert ((out.double() - wanted).abs() <= HALF_STEP * (wanted.abs() + fp32) + fp32).all()


def test_norm_rotate_is_exact_where_fp32_is():
    """Quarter turns of a row whose mean square is 1, of two heads with the same angles."""
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0]] * 2).bfloat16()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).bfloat16()
    cos = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -1.0, -1.0]])
    sin = torch.tensor([[0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, 0.0, 0.0]])
    out = rounding_triton.norm_rotate(x, weight, cos, sin, 0.0)
    assert out.tolist() == [
        [1.0, -2.0, -4.0, 3.0, -5.0, -6.0, 8.0, 7.0],
        [-2.0, -1.0, -3.0, -4.0, -6.0, 5.0, -7.0, 8.0],
    ]


def test_norm_rotate_rounds_once():
    """1 + 2^-8 + 2^-16 is above the middle of two bf16 values; a norm that is bf16 itself would lose the last."""
    cos, sin = torch.ones(1, 2), torch.full((1, 2), 2.0**-16)
    weight = torch.tensor([1.0, 1.0 + 2.0**-8])
    out = rounding_triton.norm_rotate(torch.ones(1, 2).bfloat16(), weight, cos, sin, 0.0)
    assert out[0, 1].item() == 1.0078125


def test_norm_rotate_keeps_a_row_of_zeros():
    angles = draw(2, 8)
    out = rounding_triton.norm_rotate(torch.zeros(2, 48).bfloat16(), draw(48, seed=1), *tables(angles), EPS)
    assert (out == 0.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_rotate_lets_no_other_row_see_one_that_is_not_finite(bad):
    x, weight, angles = draw(ROWS, 48).bfloat16(), draw(48, seed=1), draw(ROWS, 8, seed=2)
    right = rounding_triton.norm_rotate(x, weight, *tables(angles), EPS)
    x[2, 7] = bad
    out = rounding_triton.norm_rotate(x, weight, *tables(angles), EPS)
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], right[others])
    assert out[2, 6:8].isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.usefixtures("wide")
def test_gelu_round_scales_gelu(rows, width):
    x = draw(rows, width).bfloat16()
    check(rounding_triton.gelu_round(x), exact_gelu(x), x)  # 1 + tanh of a negative number is small


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.usefixtures("wide")
def test_norm_round_scales_the_norm(rows, width):
    x, weight, bias = (3 * draw(rows, width)).bfloat16(), draw(width, seed=1), draw(width, seed=2)
    check(rounding_triton.norm_round(x, weight, bias, EPS), exact_norm(x, weight, bias))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.usefixtures("wide")
def test_add_norm_round_scales_the_norm_of_the_sum_that_it_returns(width, gated):
    x, added = draw(ROWS, width).bfloat16(), draw(ROWS, width, seed=3).bfloat16()
    weight, bias, gate = draw(width, seed=1), draw(width, seed=2), draw(width, seed=4) if gated else None
    total, *made = rounding_triton.add_norm_round(x, added, gate, weight, bias, EPS)
    wanted = x.float() + (added.float() if gate is None else added.float() * gate)
    assert torch.equal(total, wanted.bfloat16())
    check(tuple(made), exact_norm(total, weight, bias))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("wide")
def test_add_gated_rounds_the_sum_once(width):
    x, added, gate = draw(ROWS, width).bfloat16(), draw(ROWS, width, seed=3).bfloat16(), draw(width, seed=4)
    assert torch.equal(rounding_triton.add_gated(x, added, gate), (x.float() + added.float() * gate).bfloat16())


def run(name: str, module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    weight, bias = draw(width, seed=1), draw(width, seed=2)
    if name == "plain":
        return module.plain_round(x)
    if name == "gelu":
        return module.gelu_round(x)
    if name == "norm":
        return module.norm_round(x, weight, bias, EPS)
    return module.add_norm_round(x, x.flip(0), draw(width, seed=4), weight, bias, EPS)[1:]


KERNELS = ["plain", "gelu", "norm", "add_norm"]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_values_are_the_nearest_of_8_bits(name, width, monkeypatch):
    x = draw(ROWS, width).bfloat16()
    values, scale = run(name, rounding_triton, x)
    monkeypatch.setattr(rounding_triton, "FP8", replace(FP8, dtype=torch.float32))
    before, same_scale = run(name, rounding_triton, x)
    assert torch.equal(values.view(torch.uint8), before.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(scale, same_scale)


@pytest.mark.parametrize(
    ("row", "weight", "bias", "wanted"),
    [
        (EVEN, [448.0] * 16, [0.0] * 16, [448.0, -448.0] * 8),
        (EVEN, [64.0, 2.0] * 8, [384.0, -6.0] * 8, [448.0, -8.0] * 8),
        (ODD, [128.0] * 5, [256.0, -256.0, 0.0, 0.0, -1.5], [448.0, -448.0, 64.0, -64.0, -1.5]),
    ],
)
@pytest.mark.parametrize("times", [1.0, 2.0**20, 2.0**-20])
def test_norm_round_is_exact_where_fp32_is(row, weight, bias, wanted, times):
    """`times` goes into the scale alone."""
    x = torch.tensor([row]).bfloat16()
    values, scale = rounding_triton.norm_round(x, times * torch.tensor(weight), times * torch.tensor(bias), 0.0)
    assert values.float().tolist() == [wanted]
    assert scale.tolist() == [[times]]


def test_sum_is_rounded_to_the_even_neighbour():
    x = torch.tensor([[1.0, 1.0, 1.0, -1.0]]).bfloat16()
    added = torch.tensor([[2.0**-8, 3 * 2.0**-8, 5 * 2.0**-9, -(2.0**-8)]]).bfloat16()
    total, *_ = rounding_triton.add_norm_round(x, added, None, torch.ones(4), torch.zeros(4), EPS)
    assert total.tolist() == [[1.0, 1.015625, 1.0078125, -1.0]]


@pytest.mark.parametrize("name", KERNELS)
def test_row_of_zeros_divides_by_no_zero(name):
    x = torch.zeros(2, 100).bfloat16()
    values, scale = {
        "plain": lambda: rounding_triton.plain_round(x),
        "gelu": lambda: rounding_triton.gelu_round(x),
        "norm": lambda: rounding_triton.norm_round(x, torch.ones(100), torch.zeros(100), EPS),
        "add_norm": lambda: rounding_triton.add_norm_round(x, x, None, torch.ones(100), torch.zeros(100), EPS)[1:],
    }[name]()
    assert (values.float() == 0.0).all()
    assert scale.tolist() == [[pytest.approx(1e-12 / 448)]] * 2


def test_largest_values_stay_within_the_format():
    huge = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[huge, -huge, huge / 2, 1.0], [-huge, -1.0, -20.0, 0.0]]).bfloat16()
    values, scale = rounding_triton.gelu_round(x)
    assert values[0].float().tolist() == [448.0, 0.0, 224.0, 0.0]
    assert scale[0].item() == pytest.approx(huge / 448)
    assert values[1].float().tolist() == [0.0, -448.0, 0.0, 0.0]  # GELU of -1 is -0.159, of -20 and less it is 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_product_makes_a_finite_number_of_a_row_that_is_not(name, bad):
    x = draw(ROWS, 100).bfloat16()
    right = run(name, rounding_triton, x)
    x[2, 7] = bad  # the middle one: a sum with the rows in reverse order meets it once
    values, scale = run(name, rounding_triton, x)
    others = [0, 1, 3, 4]
    assert torch.equal(values[others].view(torch.uint8), right[0][others].view(torch.uint8))
    assert torch.equal(scale[others], right[1][others])
    weight_q, weight_scale = draw(32, 100, seed=5).to(torch.float8_e4m3fn), torch.ones(32)
    out = widened_product(values, scale, weight_q, weight_scale, None, torch.bfloat16)
    assert out.isfinite().any(dim=-1).tolist() == [True, True, False, True, True]


def test_infinity_that_is_no_part_of_the_scale_would_be_the_formats_largest(changed: Callable[..., ModuleType]):
    """The control of the test before: a card hides it."""
    finite = changed("rounding_triton", "tl.maximum(largest, smallest)", "tl.minimum(largest, 1e38)")
    x = torch.ones(1, 16).bfloat16()
    x[0, 7] = math.inf
    values, scale = finite.plain_round(x)
    assert (values[0, 7].item(), scale.isfinite().item()) == (448.0, True)


def problem(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a worker's start would say of these kernels."""
    for name in ("plain_round", "gelu_round", "norm_round", "add_norm_round", "norm_rotate", "add_gated"):
        monkeypatch.setattr(rounding, name, getattr(module, name))
    return rounding.problem.__wrapped__("cpu")


def test_self_test_accepts_the_kernels(monkeypatch):
    assert problem(rounding_triton, monkeypatch) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=inside)\n    tl.store(scale_at", "mask=inside & (value < 2.5))\n    tl.store(scale_at"),
        ("tl.where(inside, tl.abs(value), 0.0)", "tl.where(inside & (value < 0.5), tl.abs(value), 0.0)"),
        ("tl.where(inside, value - mean, 0.0)", "value - mean"),
        ("tl.where(inside, value - mean, 0.0)", "tl.where(inside, value, 0.0)"),
        ("* weight + bias", "* weight"),
        ("* spread * weight", "* spread"),
        ("if has_gate:", "if has_gate and not has_gate:"),
        ("(value + more)", "(value)"),
        ("half = 0.5 * value", "half = -0.5 * value"),
        ("largest / limit)", "limit / largest)"),
        ("out_at.dtype.element_ty), mask=inside", "out_at.dtype.element_ty), mask=columns < width - 1"),
        ("tl.sum(value * value, axis=0) / width", "tl.sum(value * value, axis=0) / block"),
        ("value * root * tl.load(weight_at + columns, mask=inside, other=0.0).to(tl.float32)", "value * root"),
        ("tl.join(-odd, even)", "tl.join(odd, -even)"),
        ("tl.join(-odd, even)", "tl.join(-even, odd)"),
        ("row * head + columns % head", "columns % head"),
        ("row * head + columns % head", "row * head + columns * 0"),
        ("(x + gated)", "x"),
        ("gated = added * tl.load", "gated = added + 0 * tl.load"),
        ("sum_at.dtype.element_ty), mask=inside)", "sum_at.dtype.element_ty), mask=columns < width - 1)"),
    ],
    ids=[
        "what is large not written", "the largest of the small", "a norm over more than the row", "no mean", "no bias",
        "no weight", "no gate", "no sum", "GELU the other way round", "the scale upside down",
        "a rotated column not written", "a mean square over more than the row", "no weight before the rotation",
        "a rotation the other way round", "no partner", "one row's angles", "one angle", "no last sum", "no last gate",
        "a last column not written",
    ],
)  # fmt: skip
def test_self_test_refuses_a_kernel_that_is_wrong(old, new, changed: Callable[..., ModuleType], monkeypatch):
    monkeypatch.setattr(rounding, "TEST_ROWS", ROWS)
    assert "a result is off" in str(problem(changed("rounding_triton", old, new), monkeypatch))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        here = there\n", ""),
        ("x_at + there", "x_at + here"),
        ("added_at + there", "added_at + here"),
        ("(row + step < rows)", "(row + step < rows - 1)"),
    ],
    ids=["written over the first", "the row before", "the sum with the row before", "the last not read"],
)
def test_self_test_sees_a_programs_later_rows_however_many_a_card_runs(
    old, new, changed: Callable[..., ModuleType], monkeypatch
):
    module = changed("rounding_triton", old, new)
    monkeypatch.setattr(module, "_most_norm_programs", lambda _device: 264)  # an H200's
    assert "a result is off" in str(problem(module, monkeypatch))
