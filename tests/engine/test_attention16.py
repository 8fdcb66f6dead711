"""Attention without a look for the maximum: what it computes, what it refuses, and its kernel on a card."""

import math

import pytest
import torch

from engine import attention16
from engine.attention import KERNELS, deviation
from engine.attention16 import attend16, in_float32, problem, reach_of
from engine.attention_check import MAX_RELATIVE_ERROR, heads_of_every_way
from engine.attention_reach import KEY_TILE, MOST_SPAN, WIDTH


def draw(queries=100, keys=330, heads=2, spread=1.0, batch=1):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, n, heads, WIDTH, generator=generator) for n in (queries, keys, keys))
    return (spread * query).bfloat16(), (spread * key).bfloat16(), value.bfloat16()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (100, KEY_TILE), (100, 330)])
def test_result_is_torchs_own(queries, keys, batch):
    drawn = draw(queries, keys, batch=batch)
    out = attend16(*drawn)
    assert (out.shape, out.dtype) == (drawn[0].shape, torch.bfloat16)
    assert deviation(out, *drawn) < 0.003
    torch.testing.assert_close(out, KERNELS["native"].attend(*drawn), rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("wrong", [lambda x: x.float(), lambda x: x[..., :64], lambda x: x.half()])
def test_what_the_kernel_could_not_take_is_refused(wrong):
    with pytest.raises(ValueError, match="bf16, heads of 128"):
        attend16(*(wrong(x) for x in draw()))


def test_test_of_the_kernel_has_heads_of_every_way():
    query, key, _ = heads_of_every_way("cpu")
    reached = reach_of(query[0], key[0])
    assert (reached.span <= MOST_SPAN).tolist() == [True, True, False, False]
    assert (reached.shift > 0).tolist() == [False, True, True, True]


def test_kernel_that_computes_as_written_has_no_problem():
    assert problem("cpu") is None


def test_kernel_that_is_wrong_is_found_out(monkeypatch):
    monkeypatch.setattr(attention16, "attend16", lambda q, k, v: attend16(q, k, v) * 1.1)
    assert problem("cpu").startswith("its result is off")


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])  # as they are, shifted, with a look for the maximum
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (192, KEY_TILE), (193, KEY_TILE + 1), (500, 2 * KEY_TILE), (1000, 999), (64, 3000)]
)
def test_kernel_computes_as_written(queries, keys, spread):
    query, key, value = (x.cuda() for x in draw(queries, keys, 3, spread))
    wanted = in_float32(query[0], key[0], value[0])
    out = attend16(query, key, value)[0].float()
    assert (out - wanted).norm() / wanted.norm() < MAX_RELATIVE_ERROR


@pytest.mark.gpu
def test_kernel_finds_how_far_scores_reach():
    from engine import attention16_triton

    query, key, _ = (x.cuda() for x in draw(1000, 999, 3, 2.0))
    made, wanted = attention16_triton.reach_of(query[0], key[0]), reach_of(query[0], key[0])
    torch.testing.assert_close(made.span, wanted.span, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.shift, wanted.shift, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_of_what_is_no_number_is_seen_by_its_own_head_alone(bad):
    query, key, value = (x.cuda() for x in draw())
    clean = attend16(query, key, value)
    query[0, 7, 1, 5] = bad
    out = attend16(query, key, value)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = clean[0, 7, 1]
    assert out.isfinite().all()


@pytest.mark.gpu
def test_kernel_passes_its_test_on_the_card():
    assert problem("cuda") is None
