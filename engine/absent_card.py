"""Our Triton kernels compiled for a card that is not there, where such a card's load and first job will find them.

Triton keeps a compiled kernel under a hash of its source, the types of what it is given, which addresses and numbers 16
divides, its constants and options, and the card's compute capability. None of it needs a card. So that a hash is never
another one than a worker's, nothing of it is written down here: the functions that launch are called themselves, with
tensors of the models' own widths, under a driver that knows a capability and starts nothing. Numbers of rows are in no
hash: a few rows stand for any size of a job.

A process is for this alone: its kernels compute nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from engine import (
    attention8_triton,
    attention16_triton,
    passes,
    passes_triton,
    rounding,
    rounding_triton,
    text_attention,
    text_attention_triton,
    widening,
    widening_triton,
)
from engine.attention import KERNELS, TEXT_TOKENS
from engine.fast_decode import channels
from engine.linear8 import KINDS
from engine.profiles_wan import SHARED
from engine.published import published_model

Capability = tuple[int, int]
EPS = 1e-6  # of the models' norms
THREADS = 1024  # a block's most, on every card
SHARED_BYTES = 2**20  # more than any card has: whether it holds a kernel is found out by the self-tests of a load


class AbsentCard:
    """A driver of Triton that compiles and starts nothing."""

    def __init__(self, capability: Capability) -> None:
        self.kernels: list[str] = []
        """The names of those that have been launched, each form once."""
        self.utils = self
        """Triton asks here for what stands below `get_current_stream`."""
        self._number = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        """One for each capability: Triton remembers a device's target."""
        return self._number

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        """A module, a function in it, registers, how many of them are spilled, threads a block."""
        self.kernels.append(name)
        return name, name, 0, 0, THREADS

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def compile_kernels(capability: Capability) -> list[str]:
    """Compile what a worker on a card of this capability launches into Triton's folder (engine.settings.keep_kernels).

    Returns their names, a name once for each form that it has. 7 s of one core for a Hopper.

    Raises:
        Exception: whatever the compiler has to say.
    """
    card = AbsentCard(capability)
    triton.runtime.driver.set_active(card)
    triton.knobs.compilation.store_binary_only = True  # what a load reads; all steps are 6.7 MB in place of 2.0
    _launch_passes()
    for name in ("int8", "fp8"):
        if _has(capability, name):
            _launch_widening(KINDS[name].dtype)
    if _has(capability, "fp8"):
        _launch_roundings()
        _launch_text_attention()
    if has_own_attention(capability):
        _launch_attention()
    return card.kernels


def has_own_attention(capability: Capability) -> bool:
    """Whether it is a card for the kernels of engine.hopper_kernels."""
    capabilities = KERNELS["attention16"].capabilities
    assert capabilities is not None
    first, beyond = capabilities
    return first <= capability < beyond


def _has(capability: Capability, name: str) -> bool:
    least = KINDS[name].capability
    return least is not None and capability >= least


def _launch_passes() -> None:
    (vae,) = (part for part in SHARED if part.name == "vae")
    for count in sorted(channels(published_model(vae))):
        passes.agree(passes_triton.TRITON, "cpu", count)  # launches all; that they do not agree is no matter


def _launch_widening(format_: torch.dtype) -> None:
    for width in widening.TEST_WIDTHS:
        widening_triton.widened(torch.zeros(widening.TEST_ROWS, width).to(format_), torch.ones(widening.TEST_ROWS))


def _launch_roundings() -> None:
    rows, width, head = rounding.TEST_ROWS, rounding.TEST_WIDTH, rounding.TEST_HEAD
    x, each, angles = _zeros(rows, width), torch.zeros(width), torch.zeros(rows, head)
    rounding_triton.plain_round(x)
    rounding_triton.gelu_round(_zeros(rows, rounding.TEST_FEED_WIDTH))
    rounding_triton.norm_round(x, each, each, EPS)
    for gate in (None, each):
        rounding_triton.add_norm_round(x, x, gate, each, each, EPS)
    rounding_triton.norm_rotate(x, each.bfloat16(), angles, angles, EPS)
    rounding_triton.add_gated(x, x, each)


def _launch_text_attention() -> None:
    tokens, heads, width = text_attention.TEST_TOKENS, text_attention.TEST_HEADS, text_attention.TEST_HEAD
    query, text = _zeros(1, tokens, heads, width), _zeros(1, TEXT_TOKENS, heads, width)
    text_attention_triton.attend_text(query, text, text)
    rows = query[0].flatten(1)
    text_attention_triton.attend_text_round(rows, _zeros(heads * width), text, text, EPS)


def _launch_attention() -> None:
    x = _zeros(text_attention.TEST_TOKENS, text_attention.TEST_HEADS, text_attention.TEST_HEAD)
    attention16_triton.reach_of(x, x)
    attention8_triton.round_queries(x)
    attention8_triton.round_keys(x)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)
