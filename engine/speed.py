"""What makes a loaded transformer fast, in the order in which it has to be done.

    load -> narrow (8 bits, if wanted) -> place (card, or host and card) -> accelerate (attention, compile)

Narrowing comes before placing, because placing packs the tensors that are there. The attention kernel comes
before compiling, because it is part of the graph.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine import attention
from engine.card import Levers
from engine.compiling import Artefacts, CompiledBlocks
from engine.linear8 import Linear8, replace_linears, set_kind
from engine.linear8_check import SelfTest, self_test


@dataclass(frozen=True)
class Accelerated:
    """What was done. `blocks` is None where nothing is compiled; its own notes grow as it runs."""

    attention: str
    blocks: CompiledBlocks | None
    notes: tuple[str, ...]

    def save(self) -> bool:
        """Keep what has been compiled since the last time, for the next process. Between jobs."""
        return self.blocks is not None and self.blocks.save()


def narrow(model: nn.Module, precision: str | None, device: str, tested: SelfTest | None = None) -> tuple[str, ...]:
    """Put the model's linear layers into 8 bits, multiplied as `device` can; returns what should be said.

    `precision`: fp8 or int8; None or bf16: as loaded. A model baked in 8 bits only gets its way of
    multiplying.

    Raises:
        ValueError: the model is in the other 8-bit format already.
    """
    stored = {layer.kind.removesuffix("-weights") for layer in model.modules() if isinstance(layer, Linear8)}
    if not stored and precision in (None, "bf16"):
        return ()
    wanted = stored.pop() if stored else str(precision)
    tested = tested or self_test(device)
    if precision not in (None, "bf16", wanted):
        raise ValueError(f"the model is baked in {wanted}; it cannot become {precision}")
    replace_linears(model, wanted)
    set_kind(model, tested.kind_for(wanted))
    return tested.notes if wanted not in tested.passed else ()


def accelerate(models: Sequence[nn.Module], device: str, levers: Levers) -> Accelerated:
    """Give transformers of one class their attention kernel and, on a card, compiled blocks.

    `models`: those that run; of rolling experts that is the one model whose storage they share.
    """
    choice = attention.choose(device, levers.attention)
    for model in models:
        attention.install(model, choice.name)
    if not levers.compile or not device.startswith("cuda"):
        return Accelerated(choice.name, None, choice.notes)
    variant = f"{precision_of(models[0])}-{choice.name}"
    artefacts = None if levers.cache_dir is None else Artefacts(levers.cache_dir, variant)
    return Accelerated(choice.name, CompiledBlocks(models, artefacts), choice.notes)


def precision_of(model: nn.Module) -> str:
    """How the model's linear layers multiply: a kind of linear8, or the type of most of its weights."""
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, Linear8)}
    if kinds:
        return "+".join(sorted(kinds))
    held = Counter[torch.dtype]()
    for parameter in model.parameters():
        held[parameter.dtype] += parameter.numel()
    return str(held.most_common(1)[0][0]).removeprefix("torch.")
