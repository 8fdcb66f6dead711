"""The Euler grid that the two-expert schedule was tuned on, and which expert runs which of its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from engine.lora import Expert
from engine.passage import to_device
from schemas.errors import InvalidInput, Problem


class ReferenceEuler(FlowMatchEulerDiscreteScheduler):
    """Flow-matching Euler on the grid linspace(1000, 1, steps), shifted, then 0; latents stay fp32.

    The stock grid ends elsewhere, so that 883 would mean 3 + 3 steps in place of 2 + 4; and the stock step
    rounds the latents to the model's dtype, an error of 0.03 after 6 steps in bf16. It holds the state of one
    run: make one for each. Source: Wan2GP at 8681e9f7, shared/utils/euler_scheduler.py.
    """

    def grid(self, steps: int) -> list[float]:
        """The noise levels before the shift, without the final 0."""
        return list(np.linspace(1.0, 0.001, steps).tolist())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Lay the grid; `timesteps` (steps,) and `sigmas` (steps + 1,) are fp32 on `device`.

        Raises:
            ValueError: anything but a number of steps is asked for.
        """
        if num_inference_steps is None or not (sigmas is mu is timesteps is None):
            raise ValueError("this scheduler has one grid; give the number of steps and nothing else")
        super().set_timesteps(num_inference_steps, "cpu", sigmas=self.grid(num_inference_steps))
        if device is not None:  # the stock way there would wait for the card
            laid: Any = self  # the stock class promises arrays and holds tensors
            laid.timesteps, laid.sigmas = to_device(laid.timesteps, device), to_device(laid.sigmas, device)
        self.set_begin_index(0)  # as would the stock look-up of the index by timestep

    def step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One Euler step in fp32, whatever the model's dtype; the arguments are the stock ones."""
        return super().step(
            model_output.float(), timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
            per_token_timesteps, return_dict,
        )  # fmt: skip


class DistilledEuler(ReferenceEuler):
    """The same on equal steps down to 0, linspace(1000, 0, steps + 1): the points that step distillation trains.

    Four steps with shift 5 are t = 1000, 937.5, 833.3, 625. The reference grid would spend the last of them at t = 5.
    """

    def grid(self, steps: int) -> list[float]:
        """The noise levels before the shift, without the final 0."""
        return list(np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())


def reference_timesteps(steps: int, flow_shift: float) -> tuple[float, ...]:
    """The reference grid as numbers on the host, 1000 first, without the final 0: what a split is planned on."""
    return timesteps_of(ReferenceEuler(shift=flow_shift), steps)


def timesteps_of(scheduler: ReferenceEuler, steps: int) -> tuple[float, ...]:
    """As `reference_timesteps`, of the given scheduler's grid."""
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


@dataclass(frozen=True)
class Split:
    """How many steps each expert runs, the high-noise one first."""

    high: int
    low: int

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The expert of each step."""
        return tuple("high" if i < self.high else "low" for i in range(self.high + self.low))

    def __str__(self) -> str:
        return f"{self.high} high + {self.low} low steps"


def split_at(timesteps: Sequence[float], threshold: float) -> Split:
    """High while t > threshold. 883 is a hair above the third of six steps (882.53), no trait of the model.

    Raises:
        InvalidInput: an expert would not run at all; names the split, and the thresholds that use both.
    """
    high = sum(t > threshold for t in timesteps)
    split = Split(high, len(timesteps) - high)
    if len(timesteps) < 2:
        raise InvalidInput([Problem("num_inference_steps", "must be at least 2: each expert needs a step")])
    if not split.high or not split.low:
        grid = ", ".join(f"{t:.2f}" for t in timesteps)
        least = math.ceil(100 * timesteps[-1]) / 100  # rounded up: t = 4.9801 is above a threshold of 4.98
        raise InvalidInput(
            [
                Problem(
                    "switch_threshold",
                    f"{threshold:g} gives {split}, and each expert needs at least one; with the steps at "
                    f"t = {grid} it must be from {least:.2f} to below {timesteps[0]:.2f}",
                )
            ]
        )
    return split


def split_counts(high: int, low: int) -> Split:
    """The split by explicit numbers of steps.

    Raises:
        InvalidInput: an expert would not run at all.
    """
    split = Split(high, low)
    problems = [
        Problem(name, f"{split} leave an expert out; each needs at least one")
        for name, steps in (("high_steps", high), ("low_steps", low))
        if steps < 1
    ]
    if problems:
        raise InvalidInput(problems)
    return split
