"""The two-phase sampling loop: one expert at a time, guidance per phase, latents in fp32 all through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, cat

from engine.lora import Expert
from engine.scheduler import ReferenceEuler

OnStep = Callable[[int, Tensor], None]
"""(steps done, latents fp32). Progress, previews; raising ends the run between two steps."""


class ExpertSource(Protocol):
    """Where the two transformers come from: what this loop needs of engine.experts."""

    def use(self, expert: str, forwards: int = 0, then: str | None = None) -> Any:
        """A context whose value is the model to call, `forwards` times; `then`: who comes after it."""


@dataclass(frozen=True)
class PhaseRun:
    """A run of steps with one expert. A guidance scale of 1 or below costs one forward a step, else two."""

    expert: Expert
    steps: int
    guidance_scale: float

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def forwards(self) -> int:
        return self.steps * (2 if self.is_guided else 1)


@dataclass(frozen=True)
class Prompts:
    """Text embeddings (1, tokens, dim). `negative` may be None where no phase is guided."""

    positive: Tensor
    negative: Tensor | None = None


def denoise(
    noise: Tensor,
    condition: Tensor,
    prompts: Prompts,
    phases: tuple[PhaseRun, ...],
    scheduler: ReferenceEuler,
    experts: ExpertSource,
    on_step: OnStep,
) -> Tensor:
    """Run every phase and return the denoised latents.

    `noise` (1, 16, T, h, w) and `condition` (1, 20, T, h, w), both fp32 on the experts' device. The result is
    normalised, fp32. Which expert runs which step is known before the first one; nothing here waits for the
    card.

    Raises:
        ValueError: a guided phase without a negative prompt.
    """
    if prompts.negative is None and any(phase.is_guided for phase in phases):
        raise ValueError("a guided phase needs the negative prompt's embedding")
    scheduler.set_timesteps(sum(phase.steps for phase in phases), noise.device)
    latents, done = noise, 0
    followers = [
        *phases[1:],
        phases[0],
    ]  # after the last step the next run's first expert may come in already
    for phase, follower in zip(phases, followers, strict=True):
        with experts.use(phase.expert, phase.forwards, follower.expert) as model:
            for _ in range(phase.steps):
                timestep = scheduler.timesteps[done]
                velocity = _velocity(model, cat([latents, condition], dim=1), timestep, prompts, phase)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                done += 1
                on_step(done, latents)
    return latents


def _velocity(model: Any, inputs: Tensor, timestep: Tensor, prompts: Prompts, phase: PhaseRun) -> Tensor:
    """The guided prediction (1, 16, T, h, w) fp32: uncond + scale * (cond - uncond)."""
    inputs = inputs.to(model.dtype)
    positive = _forward(model, inputs, timestep, prompts.positive)
    if prompts.negative is None or not phase.is_guided:
        return positive
    negative = _forward(model, inputs, timestep, prompts.negative)
    return negative + phase.guidance_scale * (positive - negative)


def _forward(model: Any, inputs: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
    prediction: Tensor = model(
        hidden_states=inputs,  # (1, 36, T, h, w)
        timestep=timestep.expand(inputs.shape[0]),
        encoder_hidden_states=prompt.to(device=inputs.device, dtype=inputs.dtype),
        return_dict=False,
    )[0]
    return prediction.float()
