"""Attention to a text whose padding counts once: what plain attention gives."""

import math

import pytest
import torch
from torch.nn import functional

from engine import text_attention
from engine.linear8_check import snr_db
from engine.text_attention import FP8, attend_text, attend_text_round, distinct_rows

HALF_STEP = 2.0**-8  # of bf16, in parts of a value
FP32 = 2.0**-18  # in parts of the largest value: 512 products and sums
PROMPTS = [1, 12, 63, 64, 65, 511, 512]


def draw(tokens=5, keys=512, heads=2, width=16):
    generator = torch.Generator().manual_seed(keys)
    return [(2 * torch.randn(1, n, heads, width, generator=generator)).bfloat16() for n in (tokens, keys, keys)]


def padded(real, **sizes):
    """Keys and values that are equal from row `real` on."""
    query, key, value = draw(**sizes)
    key[:, real:], value[:, real:] = key[:, -1:], value[:, -1:]
    return query, key, value


def check(made, query, key, value):
    """float32 inside, one rounding to bf16."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (query, key, value))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=-1)
    wanted = (weights @ v).transpose(0, 1)[None]
    assert (made.dtype, made.shape) == (torch.bfloat16, query.shape)
    fp32 = FP32 * v.abs().max()
    assert ((made.double() - wanted).abs() <= HALF_STEP * (wanted.abs() + fp32) + fp32).all()


def rows_of(query):
    """(n, heads * d) as a projection gives it: of another size each, and a weight for their norm."""
    rows = (query[0].flatten(1).float() * torch.linspace(0.1, 9, query.shape[1])[:, None]).bfloat16()
    return rows, torch.linspace(0.5, 2, rows.shape[1]).bfloat16()


def normed(rows, weight, heads):
    return functional.rms_norm(rows.float(), weight.shape, weight.float(), 1e-6).bfloat16().unflatten(1, (heads, -1))


@pytest.mark.parametrize("real", PROMPTS)
def test_attention_to_a_padded_text_is_plain_attention(real):
    given = padded(real)
    check(attend_text(*given), *given)


@pytest.mark.parametrize("real", PROMPTS)
def test_rounded_attention_is_attention_of_the_normed_query_rounded_once(real):
    query, key, value = padded(real)
    rows, weight = rows_of(query)
    values, scales = attend_text_round(rows, weight, key, value, 1e-6)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (FP8.dtype, rows.shape, torch.float32, (5, 1))
    assert torch.equal(scales, (value.float().abs().max() / FP8.limit).expand(5, 1))
    seen = attend_text(normed(rows, weight, 2)[None], key, value)[0].flatten(1)
    error = (values.float() * scales - seen.float()).abs()
    # Three bits behind the point, down to 2**-9 of the scale, beside the rounding of `seen` to bf16.
    assert (error <= (2.0**-4 + HALF_STEP) * seen.float().abs() + 2.0**-10 * scales).all()


def test_scale_of_a_value_that_nobody_sees_costs_no_accuracy():
    """The bound is a hundred times what is seen: a float format keeps its bits all the same."""
    query, key, value = draw()
    rows, weight = rows_of(query)
    right = attend_text(normed(rows, weight, 2)[None], key, value)[0].flatten(1)
    key[:, 7], value[:, 7] = -100 * normed(rows, weight, 2).float().mean(0).sign().bfloat16(), 400.0
    values, scales = attend_text_round(rows, weight, key, value, 1e-6)
    seen = attend_text(normed(rows, weight, 2)[None], key, value)[0].flatten(1)
    hidden = (seen.float() - right.float()).abs().amax(1) < 0.5
    assert hidden.any()
    assert snr_db(seen[hidden], values.float()[hidden] * scales[hidden]) > 30


def test_values_of_zero_are_rounded_to_zero():
    query, key, value = padded(12)
    rows, weight = rows_of(query)
    values, scales = attend_text_round(rows, weight, key, torch.zeros_like(value), 1e-6)
    assert (values.float() * scales == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_product_makes_a_number_of_what_is_none(bad):
    query, key, value = padded(12)
    rows, weight = rows_of(query)

    def is_nan(**changed):
        given = {"rows": rows, "key": key, "value": value} | changed
        values, scales = attend_text_round(given["rows"], weight, given["key"], given["value"], 1e-6)
        return ((values.float() * scales).sum(1)).isnan().tolist()

    bad_row, bad_key, bad_value = rows.clone(), key.clone(), value.clone()
    bad_row[2, 7] = bad_key[0, 3, 1, 2] = bad_value[0, 40, 0, 1] = bad
    assert is_nan() == [False] * 5
    assert is_nan(rows=bad_row) == [False, False, True, False, False]
    assert is_nan(value=bad_value) == [True] * 5
    if math.isnan(bad):  # an infinite key is seen alone or not at all, as its query points
        assert is_nan(key=bad_key) == [True] * 5


@pytest.mark.parametrize("keys", [1, 2, 7, 64, 513])
def test_attention_to_a_text_of_any_length_is_plain_attention(keys):
    given = draw(keys=keys)
    check(attend_text(*given), *given)


def test_attention_to_nothing_but_padding_gives_its_value():
    query, key, value = padded(0)
    out = attend_text(query, key, value)
    assert torch.equal(out, value[:, -1:].expand_as(out))


@pytest.mark.parametrize(
    ("keys", "values", "count"),
    [(0, 0, 0), (1, 1, 1), (64, 64, 64), (511, 511, 511), (512, 512, 511), (12, 300, 300), (300, 12, 300)],
)
def test_rows_at_the_end_are_counted_where_key_and_value_are_equal(keys, values, count):
    _, key, value = draw()
    key[:, keys:], value[:, values:] = key[:, -1:], value[:, -1:]
    assert distinct_rows(key[0], value[0]) == count


def test_equal_rows_before_the_last_other_one_are_not_counted():
    _, key, value = padded(12)
    key[:, 400, 1, 7] += 1
    assert distinct_rows(key[0], value[0]) == 401


def test_equal_keys_with_other_values_are_plain_attention():
    query, key, value = draw()
    key[:, 12:] = key[:, -1:]
    check(attend_text(query, key, value), query, key, value)


def test_zero_is_not_minus_zero():
    _, key, value = padded(12)
    key[:, 12:, 0, 0] = 0.0
    key[:, 100, 0, 0] = -0.0
    assert distinct_rows(key[0], value[0]) == 101


@pytest.mark.parametrize("rows", [slice(12, 512), slice(40, 41), slice(3, 4), slice(511, 512)])
@pytest.mark.parametrize("of", ["key", "value"])
def test_nan_is_in_the_result_of_its_head_alone(rows, of):
    query, key, value = padded(12)
    (key if of == "key" else value)[:, rows, 0, 3] = math.nan
    out = attend_text(query, key, value)
    assert out[:, :, 0, 3].isnan().all()
    assert out[:, :, 0].isnan().all() == (of == "key")
    assert out[:, :, 1].isfinite().all()


def test_batch_of_two_is_refused():
    query, key, value = (x.expand(2, -1, -1, -1) for x in draw())
    with pytest.raises(ValueError, match="one video at a time, not 2"):
        attend_text(query, key, value)
    with pytest.raises(ValueError, match="one video at a time, not 2"):
        attend_text_round(*rows_of(query), key, value, 1e-6)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_other_types_than_bf16_are_refused(wide):
    given = draw()
    given[wide] = given[wide].float()
    with pytest.raises(ValueError, match=r"takes bf16, not torch.bfloat16, torch.float32"):
        attend_text(*given)
    rows, weight = rows_of(given[0])
    with pytest.raises(ValueError, match="takes bf16, not"):
        attend_text_round(rows.to(given[0].dtype), weight, *given[1:], 1e-6)


def test_operators_have_fakes_of_their_shapes_and_types():
    query, key, value = padded(12)
    torch.library.opcheck(attend_text, (query, key, value))
    torch.library.opcheck(attend_text_round, (*rows_of(query), key, value, 1e-6))


def test_operator_tells_the_compiler_what_it_gives_also_of_queries_that_do_not_lie_in_order():
    query, key, value = padded(12)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend_text(turned, key, value), attend_text(query, key, value))
    torch.library.opcheck(attend_text, (turned, key, value), test_utils="test_faketensor")


def test_prompt_of_another_length_is_the_same_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: attend_text(*given) + 1, backend="aot_eager", fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for real in (1, 12, 512):
        given = padded(real)
        assert torch.equal(compiled(*given), attend_text(*given) + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.fixture
def small(monkeypatch):
    """The self-test asks for fewer heads."""
    monkeypatch.setattr(text_attention, "TEST_HEADS", 2)


@pytest.mark.usefixtures("small")
def test_problem_is_none_for_the_right_arithmetic():
    assert text_attention.problem.__wrapped__("cpu") is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda query, key, value: attend_text(query, key.flip(1), value),
        lambda query, key, value: attend_text(query, key, value.flip(2)),
        lambda query, key, value: attend_text(query, key[:, :500], value[:, :500]),
        lambda query, key, value: attend_text(query, key, value) * 1.02,
        lambda query, key, value: attend_text(query, key, value) * math.nan,
    ],
    ids=["other keys", "other heads", "the last rows left out", "two per cent more", "nothing finite"],
)
@pytest.mark.usefixtures("small")
def test_problem_names_a_wrong_result(wrong, monkeypatch):
    monkeypatch.setattr(text_attention, "attend_text", wrong)
    assert "its result is off" in str(text_attention.problem.__wrapped__("cpu"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows, weight, key, value, eps: attend_text_round(rows, weight, key.flip(1), value, eps),
        lambda rows, weight, key, value, eps: attend_text_round(rows, weight.flip(0), key, value, eps),
        lambda rows, weight, key, value, eps: attend_text_round(rows, weight, key[:, :70], value[:, :70], eps),
        lambda rows, weight, key, value, eps: attend_text_round(rows, weight, key, value, eps + 4),
        lambda *given: (lambda values, scales: (values, scales * 1.06))(*attend_text_round(*given)),
    ],
    ids=["other keys", "another norm", "the padding left out", "another epsilon", "six per cent more"],
)
@pytest.mark.usefixtures("small")
def test_problem_names_a_wrong_rounded_result(wrong, monkeypatch):
    monkeypatch.setattr(text_attention, "attend_text_round", wrong)
    assert "its rounded result is off" in str(text_attention.problem.__wrapped__("cpu"))


@pytest.mark.usefixtures("small")
def test_problem_names_a_nan_that_is_hidden(monkeypatch):
    def hides(query, key, value):
        return attend_text(query, key.nan_to_num(), value)

    def hides_rounded(rows, weight, key, value, eps):
        return attend_text_round(rows, weight, key.nan_to_num(), value, eps)

    for name, wrong in (("attend_text", hides), ("attend_text_round", hides_rounded)):
        with monkeypatch.context() as patch:
            patch.setattr(text_attention, name, wrong)
            assert text_attention.problem.__wrapped__("cpu") == "it hides a NaN"


def test_problem_says_that_the_kernel_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(text_attention, "attend_text", broken)
    assert text_attention.problem.__wrapped__("cpu") == "it fails (RuntimeError)"


@pytest.mark.gpu
def test_kernel_agrees_with_float32_on_a_card():
    assert text_attention.problem.__wrapped__("cuda") is None
