"""The kernel of engine.widening: one program a row. Imported on a card, and by tests/kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@triton.jit
def _widen_kernel(values_at: tl.tensor, scales_at: tl.tensor, out_at: tl.tensor, width: tl.constexpr,
                  block: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(values_at + row * width + columns, mask=inside).to(tl.float32)
    wide = value * tl.load(scales_at + row)
    tl.store(out_at + row * width + columns, wide.to(out_at.dtype.element_ty), mask=inside)


def widened(weight_q: Tensor, weight_scale: Tensor) -> Tensor:
    """(out, in) 8-bit, contiguous, (out,) float32 -> (out, in) bf16."""
    rows, width = weight_q.shape
    out = torch.empty_like(weight_q, dtype=torch.bfloat16)
    _widen_kernel[(rows,)](weight_q, weight_scale, out, width, triton.next_power_of_2(width), num_warps=WARPS)
    return out
