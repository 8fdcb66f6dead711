"""Queries and keys rounded by kernels: as torch rounds them, and what is no number stays none."""

import math

import pytest
import torch

from engine import attention8, attention8_triton
from engine.attention_reach import KEY_TILE

SIZES = [(1, 1), (attention8_triton.QUERY_TILE, 2), (KEY_TILE, 3), (KEY_TILE + 1, 1), (2 * KEY_TILE + 7, 2)]


def draw(rows, heads, width=32):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, heads, width, generator=generator) * torch.linspace(0.1, 9, rows)[:, None, None]
    return (x + torch.linspace(-2, 2, width)).bfloat16()


@pytest.mark.parametrize(("rows", "heads"), SIZES)
@pytest.mark.parametrize("of", ["round_queries", "round_keys"])
def test_kernels_round_as_torch_does(of, rows, heads):
    x = draw(rows, heads)
    made, wanted = getattr(attention8_triton, of)(x), getattr(attention8, of)(x)
    assert made.values.dtype == torch.int8
    # A factor may be rounded otherwise: a number that lies half-way may become its other neighbour.
    off = (made.values.int() - wanted.values.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-3
    torch.testing.assert_close(made.scales, wanted.scales, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(made.longest, wanted.longest, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("of", ["round_queries", "round_keys"])
def test_zeros_have_a_scale_and_stay_zero(of):
    made = getattr(attention8_triton, of)(torch.zeros(5, 2, 32, dtype=torch.bfloat16))
    assert (made.values == 0).all()
    assert (made.scales > 0).all()
    assert (made.longest == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scale_of_what_is_no_number_is_none(bad):
    x = draw(2 * KEY_TILE + 7, 3)
    x[KEY_TILE + 1, 1, 5] = bad
    queries, keys = attention8_triton.round_queries(x), attention8_triton.round_keys(x)
    assert queries.scales.isnan().nonzero().tolist() == [[1, KEY_TILE + 1]]
    # The mean is none either, so no key of that head is one.
    assert keys.scales.isnan().all(dim=1).tolist() == [False, True, False]
    assert not keys.scales[[0, 2]].isnan().any()
    for made in (queries, keys):
        assert made.longest.isnan().tolist() == [False, True, False]
