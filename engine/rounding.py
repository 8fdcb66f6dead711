"""What stands before an 8-bit product, with its rounding, before attention, and at a block's end: one pass each.

Why. A row's scale is known when its largest value is, so the compiler makes a loop over the row of every such kernel,
and then a second one: it reads twice what a row's worth of registers could have held, and computes a norm or GELU
twice. At 832x480x81 on an H200 these took 4.9 ms a block, 197 ms a forward. Here a program holds its row: read once,
computed once, written once.

All but norm_rotate and add_gated take x (rows, n) bf16 and give e4m3 (rows, n) with float32 scales (rows, 1), as
linear8.round_rows does, of values that were not rounded to bf16 in between. No product makes a finite number of a row
with a NaN or an infinity in it: a card's GELU, and its rounding of x itself, keep the NaN among the values, or give the
row an infinite scale; all else makes the row NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import rotate
from engine.linear8 import KINDS, round_rows
from engine.linear8_check import MIN_SNR_DB, snr_db
from engine.operators import operator
from engine.proof import Proof

FP8 = KINDS["fp8"]
TEST_ROWS = 33  # of which a program of the norms takes three or four on any card (rounding_triton.ROWS_A_NORM_PROGRAM)
# The 14B models' own: a kernel is compiled for each width that it meets, half a second apiece. Two are no power of two.
TEST_WIDTH, TEST_FEED_WIDTH, TEST_HEAD = 5120, 13824, 128


def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _rounded_like(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8.dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@operator("plain_round", _rounded_like)
def plain_round(x: Tensor) -> tuple[Tensor, Tensor]:
    """x itself, rounded."""
    if x.device.type == "cpu":
        return round_rows(x.contiguous(), FP8)
    from engine.rounding_triton import plain_round as on_card

    return on_card(x.contiguous())


@operator("gelu_round", _rounded_like)
def gelu_round(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x), tanh form, rounded."""
    if x.device.type == "cpu":
        return round_rows(functional.gelu(x.contiguous().float(), approximate="tanh"), FP8)
    from engine.rounding_triton import gelu_round as on_card

    return on_card(x.contiguous())


@operator("norm_round", _rounded_like)
def norm_round(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) * weight + bias, rounded. `weight`, `bias`: (n,) float32."""
    if x.device.type == "cpu":
        return round_rows(functional.layer_norm(x.float(), weight.shape, weight, bias, eps), FP8)
    from engine.rounding_triton import norm_round as on_card

    return on_card(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


@operator("add_norm_round", lambda x, *_: (_like(x), *_rounded_like(x)))
def add_norm_round(
    x: Tensor, added: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + added * gate in bf16, and LayerNorm(y) * weight + bias, rounded: (y, values, scales).

    `added` (rows, n) bf16; `gate` (n,) float32, None for one.
    """
    if x.device.type == "cpu":
        y = (x.float() + (added.float() if gate is None else added.float() * gate)).to(x.dtype)
        return (y, *round_rows(functional.layer_norm(y.float(), weight.shape, weight, bias, eps), FP8))
    from engine.rounding_triton import add_norm_round as on_card

    gate = None if gate is None else gate.contiguous()
    return on_card(x.contiguous(), added.contiguous(), gate, weight.contiguous(), bias.contiguous(), eps)


@operator("norm_rotate", _like)
def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) * weight, the pairs of each head turned by their angles, rounded to bf16 once: (rows, n).

    The norm is over the row, all heads together. `weight`: (n,) bf16 or float32. `cos`, `sin`: (rows, d) float32, each
    angle twice; every head has these d, and n is a multiple of d.
    """
    if x.device.type == "cpu":
        heads = functional.rms_norm(x.float(), weight.shape, weight.float(), eps).unflatten(1, (-1, cos.shape[1]))
        return rotate(heads, cos[:, None], sin[:, None]).flatten(1).to(x.dtype)
    from engine.rounding_triton import norm_rotate as on_card

    return on_card(x.contiguous(), weight.contiguous(), cos.contiguous(), sin.contiguous(), eps)


@operator("add_gated", _like)
def add_gated(x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """x + added * gate, rounded to bf16 once: (rows, n). `x`, `added` (rows, n) bf16; `gate` (n,) float32."""
    if x.device.type == "cpu":
        return (x.float() + added.float() * gate).to(x.dtype)
    from engine.rounding_triton import add_gated as on_card

    return on_card(x.contiguous(), added.contiguous(), gate.contiguous())


@Proof
def problem(device: str) -> str | None:
    """Why the card's kernels are not to be used, or None: each is compared with float32, once a process."""
    try:
        ratio = min(_rows_snr_db(device), _gelu_snr_db(device))
    except Exception as error:  # noqa: BLE001 a compiler may raise anything
        return f"they fail ({type(error).__name__})"
    return None if ratio >= MIN_SNR_DB else f"a result is off (SNR {ratio:.1f} dB)"


def _gelu_snr_db(device: str) -> float:
    x, *_ = _drawn(TEST_FEED_WIDTH)
    values, scale = gelu_round(x.to(device))
    return snr_db(functional.gelu(x.float(), approximate="tanh"), values.float().cpu() * scale.cpu())


def _rows_snr_db(device: str) -> float:
    """The worst of all others."""
    x, added, gate, weight, bias = _drawn(TEST_WIDTH)
    y = (x.float() + added.float() * gate).to(torch.bfloat16)

    def norm(rows: Tensor) -> Tensor:
        return functional.layer_norm(rows.float(), (TEST_WIDTH,), weight, bias, 1e-6)

    dx, dadded, dgate, dweight, dbias = (tensor.to(device) for tensor in (x, added, gate, weight, bias))
    plain = add_norm_round(dx, dadded, None, dweight, dbias, 1e-6)
    gated = add_norm_round(dx, dadded, dgate, dweight, dbias, 1e-6)
    pairs = [
        (x.float(), plain_round(dx)),
        (norm(x), norm_round(dx, dweight, dbias, 1e-6)),
        (norm(x + added), plain[1:]),
        (norm(y), gated[1:]),
    ]
    ratios = [snr_db(wanted, values.float().cpu() * scale.cpu()) for wanted, (values, scale) in pairs]
    sums = [snr_db(y, gated[0].cpu()), snr_db(x + added, plain[0].cpu())]
    sums.append(snr_db(y, add_gated(dx, dadded, dgate).cpu()))
    return min([*ratios, *sums, _rotation_snr_db(device, x, weight.to(torch.bfloat16))])


def _drawn(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two of (rows, width) bf16; gate, weight and bias (width,) float32.

    With a mean, and the largest value at the row's end. Without them a norm that leaves out the mean or takes in more
    than the row, and a scale found in half of the row, all come to over 29 dB.
    """
    generator = torch.Generator().manual_seed(5)
    x, added = (1 + torch.randn(TEST_ROWS, width, generator=generator) for _ in range(2))
    x[:, -1] *= 20
    gate, weight, bias = (torch.randn(width, generator=generator) for _ in range(3))
    return x.to(torch.bfloat16), added.to(torch.bfloat16), gate, weight, bias


def _rotation_snr_db(device: str, x: Tensor, weight: Tensor) -> float:
    """Of norm_rotate against a product of complex numbers."""
    angles = 3 * torch.randn(x.shape[0], TEST_HEAD // 2, generator=torch.Generator().manual_seed(6))
    normed = functional.rms_norm(x.float(), weight.shape, weight.float(), 1e-6)
    pairs = torch.view_as_complex(normed.unflatten(1, (-1, angles.shape[1], 2)))
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(1)
    cos, sin = (part.repeat_interleave(2, dim=1).to(device) for part in (angles.cos(), angles.sin()))
    return snr_db(wanted, norm_rotate(x.to(device), weight.to(device), cos, sin, 1e-6).cpu())
