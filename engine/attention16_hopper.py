"""The card's kernel of engine.attention16: scores are products of bf16."""

from typing import Any

import torch
from cutlass import BFloat16, Float32, cute
from torch import Tensor

from engine.attention_hopper import HopperAttention, compiled
from engine.attention_reach import WIDTH, Reach, score_factor
from engine.attention_weights import OWN_ROWS, by_row


def attend(query: Tensor, key: Tensor, value: Tensor, reached: Reach) -> Tensor:
    """`query` (n, heads, 128), `key` and `value` (m, heads, 128), bf16 -> (n, heads, 128) bf16."""
    out = torch.empty_like(query)
    compiled(Attention16)(query, key, value, out, reached.span, reached.shift)
    return out


class Attention16(HopperAttention):
    score_kind, sum_kind = BFloat16, Float32

    @staticmethod
    def numbers(queries: Any, tiles: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:  # noqa: ARG004 the base's own
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
