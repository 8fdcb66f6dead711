"""8-bit weights made wide for a product in their activations' type.

Why. torch makes two kernels of a cast and a product with a column, and neither reads 16 bytes at a time: 35 of the 61
milliseconds that an H200 takes for a prompt, whose encoder has 4.6 billion such weights. On a card one kernel of our
own does both, and gives the same bits.
"""

import logging

import torch
from torch import Tensor

from engine.proof import Proof

TEST_ROWS, TEST_WIDTHS = 8, (4096, 10240)  # widths: UMT5's

log = logging.getLogger(__name__)


def widened(weight_q: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) 8-bit, (out,) float32 -> (out, in) of `dtype`: the product of both in float32, rounded once."""
    device = weight_q.device
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return _by_torch(weight_q, weight_scale, dtype)
    if problem(device, weight_q.dtype) is not None:
        return _by_torch(weight_q, weight_scale, dtype)
    from engine.widening_triton import widened as on_card

    return on_card(weight_q.contiguous(), weight_scale)


def _by_torch(weight_q: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Both formats are exact in any float type, and the product is made in fp32 and rounded once: one wide buffer.
    return weight_q.to(dtype).mul_(weight_scale.unsqueeze(-1))


@Proof
def problem(device: torch.device, format_: torch.dtype) -> str | None:
    """Why the card's kernel is not to be used for weights of this format, or None: it must give torch's bits.

    Asked once a process, and said in the log. One format at a time: Ampere, whose format is int8, can compile no kernel
    that reads e4m3.
    """
    try:
        said = None if _gives_torchs_bits(device, format_) else "its bits are others"
    except Exception as error:  # noqa: BLE001 a compiler may raise anything
        said = f"it fails ({type(error).__name__})"
    if said is not None:
        log.warning("the kernel that makes %s weights wide is not used: %s", format_, said)
    return said


def _gives_torchs_bits(device: torch.device, format_: torch.dtype) -> bool:
    from engine.widening_triton import widened as on_card

    generator = torch.Generator().manual_seed(3)
    for width in TEST_WIDTHS:
        drawn = (100 * torch.randn(TEST_ROWS, width, generator=generator)).clamp(-127, 127)
        weight_q, scale = drawn.to(device, format_), torch.rand(TEST_ROWS, generator=generator).to(device)
        if not torch.equal(on_card(weight_q, scale), _by_torch(weight_q, scale, torch.bfloat16)):
            return False
    return True
