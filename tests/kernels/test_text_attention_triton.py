"""Attention to a text as kernels: against plain attention in float64, the rows that are counted, and nothing hidden."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from engine import text_attention, text_attention_triton
from engine.text_attention_triton import KEYS, QUERIES

BF16 = 2.0**-8  # half a step, in parts of a value
FP32 = 2.0**-18  # of 512 products and their sum, in parts of their sizes' sum
KEYS_OF_A_TEXT = 130  # four tiles and a part; the interpreter takes a row at a time of the models' 512
PROMPTS = [1, 12, 63, 64, 65, 128, 129, 130]
SIZES = [(1, 1, 16), (QUERIES, 2, 16), (QUERIES + 1, 3, 48), (QUERIES - 1, 1, 128), (2 * QUERIES + 7, 2, 16)]


@pytest.fixture(autouse=True)
def product_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as its 16 bits, and multiplies these as whole numbers. A card widens them."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(one: Any) -> Any:
        assert one.dtype == interpreter.tl.bfloat16
        wide = (one.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda builder, a, b, *rest: plain(builder, widened(a), widened(b), *rest),
    )


def draw(tokens: int, heads: int, width: int, keys: int = KEYS_OF_A_TEXT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(keys + width)
    query, key, value = (
        (2 * torch.randn(1, rows, heads, width, generator=generator)).bfloat16() for rows in (tokens, keys, keys)
    )
    return query, key, value


def text(
    real: int, tokens: int = 5, heads: int = 2, width: int = 16, keys: int = KEYS_OF_A_TEXT
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that are equal from row `real` on."""
    query, key, value = draw(tokens, heads, width, keys)
    key[:, real:], value[:, real:] = key[:, -1:], value[:, -1:]
    return query, key, value


def rows_of(query: Tensor) -> tuple[Tensor, Tensor]:
    """(n, heads * d) as a projection gives it: of another size each, and a weight for their norm."""
    rows = (query[0].flatten(1).float() * torch.linspace(0.1, 9, query.shape[1])[:, None]).bfloat16()
    return rows, torch.linspace(0.5, 2, rows.shape[1]).bfloat16()


def distinct_rows(key: Tensor, value: Tensor) -> int:
    return int(text_attention_triton.survey(key, value)[0])


def largest(key: Tensor, value: Tensor) -> Tensor:
    """The bound of all values that the survey finds."""
    bits = text_attention_triton.survey(key, value)[1]
    return (bits << 16).view(torch.float32)


def check(made: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Weights that are bf16 in the product with the values, a sum in fp32, and one rounding to bf16."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (query, key, value))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=-1)
    wanted, most = ((weights @ x).transpose(0, 1)[None] for x in (v, v.abs()))
    assert (made.dtype, made.shape) == (torch.bfloat16, query.shape)
    assert ((made.double() - wanted).abs() <= BF16 * (wanted.abs() + most) * (1 + BF16) + FP32 * most).all()


@pytest.mark.parametrize("real", PROMPTS)
def test_attention_to_a_padded_text_is_plain_attention(real):
    given = text(real)
    check(text_attention_triton.attend_text(*given), *given)


@pytest.mark.parametrize(("tokens", "heads", "width"), SIZES)
@pytest.mark.parametrize("real", [1, 12, 80])
def test_rounded_attention_is_attention_of_the_normed_query_rounded_once(real, tokens, heads, width):
    query, key, value = text(real, tokens, heads, width, keys=80)
    rows, weight = rows_of(query)
    values, scales = text_attention_triton.attend_text_round(rows, weight, key, value, 1e-6)
    wanted, wanted_scales = text_attention.attend_text_round(rows, weight, key, value, 1e-6)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, rows.shape)
    torch.testing.assert_close(scales, wanted_scales, rtol=2.0**-22, atol=0)
    # What is seen errs by a rounding of the weights to bf16, and may be rounded to the next of the 8-bit numbers.
    step = (wanted.float().abs() / 8).clamp_min(2.0**-9) + 448 * 4 * BF16
    assert ((values.float() - wanted.float()).abs() <= step).all()
    assert (values.float() != wanted.float()).float().mean() < 0.25


@pytest.mark.parametrize("value", [0.0, -3.5, 3.0e38, 1e-38, math.inf, -math.inf])
def test_bound_of_the_values_is_the_largest_whatever_its_sign(value):
    _, key, values = text(12)
    values.clamp_(-abs(value), abs(value))
    values[0, 77, 1, 3] = value
    assert torch.equal(largest(key, values), values.float().abs().max())


def test_bound_of_values_with_a_nan_is_none():
    _, key, values = text(12)
    values[0, 40, 0, 1] = math.nan
    values[0, 41, 0, 1] = math.inf
    assert largest(key, values).isnan()


def test_values_of_zero_are_rounded_to_zero():
    query, key, value = text(12)
    values, scales = text_attention_triton.attend_text_round(*rows_of(query), key, torch.zeros_like(value), 1e-6)
    assert (values.float() * scales == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_product_makes_a_number_of_what_is_none(bad):
    query, key, value = text(12)
    rows, weight = rows_of(query)

    def is_nan(rows: Tensor, value: Tensor) -> list[bool]:
        values, scales = text_attention_triton.attend_text_round(rows, weight, key, value, 1e-6)
        found: list[bool] = (values.float() * scales).sum(1).isnan().tolist()
        return found

    bad_row, bad_value = rows.clone(), value.clone()
    bad_row[2, 7] = bad_value[0, 40, 0, 1] = bad
    assert is_nan(rows, value) == [False] * 5
    assert is_nan(bad_row, value) == [False, False, True, False, False]
    assert is_nan(rows, bad_value) == [True] * 5


@pytest.mark.parametrize("real", [1, 65, 130])
def test_kernel_gives_what_the_cpu_gives(real):
    given = text(real)
    made, wanted = text_attention_triton.attend_text(*given), text_attention.attend_text(*given)
    torch.testing.assert_close(made, wanted, rtol=4 * BF16, atol=2 * BF16 * given[2].abs().max().item())


@pytest.mark.parametrize(("tokens", "heads", "width"), SIZES)
def test_attention_of_any_number_of_queries_heads_and_widths_is_plain_attention(tokens, heads, width):
    given = text(70, tokens, heads, width, keys=80)
    check(text_attention_triton.attend_text(*given), *given)


@pytest.mark.parametrize("keys", [1, 2, KEYS, KEYS + 1, 100, 512])
def test_attention_to_a_text_of_any_length_is_plain_attention(keys):
    given = draw(5, 2, 16, keys)
    check(text_attention_triton.attend_text(*given), *given)


def test_attention_to_nothing_but_padding_gives_its_value():
    query, key, value = text(0)
    out = text_attention_triton.attend_text(query, key, value)
    assert torch.equal(out, value[:, -1:].expand_as(out))


@pytest.mark.parametrize(
    ("keys", "values", "count"),
    [(0, 0, 0), (1, 1, 1), (64, 64, 64), (129, 129, 129), (130, 130, 129), (12, 100, 100), (100, 12, 100)],
)
def test_rows_at_the_end_are_counted_where_key_and_value_are_equal(keys, values, count):
    _, key, value = draw(1, 2, 16)
    key[:, keys:], value[:, values:] = key[:, -1:], value[:, -1:]
    assert distinct_rows(key, value) == count
    assert text_attention.distinct_rows(key[0], value[0]) == count


@pytest.mark.parametrize(("first", "other"), [(math.nan, 1.0), (1.0, math.nan), (0.0, -0.0), (1.0, 1.0 + 2.0**-7)])
@pytest.mark.parametrize("of", ["key", "value"])
def test_rows_that_differ_in_one_number_are_not_equal(first, other, of):
    _, key, value = text(12)
    changed = key if of == "key" else value
    changed[:, 12:, 1, 15] = first
    changed[:, 100, 1, 15] = other
    assert distinct_rows(key, value) == 101


def test_row_of_nan_is_equal_to_itself():
    _, key, value = text(12)
    key[:, 12:, 0, 3] = math.nan
    assert distinct_rows(key, value) == 12


@pytest.mark.parametrize("rows", [slice(12, 130), slice(40, 41), slice(3, 4)])
@pytest.mark.parametrize("of", ["key", "value"])
def test_nan_is_in_the_result_of_its_head_alone(rows, of):
    query, key, value = text(12)
    right = text_attention_triton.attend_text(query, key, value)
    (key if of == "key" else value)[:, rows, 0, 3] = math.nan
    out = text_attention_triton.attend_text(query, key, value)
    assert out[:, :, 0, 3].isnan().all()
    assert out[:, :, 0].isnan().all() == (of == "key")
    torch.testing.assert_close(out[:, :, 1], right[:, :, 1], rtol=2 * BF16, atol=2 * BF16)


def test_query_that_is_not_finite_is_seen_by_no_other():
    query, key, value = text(70)
    right = text_attention_triton.attend_text(query, key, value)
    query[0, 2, 0, 7] = math.nan
    out = text_attention_triton.attend_text(query, key, value)
    assert out[0, 2, 0].isnan().all()
    assert torch.equal(out[:, [0, 1, 3, 4]], right[:, [0, 1, 3, 4]])
    assert torch.equal(out[0, 2, 1], right[0, 2, 1])


def problem(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a worker's start would say of these kernels, asked for fewer and smaller heads and a shorter text: the
    interpreter takes them one by one, and what is wrong is so in two."""
    monkeypatch.setattr(text_attention, "TEXT_TOKENS", 192)
    monkeypatch.setattr(text_attention, "TEST_TEXTS", ((12, 12), (64, 64), (192, 192), (12, 150), (150, 12)))
    monkeypatch.setattr(text_attention, "TEST_HEADS", 2)
    monkeypatch.setattr(text_attention, "TEST_HEAD", 32)
    monkeypatch.setattr(text_attention, "attend_text", module.attend_text)
    monkeypatch.setattr(text_attention, "attend_text_round", module.attend_text_round)
    return text_attention.problem.__wrapped__("cpu")


def test_self_test_accepts_the_kernels(monkeypatch):
    assert problem(text_attention_triton, monkeypatch) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" + tl.where(index == count, repeats, 0.0)[None, :]", ""),
        ("(keys - count).to", "(keys - count + 1).to"),
        ("tl.range(0, count + 1, tile", "tl.range(0, count, tile"),
        ("tl.where((index <= count)[None, :], logits, float(\"-inf\"))", "logits"),
        ("(key != tl.load(key_at + last, mask=inside, other=0)) | (", "("),
        ("value != tl.load(value_at + last, mask=inside, other=0)", "False"),
        ("found_at, row + 1", "found_at, row"),
        ("found * fade[:, None]", "found"),
        ("total * fade", "total"),
        ("        largest = larger\n", ""),
        (" * scale +", " +"),
        ("return found / total[:, None]", "return found"),
        ("(first + row < tokens)", "(first + row < tokens - 1)"),
        ("(index[:, None] * heads + head)", "(index[:, None] * heads)"),
        ("tl.program_id(0) // heads * queries", "tl.program_id(0) // heads"),
    ],
    ids=[
        "padding counts as one key", "one too many", "padding that begins a tile left out", "keys that are not there",
        "equal values are enough", "equal keys are enough", "a row too few", "what was found does not fade",
        "the sum does not fade", "the largest is forgotten", "no scale", "not divided by the sum",
        "a query not written", "the first head's keys", "tiles that overlap",
    ],
)  # fmt: skip
def test_self_test_refuses_a_kernel_that_is_wrong(old, new, changed: Callable[..., ModuleType], monkeypatch):
    assert "result is off" in str(problem(changed("text_attention_triton", old, new), monkeypatch))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value * root[:, None] * weight[None, :]", "value * weight[None, :]"),
        ("value * root[:, None] * weight[None, :]", "value * root[:, None]"),
        ("weight_at + head * width + column", "weight_at + column"),
        ("roots_at + number, mask", "roots_at + number % queries, mask"),
        ("tl.sum(value * value, axis=0) / width + eps", "tl.sum(value * value, axis=0) + eps"),
        ("(limit / bound)", "(limit / bound / 2)"),
        ("+ bound / limit, mask=exists & (head == 0)", "+ bound / limit, mask=exists & (number < queries)"),
        ("& 0x7FFF, axis=0", "& 0x3FFF, axis=0"),
        ("tl.max(value.to(tl.int32) & 0x7FFF, axis=0)", "tl.max(value.to(tl.int32), axis=0) // 2"),
        ("bound / limit, mask", "bound / limit * 1.07, mask"),
    ],
    ids=[
        "no norm", "a norm without its weight", "the first head's weight", "the first tile's norms", "no mean",
        "rounded by another scale", "scales of the first tile only", "a bound without its largest bit",
        "a bound far too small", "a scale of its own",
    ],
)  # fmt: skip
def test_self_test_refuses_a_rounding_kernel_that_is_wrong(old, new, changed: Callable[..., ModuleType], monkeypatch):
    said = problem(changed("text_attention_triton", old, new), monkeypatch)
    assert "its rounded result is off" in str(said)


def test_self_test_refuses_a_kernel_to_which_a_nan_is_equal_to_all(changed: Callable[..., ModuleType], monkeypatch):
    wide = ".to(tl.bfloat16, bitcast=True).to(tl.float32)"
    old = "(key != tl.load(key_at + last, mask=inside, other=0))"
    new = f"(tl.abs(key{wide} - tl.load(key_at + last, mask=inside, other=0){wide}) > 0)"
    assert problem(changed("text_attention_triton", old, new), monkeypatch) == "it hides a NaN"
