"""Whether the 8-bit kernels of `linear8` work here, whether they ran, and how far their results are off.

A kernel can be missing from a build, wrong on a card, or skipped without a word; each has happened to others. So a
fast kernel proves itself before it is used: it multiplies small numbers and is compared with the float32 value of the
same 8-bit operands, and one that fails is left out and said. `kernel_calls` is the check for later: what really ran.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.linear8 import KINDS, Kind, Linear8, round_rows, widened_product
from engine.proof import Proof

FAST_KINDS = ("fp8", "int8")  # in the order of preference
# The fast product against its own float32 value. What the card's accumulator loses must stay below what rounding to
# 8 bits has lost already (28 dB for fp8); a wrong layout or scale is below 10.
MIN_SNR_DB = 28.0


@Proof
def problem(device: str, name: str) -> str | None:
    """Why the fast kernel of a kind of linear8 is not to be used on this device, or None: its products are compared
    with float32, once a process.

    The numbers are drawn and compared there too: on the host that took most of a second of a first job. A CPU has no
    fast kernel.
    """
    if torch.device(device).type != "cuda":
        return "the device is no CUDA card"
    kind, have = KINDS[name], torch.cuda.get_device_capability(device)
    if kind.capability is None or have < kind.capability:
        return f"compute capability {have[0]}.{have[1]} is too low"
    try:
        # Wan's feed-forward width, and a short product with fewer rows than the int8 kernel takes by itself.
        ratios = [product_snr_db(kind, rows, 5120, 1024, device) for rows in (512, 8)]
    except RuntimeError as error:  # torch raises it, or its child NotImplementedError, for a kernel that is not built
        said, *_ = str(error).partition("\n")
        return f"the kernel fails ({said})"
    return None if min(ratios) >= MIN_SNR_DB else f"its result is off (SNR {min(ratios):.1f} dB)"


def passing(device: str) -> tuple[str, ...]:
    """The fast kinds whose kernels pass on this device."""
    return tuple(name for name in FAST_KINDS if problem(device, name) is None)


def product_snr_db(kind: Kind, rows: int, in_features: int, out_features: int, device: str) -> float:
    """SNR of a kind's product, one column of outliers in it, against float32 of the same 8-bit numbers."""
    generator = torch.Generator(device).manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = draw(rows, in_features)
    x[:, 7] *= 50
    x_q, x_scale = round_rows(x.bfloat16(), kind)
    weight_q, scale = round_rows(draw(out_features, in_features), kind)
    bias = draw(out_features).bfloat16()
    # In float32. Where somebody has allowed TF32 it is right too: its ten bits hold every 8-bit number.
    reference = widened_product(x_q, x_scale, weight_q, scale.squeeze(-1), bias, torch.float32)
    assert kind.product is not None
    return snr_db(reference, kind.product(x_q, x_scale, weight_q, scale.squeeze(-1), bias, torch.bfloat16))


def snr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-noise ratio in decibels; minus infinity if `value` is not finite: a NaN passes no gate."""
    signal = reference.detach().double()
    noise = (signal - value.detach().double()).square().sum()
    if not torch.isfinite(noise):
        return float("-inf")
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal.square().sum() / noise))


def layer_snr_db(linear: nn.Linear, inputs: Tensor, kind: str) -> float:
    """SNR of a layer's 8-bit output against the same layer in float32, on `inputs` (..., in)."""
    bias = None if linear.bias is None else linear.bias.float()
    reference = functional.linear(inputs.float(), linear.weight.float(), bias)
    return snr_db(reference, Linear8.from_linear(linear, kind)(inputs.float()))


def kernel_calls(run: Callable[[], object], kernels: Iterable[str] = ("_scaled_mm", "_int_mm")) -> dict[str, int]:
    """Run once under the profiler and count the fast kernels that were really called, eager or compiled.

    A quantised model whose fast path is silently skipped is only slow; this is the check that it is not.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    seen = Counter(event.name for event in profile.events() or ())
    return {name: seen[f"aten::{name}"] for name in kernels}
