"""The card's kernel of engine.attention16: scores are products of bf16."""

from typing import Any

from cutlass import BFloat16, Float32, cute

from engine.attention_hopper import HopperAttention
from engine.attention_reach import WIDTH, score_factor
from engine.attention_weights import OWN_ROWS, by_row


class Attention16(HopperAttention):
    """Given bf16 queries, keys and values, room for the result, and a Reach."""

    score_kind, sum_kind = BFloat16, Float32

    def numbers(self, queries: Any, tiles: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:  # noqa: ARG002 the base's own
        return (heads,), (heads,)

    @cute.jit
    def __call__(
        self,
        query: cute.Tensor,
        key: cute.Tensor,
        value: cute.Tensor,
        out: cute.Tensor,
        span: cute.Tensor,
        shift: cute.Tensor,
        stream: Any,
    ) -> None:
        self.launch(query, key, value, out, (span, shift), stream)

    def row_scales(self, numbers: Any, head: Any, first: Any) -> Any:  # noqa: ARG002 the base's own
        return (score_factor(WIDTH),) * OWN_ROWS

    def tile_scale(self, numbers: Any, head: Any, tile: Any) -> Any:  # noqa: ARG002 the base's own
        return 1.0

    def scores(self, sums: Any) -> Any:
        """The sums' own registers: they are weights in others before the next product begins."""
        return by_row(sums)

    def read(self, sums: Any, scores: Any) -> None:
        """They are there."""
