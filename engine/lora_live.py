"""LoRA strengths of one request, on weights that already hold the profile's own.

The baked weight cannot be taken apart again, so nothing is written to it: a forward hook adds the difference,
(asked - baked) * up(down(x)), and undoing it is removing the hook. The factors stay in host memory and are
copied to the card as each module runs: about 2 GB a forward of a 14B expert, and no memory held on the card.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from engine.lora import Expert, Full, LoraWeights, LowRank
from schemas.errors import InvalidInput, Problem, WeightsCorrupt

Change = tuple[LoraWeights, float]
"""A LoRA and how much its strength differs from the baked one."""


def strength_changes(loras: Sequence[LoraWeights], asked: Sequence[float], baked: Sequence[float]) -> list[Change]:
    """What one phase must add: a row for each LoRA whose strength is not the baked one."""
    rows = zip(loras, asked, baked, strict=True)
    return [(lora, want - have) for lora, want, have in rows if want != have]


@contextmanager
def live_adapters(
    experts: Mapping[Expert, nn.Module], changes: Mapping[Expert, Sequence[Change]], dtype: torch.dtype
) -> Iterator[None]:
    """Run the experts at other LoRA strengths inside the block; after it, or on an error, they are as before.

    `dtype`: what the added product is computed in. Compiled blocks run eagerly meanwhile, because a compiled
    block does not see a hook that came after it.

    Raises:
        InvalidInput: a LoRA changes something else than linear layers, which only the bake can do.
        WeightsCorrupt: a delta does not fit its module.
        RuntimeError: at the end of the block, when a module with a correction never ran.
    """
    corrections: list[_Correction] = []
    with ExitStack() as undo:
        for expert, mine in changes.items():
            for name, parts in _by_module(mine).items():
                correction = _Correction(name, _linear(experts[expert], name, parts), parts, dtype)
                undo.callback(correction.module.register_forward_hook(correction).remove)
                corrections.append(correction)
        if corrections:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    unused = [correction.name for correction in corrections if not correction.ran]
    if unused:
        raise RuntimeError(f"{len(unused)} modules ran past their LoRA correction: {', '.join(unused[:4])}")


class _Correction:
    """The forward hook of one module: all its LoRAs stacked into one product."""

    def __init__(self, name: str, module: nn.Module, parts: "_Parts", dtype: torch.dtype) -> None:
        low = [(delta, strength) for delta, strength in parts["weight"] if isinstance(delta, LowRank)]
        self.name = name
        self.module = module
        self.ran = False
        self._dtype = dtype
        self._down = torch.cat([delta.down.to(dtype) for delta, _ in low]) if low else None  # (ranks, in)
        self._up = (
            torch.cat([(strength * delta.scale * delta.up.float()).to(dtype) for delta, strength in low], dim=1)
            if low
            else None
        )  # (out, ranks)
        self._whole = _sum([pair for pair in parts["weight"] if isinstance(pair[0], Full)], dtype)  # (out, in)
        self._bias = _sum(parts["bias"], dtype)  # (out,)

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.ran = True
        x = args[0].to(self._dtype)
        if self._down is not None and self._up is not None:
            inner = nn.functional.linear(x, self._down.to(x.device))
            output = output + nn.functional.linear(inner, self._up.to(x.device)).to(output.dtype)
        if self._whole is not None:
            output = output + nn.functional.linear(x, self._whole.to(x.device)).to(output.dtype)
        if self._bias is not None:
            output = output + self._bias.to(device=x.device, dtype=output.dtype)
        return output


_Parts = dict[str, list[tuple[LowRank | Full, float]]]


def _by_module(changes: Sequence[Change]) -> dict[str, _Parts]:
    modules: dict[str, _Parts] = {}
    for lora, strength in changes:
        for name, delta in lora.deltas.items():
            module, _, parameter = name.rpartition(".")
            if parameter not in ("weight", "bias"):
                raise _not_linear(name)
            modules.setdefault(module, {"weight": [], "bias": []})[parameter].append((delta, strength))
    return modules


def _linear(model: nn.Module, name: str, parts: _Parts) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise WeightsCorrupt(f"a LoRA changes {name}, which the model does not have") from error
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        raise _not_linear(name)
    expected = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    for parameter, deltas in parts.items():
        for delta, _ in deltas:
            if tuple(delta.shape) != expected[parameter]:
                raise WeightsCorrupt(
                    f"a LoRA changes {name}.{parameter} by {tuple(delta.shape)}, not {expected[parameter]}"
                )
    return module


def _not_linear(name: str) -> InvalidInput:
    return InvalidInput(
        [
            Problem(
                "loras_multipliers",
                f"a LoRA changes {name}, which is no linear layer: its strength is fixed at bake",
            )
        ]
    )


def _sum(parts: Sequence[tuple[LowRank | Full, float]], dtype: torch.dtype) -> Tensor | None:
    if not parts:
        return None
    total = torch.zeros(parts[0][0].shape)
    for delta, strength in parts:
        total += strength * delta.dense()
    return total.to(dtype)
