"""The card's kernel of engine.attention8: scores are products of int8, of which each row and tile has its scale."""

from typing import Any

import torch
from cutlass import Float32, Int8, Int32, cute
from cutlass import min as smaller
from torch import Tensor

from engine.attention8 import Rounded8, reach_of
from engine.attention_hopper import HopperAttention, compiled
from engine.attention_weights import OWN_ROWS, by_row, row_numbers


def attend(query: Rounded8, key: Rounded8, value: Tensor) -> Tensor:
    """`value` (m, heads, 128) bf16 -> (n, heads, 128) bf16."""
    out = torch.empty_like(query.values, dtype=torch.bfloat16)
    reached = reach_of(query, key)
    numbers = query.scales, key.scales, reached.span, reached.shift
    compiled(Attention8)(query.values, key.values, value, out, *numbers)
    return out


class Attention8(HopperAttention):
    score_kind, sum_kind = Int8, Int32

    @staticmethod
    def numbers(queries: Any, tiles: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:
        return (heads, queries), (heads, tiles), (heads,), (heads,)

    @cute.jit
    def __call__(
        self,
        query: cute.Tensor,
        key: cute.Tensor,
        value: cute.Tensor,
        out: cute.Tensor,
        query_scales: cute.Tensor,
        key_scales: cute.Tensor,
        span: cute.Tensor,
        shift: cute.Tensor,
        stream: Any,
    ) -> None:
        self.launch(query, key, value, out, (query_scales, key_scales, span, shift), stream)

    def row_scales(self, numbers: Any, head: Any, first: Any) -> Any:
        query_scales, scales = numbers[0], row_numbers(0.0)
        for r in range(OWN_ROWS):
            scales[r] = query_scales[head, smaller(first + 8 * r, query_scales.shape[1] - 1)]
        return scales

    def tile_scale(self, numbers: Any, head: Any, tile: Any) -> Any:
        return numbers[1][head, tile]

    def scores(self, sums: Any) -> Any:
        return by_row(cute.make_rmem_tensor_like(sums, Float32))

    def read(self, sums: Any, scores: Any) -> None:
        """As float32, which the next product may not touch while they become weights."""
        rows = by_row(sums)
        for r in range(OWN_ROWS):
            for c in range(cute.size(scores, mode=[1])):
                scores[r, c] = Float32(rows[r, c])
