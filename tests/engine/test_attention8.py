"""Self-attention with scores of whole numbers: how far it is off, what no softmax sees, nothing hidden."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import attention8
from engine.attention import deviation
from engine.attention8 import attend8, problem, reach_of, round_keys, round_queries
from engine.attention_check import MAX_RELATIVE_ERROR, heads_of_every_way
from engine.attention_reach import KEY_TILE, MOST_SPAN, WIDTH, score_factor


def draw(queries=100, keys=330, heads=2, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, n, heads, WIDTH, generator=generator) for n in (queries, keys, keys))
    return (spread * query).bfloat16(), (spread * key).bfloat16(), value.bfloat16()


@pytest.mark.parametrize(("spread", "worst"), [(1.0, 0.014), (2.0, 0.03)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (100, KEY_TILE), (64, KEY_TILE + 1), (100, 330)])
def test_result_is_off_by_what_uniform_steps_of_a_127th_make(queries, keys, spread, worst):
    drawn = draw(queries, keys, spread=spread)
    out = attend8(*drawn)
    assert (out.shape, out.dtype) == (drawn[0].shape, torch.bfloat16)
    assert deviation(out, *drawn) < worst


def test_what_all_keys_of_a_head_share_costs_nothing(monkeypatch):
    query, key, value = draw()
    far = key + 20 * torch.randn(1, 1, 2, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert deviation(attend8(query, far, value), query, far, value) < 0.02
    monkeypatch.setattr(torch.Tensor, "mean", lambda x, **_: torch.zeros(x.shape[1:]))  # as it would be without
    assert deviation(attend8(query, far, value), query, far, value) > 0.1


def test_one_loud_row_costs_its_own_tile_alone():
    query, key, _ = draw(keys=3 * KEY_TILE)
    quiet = round_keys(key[0]).scales
    key[0, KEY_TILE + 3] *= 8
    loud = round_keys(key[0]).scales / quiet
    assert (loud[:, 1] > 4).all()
    assert ((loud[:, [0, 2]] - 1).abs() < 0.1).all()
    query[0, 7] *= 100
    rounded = round_queries(query[0])
    assert (rounded.scales.argmax(dim=1) == 7).all()
    assert rounded.scales.sort(dim=1).values[:, -2].max() < rounded.scales[:, 7].min() / 50


@given(
    spread=st.floats(1e-4, 1e3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 2 * KEY_TILE + 1),
    seed=st.integers(0, 99),
)
def test_no_score_is_larger_than_its_bound(spread, queries, keys, seed):
    query, key, _ = draw(queries, keys, spread=spread, seed=seed)
    q, k = round_queries(query[0]), round_keys(key[0])
    tiles = torch.arange(keys) // KEY_TILE
    scores = torch.einsum("nhd,mhd->hnm", q.values.double(), k.values.double())
    scores = scores * q.scales[:, :, None] * k.scales[:, None, tiles]
    assert (scores.abs().amax((1, 2)) <= (q.longest * k.longest) * (1 + 1e-5)).all()


@given(spread=st.floats(1e-4, 1e3), seed=st.integers(0, 99))
def test_rounded_rows_are_the_rows_within_half_a_step(spread, seed):
    query, key, _ = draw(3, KEY_TILE + 1, spread=spread, seed=seed)
    q, k = round_queries(query[0]), round_keys(key[0])
    assert q.values.abs().amax() == k.values.abs().amax() == 127
    steps = (q.scales / score_factor(WIDTH)).t()[..., None]
    assert ((q.values * steps - query[0].float()).abs() <= 0.501 * steps).all()
    steps = k.scales.repeat_interleave(KEY_TILE, dim=1)[:, : KEY_TILE + 1].t()[..., None]
    centred = key[0].float() - key[0].float().mean(dim=0)
    assert ((k.values * steps - centred).abs() <= 0.501 * steps).all()


def test_zeros_see_the_mean_of_all_values():
    query, key, value = draw()
    wanted = value.float().mean(dim=1, keepdim=True).expand_as(query)
    same = key[:, :1].expand_as(key)
    for pair in ((torch.zeros_like(query), key), (query, torch.zeros_like(key)), (query, same)):
        torch.testing.assert_close(attend8(*pair, value).float(), wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_whole_number_is_made_of_what_is_none(bad):
    query, key, value = draw()

    def rows_and_heads(at):
        drawn = [query, key, value]
        drawn[at] = drawn[at].clone()
        drawn[at][0, 7, 1, 5] = bad
        out = attend8(*drawn)[0]
        return (~out.isfinite()).any(dim=2)

    nobody = torch.zeros(100, 2, dtype=torch.bool)
    own_row, own_head = nobody.clone(), nobody.clone()
    own_row[7, 1] = own_head[:, 1] = True
    assert torch.equal(rows_and_heads(0), own_row)
    assert torch.equal(rows_and_heads(1), own_head)
    assert torch.equal(rows_and_heads(2), own_head)


@pytest.mark.parametrize(
    "wrong", [lambda x: x.float(), lambda x: x.expand(2, -1, -1, -1), lambda x: x[..., :64], lambda x: x.half()]
)
def test_what_the_kernel_could_not_take_is_refused(wrong):
    with pytest.raises(ValueError, match="one video, bf16, heads of 128"):
        attend8(*(wrong(x) for x in draw()))


def test_test_of_the_kernel_has_heads_of_every_way():
    query, key, _ = heads_of_every_way("cpu")
    reached = reach_of(round_queries(query[0]), round_keys(key[0]))
    assert (reached.span <= MOST_SPAN).tolist() == [True, True, False, True]
    assert (reached.shift > 0).tolist() == [False, True, True, True]


def test_kernel_that_computes_as_written_has_no_problem():
    assert problem("cpu") is None


def test_kernel_with_a_tile_of_another_scale_is_found_out(monkeypatch):
    def late_tile(query, key, value):
        """The last tile's scale is that of the one before."""
        key = key.clone()
        key[:, -(key.shape[1] % KEY_TILE) :] *= 1.2
        return attend8(query, key, value)

    monkeypatch.setattr(attention8, "attend8", late_tile)
    assert problem("cpu").startswith("its result is off")


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])  # as they are, shifted, with a look for the maximum
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (192, KEY_TILE), (193, KEY_TILE + 1), (500, 2 * KEY_TILE), (1000, 999), (64, 3000)]
)
def test_kernel_computes_as_written(queries, keys, spread):
    query, key, value = (x.cuda() for x in draw(queries, keys, 3, spread))
    wanted = attention8._reference(query[0], key[0], value[0])
    out = attend8(query, key, value)[0].float()
    assert (out - wanted).norm() / wanted.norm() < MAX_RELATIVE_ERROR


@pytest.mark.gpu
def test_kernel_passes_its_test_on_the_card():
    assert problem("cuda") is None
