"""Compile every kernel to the code of the cards that run it. Needs no card, and a process without the interpreter."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import (
    attention8_triton,
    attention16_triton,
    passes_triton,
    rounding_triton,
    text_attention_triton,
    widening_triton,
)

AMPERE, ADA, HOPPER = 80, 89, 90
PIXELS = {"channels": 96, "block": 128, "tile": 16}
NORM = {**PIXELS, "root": 9.8, "smallest": 1e-12, "has_bias": True}
ROW = {"width": 5120, "block": 8192, "smallest": 1e-12, "limit": 448.0}
PASSES: list[tuple[Any, dict[str, Any]]] = [
    (passes_triton._norm_silu_kernel, {**NORM, "stacked": False}),
    (passes_triton._norm_silu_kernel, {**NORM, "stacked": True}),
    (passes_triton._add_kernel, PIXELS),
    (passes_triton._double_size_kernel, PIXELS),
]
ROUNDINGS: list[tuple[Any, dict[str, Any]]] = [
    (rounding_triton._plain_round_kernel, ROW),
    (rounding_triton._gelu_round_kernel, ROW),
    (rounding_triton._norm_round_kernel, {**ROW, "eps": 1e-6, "has_added": False, "has_gate": False}),
    (rounding_triton._norm_round_kernel, {**ROW, "eps": 1e-6, "has_added": True, "has_gate": False}),
    (rounding_triton._norm_round_kernel, {**ROW, "eps": 1e-6, "has_added": True, "has_gate": True}),
    (rounding_triton._norm_rotate_kernel, {"width": 5120, "block": 8192, "head": 128, "eps": 1e-6}),
    (rounding_triton._add_gated_kernel, {"width": 5120, "block": 8192}),
]
TEXT = {
    "keys": 512, "heads": 40, "width": 128, "block": 128, "queries": text_attention_triton.QUERIES,
    "tile": text_attention_triton.KEYS, "scale": 0.1275, "stages": text_attention_triton.STAGES,
}  # fmt: skip
TEXT_ATTENTION: list[tuple[Any, dict[str, Any]]] = [
    (text_attention_triton._survey_kernel, {"keys": 512, "width": 5120, "block": 8192}),
    (text_attention_triton._root_kernel, {"width": 5120, "block": 8192, "eps": 1e-6}),
    (text_attention_triton._attend_kernel, TEXT),
    (text_attention_triton._attend_round_kernel, {**TEXT, "smallest": 1e-12, "limit": 448.0}),
]
ROWS = {"width": 128, "tile": 64, "smallest": 1e-12, "limit": 127.0}
ATTENTION8: list[tuple[Any, dict[str, Any]]] = [
    (attention8_triton._round_queries_kernel, {**ROWS, "factor": 0.1275}),
    (attention8_triton._round_keys_kernel, {**ROWS, "tile": 80, "block": 128}),
]
ATTENTION8_TYPES = {
    "values_at": "*i8", "scales_at": "*fp32", "longest_at": "*fp32", "means_at": "*fp32", "rows": "i32", "heads": "i32",
}  # fmt: skip
LENGTHS = {"width": 128, "tile": attention16_triton.TILE}
LENGTHS_TYPES = {"longest_at": "*fp32", "sums_at": "*fp32", "rows": "i32", "heads": "i32"}
WIDENING = {"width": 5120, "block": 8192}
NUMBERS = {"frames": "i32", "pixels": "i32", "width": "i32"}
FP32 = ("gate_at", "weight_at", "bias_at", "scales_at", "cos_at", "sin_at")
ROUNDINGS_TYPES = {**dict.fromkeys(FP32, "*fp32"), "values_at": "*fp8e4nv", "rows": "i32"}
OF_TEXT = {"found_at": "*i32", "tokens": "i32", "roots_at": "*fp32", "scales_at": "*fp32", "values_at": "*fp8e4nv"}
TEXT_ATTENTION_TYPES = [{"key_at": "*i16", "value_at": "*i16", "found_at": "*i32"}, *[OF_TEXT] * 3]


def compile_for(card: int, kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> None:
    """Print what was compiled. Tensors that `types` does not name are bf16."""
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", card, 32))
    assert made.asm["cubin"]
    print(card, kernel.__name__)  # noqa: T201 the test reads it


if __name__ == "__main__":
    for card in (AMPERE, HOPPER):
        for kernel, constants in PASSES:
            compile_for(card, kernel, constants, NUMBERS)
        compile_for(card, widening_triton._widen_kernel, WIDENING, {**ROUNDINGS_TYPES, "values_at": "*i8"})
    for card in (ADA, HOPPER):  # the first with fp8
        compile_for(card, widening_triton._widen_kernel, WIDENING, ROUNDINGS_TYPES)
        for kernel, constants in ROUNDINGS:
            compile_for(card, kernel, constants, ROUNDINGS_TYPES)
        for (kernel, constants), types in zip(TEXT_ATTENTION, TEXT_ATTENTION_TYPES, strict=True):
            compile_for(card, kernel, constants, types)

    for kernel, constants in ATTENTION8:
        compile_for(HOPPER, kernel, constants, ATTENTION8_TYPES)
    compile_for(HOPPER, attention16_triton._lengths_kernel, LENGTHS, LENGTHS_TYPES)
