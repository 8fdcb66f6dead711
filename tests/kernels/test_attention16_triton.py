"""How far scores reach, found by a kernel: as torch finds it, and what is no number stays none."""

import math

import pytest
import torch

from engine import attention16, attention16_triton

TILE = attention16_triton.TILE


def draw(rows, heads, width=32):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, heads, width, generator=generator) * torch.linspace(0.1, 9, rows)[:, None, None]
    return (x + torch.linspace(-2, 2, width)).bfloat16()


@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 1, 1), (TILE, TILE + 1, 2), (3, 2 * TILE + 7, 3)])
def test_kernel_finds_what_torch_does(queries, keys, heads):
    query, key = draw(queries, heads), draw(keys, heads)
    made, wanted = attention16_triton.reach_of(query, key), attention16.reach_of(query, key)
    torch.testing.assert_close(made.span, wanted.span, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.shift, wanted.shift, rtol=1e-5, atol=1e-5)
    assert wanted.shift.max() > 0 or keys == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_head_with_what_is_no_number_is_not_bounded(at, bad):
    drawn = [draw(TILE + 3, 3), draw(2 * TILE + 7, 3)]
    drawn[at][TILE + 1, 1, 5] = bad
    made = attention16_triton.reach_of(*drawn)
    assert (made.span <= 1e9).tolist() == [True, False, True]
