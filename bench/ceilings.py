"""What this card can do at best, measured in the same run: the denominators of every percentage."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.timing import seconds
from bench.work import ROUNDING, TERA
from engine import attention
from engine.linear8 import KINDS, quantise
from engine.linear8_check import passing

SIDE = 8192  # of the square products: large enough to fill any card
TOKENS, HEADS, HEAD = 32_760, 40, 128  # self-attention of the 14B models at 832x480x81
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of products and of each attention kernel that passed its self-test; GB/s of a page-locked copy."""

    products: dict[str, float]
    attention: dict[str, float]
    copy_gb_s: float

    def linear_rate(self, precision: str) -> float:
        """Operations a second of the best product at `precision`; bf16 where the card has no 8-bit one."""
        return self.products.get(precision, self.products["bf16"]) * TERA

    @property
    def attention_rate(self) -> float:
        """Operations a second of the fastest exact kernel: one that rounds is no ceiling of bf16 attention."""
        return max(rate for name, rate in self.attention.items() if name not in ROUNDING) * TERA


def measure(device: str = "cuda") -> Ceilings:
    """Random numbers, since a card runs faster on zeros. About 10 s."""
    return Ceilings(_products(device), _attention(device), copy_gb_s(device))


def _products(device: str) -> dict[str, float]:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    work = 2.0 * SIDE**3
    rates = {"bf16": work / seconds(lambda: a @ b) / TERA}
    for kind in passing(device):
        rates[kind] = work / seconds(_product8(kind, a, b)) / TERA
    return rates


def _product8(kind: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """The bare 8-bit product: operands are rounded before the clock starts."""
    a_q, a_scale = quantise(a, kind)
    b_q, b_scale = quantise(b, kind)
    if KINDS[kind].dtype is torch.int8:
        return lambda: torch._int_mm(a_q, b_q.t())
    scales = {"scale_a": a_scale.unsqueeze(1), "scale_b": b_scale.unsqueeze(0)}
    return lambda: torch._scaled_mm(a_q, b_q.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _attention(device: str) -> dict[str, float]:
    q, k, v = (torch.randn(1, TOKENS, HEADS, HEAD, device=device, dtype=torch.bfloat16) for _ in range(3))
    rates = {}
    for name, kernel in attention.KERNELS.items():
        if attention.choose(device, name).name == name:
            spent = seconds(lambda kernel=kernel: kernel.attend(q, k, v), repeats=3)
            rates[name] = 4.0 * TOKENS**2 * HEADS * HEAD / spent / TERA
    return rates


def copy_gb_s(device: str) -> float:
    """Of one page-locked copy from host to card; on a CPU of any copy."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    card = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return COPY_BYTES / seconds(lambda: card.copy_(host, non_blocking=True)) / 1e9
