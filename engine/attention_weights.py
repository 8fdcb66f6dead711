"""From scores to weights, in the registers of the kernel of engine.attention_hopper.

A product leaves a thread with numbers of two rows: of each eight columns two. The others of its rows are those of its
three neighbours, so the largest of a row and a row's sum are found by four.
"""

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

OWN_ROWS = 2  # of a thread
# A first largest score: below any, and finite, so that nothing is taken from what is infinite.
LOWEST = -1e30


class Bounded:
    """Weights of scores that need no maximum: 2**(score - what is taken from all of the head)."""

    def __init__(self, scales: Any, shift: Any) -> None:
        self._scales, self._shift = scales, shift
        self.totals = row_numbers(0.0)

    def weigh(self, scores: Any, tile_scale: Any) -> None:
        """Sums of products become weights in their place; adds up each row's."""
        for r in range(OWN_ROWS):
            self._add(scores, r, self._scales[r] * tile_scale, self._shift)

    def shrink(self, seen: Any) -> None:
        """What was summed before stays as it is."""

    def _add(self, scores: Any, r: int, factor: Any, taken: Any) -> None:
        total = self.totals[r]
        for c in range(cute.size(scores, mode=[1])):
            weight = cute.math.exp2(scores[r, c] * factor - taken, fastmath=True)
            scores[r, c] = weight
            total = total + weight
        self.totals[r] = total


class Running(Bounded):
    """Weights of any scores: 2**(score - the largest of its row so far)."""

    def __init__(self, scales: Any, shift: Any) -> None:
        super().__init__(scales, shift)
        self._largest = row_numbers(LOWEST)
        self._factors = row_numbers(1.0)

    def weigh(self, scores: Any, tile_scale: Any) -> None:
        for r in range(OWN_ROWS):
            factor = self._scales[r] * tile_scale
            largest = scores[r, 0]
            for c in range(1, cute.size(scores, mode=[1])):
                largest = cute.arch.fmax(largest, scores[r, c])
            largest = cute.arch.warp_reduction_max(largest, threads_in_group=4) * factor
            largest = cute.arch.fmax(self._largest[r], largest)
            self._factors[r] = cute.math.exp2(self._largest[r] - largest, fastmath=True)
            self._largest[r] = largest
            self.totals[r] = self.totals[r] * self._factors[r]
            self._add(scores, r, factor, largest)

    def shrink(self, seen: Any) -> None:
        multiply_rows(seen, self._factors)


def own_row(thread: Any) -> Any:
    """The first of a thread's two rows of an accumulator; the other one is eight below."""
    return thread // 32 * 16 + thread % 32 // 4


def _own_column(place: int) -> Any:
    """The column of a thread's number at this place of one of its rows."""
    return cute.arch.thread_idx()[0] % 4 * 2 + place % 2 + place // 2 * 8


def row_numbers(value: float) -> Any:
    """A number for each of a thread's rows."""
    numbers = cute.make_rmem_tensor(OWN_ROWS, Float32)
    numbers.fill(value)
    return numbers


def by_row(x: Any) -> Any:
    """A thread's numbers of a product, ((2 columns, 2 rows, n), 1, 1), as (2 rows, 2n columns)."""
    (pair, rows, eighths), m, n = x.layout.shape
    (pair_step, row_step, eighth_step), m_step, n_step = x.layout.stride
    shape, step = ((rows, m), (pair, eighths, n)), ((row_step, m_step), (pair_step, eighth_step, n_step))
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=step))


def leave_out_keys(scores: Any, count: Any) -> None:
    """Of a tile with fewer keys, what is behind them weighs nothing."""
    for r in range(OWN_ROWS):
        for c in range(cute.size(scores, mode=[1])):
            scores[r, c] = cutlass.select_(_own_column(c) < count, scores[r, c], -Float32.inf)


def keep_weights(scores: Any, weights: Any) -> None:
    """Weights, rounded to bf16 two by two, to where the product with the values reads them: rows in turns."""
    pairs = cute.recast_tensor(weights, Int32)
    for i in range(cute.size(pairs) // OWN_ROWS):
        for r in range(OWN_ROWS):
            pairs[2 * i + r] = _pair(scores[r, 2 * i], scores[r, 2 * i + 1])


def _pair(low: Any, high: Any) -> Any:
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Float32(low).ir_value(), Float32(high).ir_value()],
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


def multiply_rows(x: Any, factors: Any) -> None:
    """Each of a thread's rows by its own factor."""
    for r in range(OWN_ROWS):
        x[r, None].store(x[r, None].load() * factors[r])
