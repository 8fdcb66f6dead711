"""What makes a loaded transformer fast, in the order in which it has to be done.

    load -> narrow (8 bits, if wanted) -> place (card, or host and card) -> accelerate (attention, rounding, compile)

Narrowing comes before placing, because placing packs the tensors that are there. The attention kernel and the one-pass
rounding come before compiling, because they are part of the graph.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from engine import attention, block8, linear8_check, rounding, text_attention, waking
from engine.artefacts import Artefacts
from engine.block_graph import start_workers
from engine.block_inputs import block_inputs
from engine.card import Levers
from engine.compiling import PATIENCE_S, Account, CompiledBlocks
from engine.geometry import LatentShape
from engine.linear8 import Linear8, replace_linears, set_kind
from engine.remembered import Remembered
from engine.shadow import Specs


@dataclass(frozen=True)
class Accelerated:
    """What was done. `blocks` is None where nothing is compiled; its own notes grow as it runs."""

    attention: str
    blocks: CompiledBlocks | None
    notes: tuple[str, ...]
    model: nn.Module
    """One of those that run; the others are like it."""
    _inputs: Remembered[tuple[LatentShape, int], tuple[Specs, ...]] = field(default_factory=Remembered, repr=False)

    def expect(self, latents: Iterable[LatentShape], image_tokens: int = 0) -> None:
        """A job begins that will run over latents of these shapes: compile for them if it is to wait for that.

        `image_tokens`: of the picture's embedding, for a model that takes one. Weights need not be there.
        """
        if self.blocks is None:
            return
        self.blocks.begin_job()
        if self.blocks.patience_s is not None:
            self.compile_for(latents, image_tokens)

    def compile_for(self, latents: Iterable[LatentShape], image_tokens: int = 0) -> None:
        """Begin to compile for latents of these shapes, the first one first, where blocks are compiled."""
        if self.blocks is None:
            return
        for latent in dict.fromkeys(latents):
            ask = partial(block_inputs, self.model, latent, self.blocks.device, image_tokens)
            # The question takes 25 ms of a slow host, before a warm job's first work on the card.
            self.blocks.expect(self._inputs.get((latent, image_tokens), ask))

    @property
    def account(self) -> Account | None:
        """What compiling has cost so far; None where nothing is compiled."""
        return None if self.blocks is None else self.blocks.account

    def finish(self) -> None:
        """Return once nothing is being compiled."""
        if self.blocks is not None:
            self.blocks.wait()

    def end_job(self) -> None:
        """Its forwards are over: keep what has been compiled for the next process, and begin what it did not."""
        if self.blocks is not None:
            self.blocks.save()
            self.blocks.end_job()


def prove_ahead(precision: str, device: str, levers: Levers) -> None:
    """Begin the self-tests that a load at this precision will ask for: their kernels compile while it builds models."""
    if waking.prove_first(precision, device, levers) and precision == "fp8":
        rounding.problem.begin(device)
        text_attention.problem.begin(device)


def narrow(model: nn.Module, precision: str | None, device: str) -> tuple[str, ...]:
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
    if precision not in (None, "bf16", wanted):
        raise ValueError(f"the model is baked in {wanted}; it cannot become {precision}")
    replace_linears(model, wanted)
    problem = linear8_check.problem(device, wanted)
    set_kind(model, wanted if problem is None else f"{wanted}-weights")  # the fast kernel, or made wide
    return () if problem is None else (f"8-bit kernel {wanted} is not used: {problem}",)


def accelerate(models: Sequence[nn.Module], device: str, levers: Levers) -> Accelerated:
    """Give transformers of one class their attention kernel and, on a card, compiled blocks.

    `models`: those that run; of rolling experts that is the one model whose storage they share.
    """
    is_compiled = levers.compile and device.startswith("cuda")
    waking.find_kernels(levers)
    if is_compiled and not all(block8.fits(model) for model in models):
        start_workers(torch.device(device))  # first: they come up while the kernels prove themselves
    choice = attention.choose(device, levers.attention, width=attention.head_width(models[0]))
    said = dict.fromkeys(choice.notes)
    for model in models:
        attention.install(model, choice.name, choice.few)
        said |= dict.fromkeys(block8.install(model, device))
    notes = tuple(said)
    if not is_compiled:
        return Accelerated(choice.name, None, notes, models[0])
    variant = f"{precision_of(models[0])}-{choice.name}"
    artefacts = None if levers.cache_dir is None else Artefacts(levers.cache_dir, variant)
    # What is fused by hand takes as long without a graph: 2.01 s a forward at 832x480x81 on an H200, 2.00 with one.
    patience_s = None if all(block8.is_installed(model) for model in models) else PATIENCE_S
    blocks = CompiledBlocks(models, artefacts, device=device, patience_s=patience_s)
    return Accelerated(choice.name, blocks, notes, models[0])


def precision_of(model: nn.Module) -> str:
    """How the model's linear layers multiply: a kind of linear8, or the type of most of its weights."""
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, Linear8)}
    if kinds:
        return "+".join(sorted(kinds))
    held = Counter[torch.dtype]()
    for parameter in model.parameters():
        held[parameter.dtype] += parameter.numel()
    return str(held.most_common(1)[0][0]).removeprefix("torch.")
