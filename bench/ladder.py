"""One forward of the 14B transformer, a lever at a time: what each is worth, and how far its output moves.

Every rung keeps what the rung before had. Same input, same weights; the error is against the first rung.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.ceilings import Ceilings
from bench.timing import begin_peak, peak_reserved_gib, seconds
from bench.work import TERA, TEXT_TOKENS, Forward, forward_work
from engine import attention
from engine.card import Levers
from engine.compiling import CompiledBlocks
from engine.geometry import LatentShape
from engine.linear8_check import kernel_calls, passing, snr_db
from engine.speed import accelerate, narrow, precision_of

LATENT = LatentShape(21, 60, 104)  # 81 frames of 480 x 832
REPEATS = 5


@dataclass(frozen=True)
class Rung:
    """One forward with all levers up to this one."""

    name: str
    seconds: float
    snr_db: float
    tflop_s: float
    floor_share: float
    """Floor over measured time: the floor is what the ceilings of this run allow."""
    peak_reserved_gib: float
    first_s: float
    """The first call: with `compile` the compiler's time is in it."""
    kernels: dict[str, int]
    """8-bit products that really ran in one forward."""


def inputs(device: str, latent: LatentShape = LATENT, seed: int = 1) -> dict[str, Any]:
    """What the sampling loop gives a Wan2.2 transformer."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    return {
        "hidden_states": draw(1, 36, *latent),
        "timestep": torch.tensor([900.0], device=device),
        "encoder_hidden_states": draw(1, TEXT_TOKENS, 4096),
        "return_dict": False,
    }


def climb(model: nn.Module, ceilings: Ceilings) -> list[Rung]:
    """The ladder of a Wan2.2 transformer on the card, at 832x480x81."""
    return Ladder(model, ceilings, inputs("cuda"), forward_work(LATENT.tokens)).climb()


class Ladder:
    """Climbs with one transformer, which is changed on the way."""

    def __init__(
        self,
        model: nn.Module,
        ceilings: Ceilings,
        given: dict[str, Any],
        work: Forward,
        device: str = "cuda",
        backend: str = "inductor",
    ) -> None:
        self._model = model
        self._device = device
        self._ceilings = ceilings
        self._inputs = given
        self._work = work
        self._backend = backend
        self._reference: torch.Tensor | None = None
        self.rungs: list[Rung] = []

    def climb(self) -> list[Rung]:
        """diffusers as it is; its cuDNN kernel's place taken by each of ours; compiled; 8 bits eager; compiled."""
        self._rung("diffusers, eager")
        fastest = attention.choose(self._device).name
        for name in dict.fromkeys(["cudnn", fastest]):
            if attention.choose(self._device, name).name == name:
                attention.install(self._model, name)
                self._rung(f"+ {name}")
        self._compiled("+ compile")
        for kind in passing(self._device)[:1]:
            narrow(self._model, kind, self._device)
            self._rung(f"+ {kind}, eager")
            self._compiled(f"+ {kind}, compile")
            accelerate([self._model], self._device, Levers(compile=False))
            self._compiled("+ all that a worker does")
            if accelerate([self._model], self._device, Levers("attention8", compile=False)).attention == "attention8":
                self._compiled("+ attention8")
        return self.rungs

    def _compiled(self, name: str) -> None:
        blocks = CompiledBlocks([self._model], backend=self._backend)
        self._forward()  # the eager forward that starts the compiler behind it
        blocks.wait()
        self._rung(name)
        blocks.remove()
        if blocks.notes:
            raise RuntimeError(blocks.notes[0])

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        return self._model(**self._inputs)[0]

    def _rung(self, name: str) -> None:
        begin_peak()
        first_s = seconds(self._forward, repeats=1, warm_up=0)
        spent = seconds(self._forward, REPEATS, warm_up=1)
        out = self._forward().float().cpu()
        if self._reference is None:
            self._reference = out
        precision = precision_of(self._model)
        floor_s = self._work.floor_s(self._ceilings.linear_rate(precision), self._ceilings.attention_rate)
        self.rungs.append(
            Rung(
                name,
                spent,
                snr_db(self._reference, out),
                self._work.total / spent / TERA,
                floor_s / spent,
                peak_reserved_gib(),
                first_s,
                kernel_calls(self._forward),
            )
        )
