"""How far 8-bit layers move the result: per layer, and per forward against bf16. Weights are synthetic.

Random weights are kind to 8 bits. Trained ones have outliers, so a second set has one row and one column in 128
twenty times larger. Neither says what real weights do; they say what to be careful about.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.ladder import inputs
from engine.linear8 import Linear8, replace_linears
from engine.linear8_check import layer_snr_db, snr_db

OUTLIER, EVERY = 20.0, 128
MAX_ROWS = 1024  # of each of 400 layers' inputs, kept for its own figure: 5 GB in all


@dataclass(frozen=True)
class Accuracy:
    weights: str
    kind: str
    layer_db: dict[str, tuple[float, float]]
    """Kind of layer, as attn1.to_q -> lowest and median SNR over the blocks."""
    forward_db: float


def add_outliers(model: nn.Module) -> None:
    """Scale one row and one column in 128 of every linear weight inside the blocks."""
    for layer in _linears(model).values():
        layer.weight.data[::EVERY] *= OUTLIER
        layer.weight.data[:, ::EVERY] *= OUTLIER


def compare(
    load: Callable[[], nn.Module], kinds: tuple[str, ...], given: dict[str, Any] | None = None
) -> list[Accuracy]:
    """`load` gives a fresh bf16 transformer on the device; it is called once for each set of weights and kind."""
    results = []
    for weights in ("random", "with outliers"):
        for kind in kinds:
            model = load()
            if weights == "with outliers":
                add_outliers(model)
            results.append(_measure(weights, kind, model, given or inputs("cuda")))
    return results


@torch.inference_mode()
def _measure(weights: str, kind: str, model: nn.Module, given: dict[str, Any]) -> Accuracy:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])[:MAX_ROWS]})
        )
        for name, layer in _linears(model).items()
    ]
    reference = model(**given)[0]
    for hook in hooks:
        hook.remove()
    by_layer: dict[str, list[float]] = {}
    for name, layer in _linears(model).items():
        by_layer.setdefault(name.split(".", 2)[2], []).append(layer_snr_db(layer, seen.pop(name), kind))
    replace_linears(model, kind)
    layers = {name: (min(values), statistics.median(values)) for name, values in by_layer.items()}
    return Accuracy(weights, kind, layers, snr_db(reference, model(**given)[0]))


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("blocks.") and isinstance(layer, nn.Linear) and not isinstance(layer, Linear8)
    }
