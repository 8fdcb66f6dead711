"""Whether the 8-bit kernels of `linear8` work here, whether they ran, and how far their results are off.

A kernel can be missing from a build, wrong on a card, or skipped without a word; each has happened to others. So a
card proves itself at start: every fast kernel multiplies small numbers and is compared with the float32 value of the
same 8-bit operands, and one that fails is left out and said. `kernel_calls` is the check for later: what really ran.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.linear8 import KINDS, Kind, Linear8, round_rows, widened_product

FAST_KINDS = ("fp8", "int8")  # in the order of preference
# The fast product against its own float32 value. What the card's accumulator loses must stay below what rounding to
# 8 bits has lost already (28 dB for fp8); a wrong layout or scale is below 10.
MIN_SNR_DB = 28.0


@dataclass(frozen=True)
class SelfTest:
    """Which fast kinds a device really has, and a sentence for each that was refused."""

    passed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> str:
        """What to quantise to on this device."""
        return self.passed[0] if self.passed else "fp8-weights"

    def kind_for(self, stored: str) -> str:
        """How to multiply weights baked as `stored` (fp8 or int8): fast if that passed, else widened."""
        return stored if stored in self.passed else f"{stored}-weights"


def self_test(device: str, kinds: Mapping[str, Kind] = KINDS) -> SelfTest:
    """Multiply on the device with each fast kernel and compare with float32; a kernel that errs is left out
    and said.

    The numbers are drawn and compared there too: on the host that took most of a second of a first job. A CPU has no
    fast kernel, so nothing passes there.
    """
    passed, notes = [], []
    for name in FAST_KINDS:
        problem = _problem(device, kinds[name])
        if problem is None:
            passed.append(name)
        else:
            notes.append(f"8-bit kernel {name} is not used: {problem}")
    return SelfTest(tuple(passed), tuple(notes))


@cache
def self_tested(device: str) -> SelfTest:
    """`self_test`, once a process and device: two experts need not wait for it twice."""
    return self_test(device)


def _problem(device: str, kind: Kind) -> str | None:
    if torch.device(device).type != "cuda":
        return "the device is no CUDA card"
    have = torch.cuda.get_device_capability(device)
    if kind.capability is None or have < kind.capability:
        return f"compute capability {have[0]}.{have[1]} is too low"
    try:
        # Wan's feed-forward width, and a short product with fewer rows than the int8 kernel takes by itself.
        ratios = [product_snr_db(kind, rows, 5120, 1024, device) for rows in (512, 8)]
    except RuntimeError as error:  # torch raises it, or its child NotImplementedError, for a kernel that is not built
        said, *_ = str(error).partition("\n")
        return f"the kernel fails ({said})"
    return None if min(ratios) >= MIN_SNR_DB else f"its result is off (SNR {min(ratios):.1f} dB)"


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
