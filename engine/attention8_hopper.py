"""The card's kernel of engine.attention8: scores are products of int8, of which each row and tile has its scale."""

from typing import Any

from cutlass import Float32, Int8, Int32, cute
from cutlass import min as smaller

from engine.attention_hopper import HopperAttention
from engine.attention_weights import OWN_ROWS, by_row, row_numbers


class Attention8(HopperAttention):
    """Given whole numbers, the values, room for the result, and of the rest float32: see `numbers`."""

    score_kind, sum_kind = Int8, Int32

    def numbers(self, queries: Any, tiles: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:
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
