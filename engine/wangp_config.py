"""Model definitions in Wan2GP's JSON form -> rows of our profile table.

People share SVI set-ups as such files. Every field is read, checked and given its place, or refused; what
the file wants must be what the bake merged, because a baked strength cannot be taken out again.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.geometry import frames_advice, is_legal_frames
from engine.multipliers import parse_multipliers
from engine.profile import Lora, Phase, Profile
from schemas.errors import InvalidInput, Problem

PHASES = ("high", "low")
SVI_LAYOUT = {True: "svi_latent", False: "flf"}
"""svi2pro -> layout: the anchor's latent and zeros, or one encode of start, grey and end."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Model(_Part):
    name: str
    """For a menu, as is the description; neither is carried over."""
    description: str = ""
    architecture: Literal["i2v_2_2"]
    URLs: Literal["i2v_2_2"]
    URLs2: Literal["i2v_2_2"]
    svi2pro: bool = False
    loras: list[str]
    loras_multipliers: list[str | float]
    lock_guidance_phases: bool = False
    group: str = ""


class _Config(_Part):
    model: _Model
    video_length: int = Field(ge=5)
    guidance_phases: Literal[2]
    num_inference_steps: int = Field(ge=2, le=100)
    guidance_scale: float = Field(ge=1, le=20)
    guidance2_scale: float = Field(ge=1, le=20)
    flow_shift: float = Field(gt=0, le=20)
    switch_threshold: float = Field(gt=0, lt=1000)
    model_switch_phase: Literal[1, 2]
    seed: int = Field(ge=0, lt=2**32)
    sample_solver: Literal["euler"]
    negative_prompt: str


def import_config(text: str, name: str, base: Profile) -> Profile:
    """The profile that a JSON file describes, run on the weights of `base`.

    `name`: what requests will call it; the file's own name without `.json`. What had to be corrected is
    said in `settings["corrections"]`.

    Raises:
        InvalidInput: every field that is unknown, missing, wrong, or not what `base` was baked with.
    """
    config = _parse(text)
    problems: list[Problem] = []
    if not is_legal_frames(config.video_length):
        problems.append(Problem("video_length", frames_advice(config.video_length)))
    elif config.video_length > base.max_frames:
        problems.append(Problem("video_length", f"must be at most {base.max_frames}; longer films are chains"))
    loras = _loras(config.model, base, problems)
    if problems:
        raise InvalidInput(problems)
    return replace(
        base,
        name=name,
        layout=SVI_LAYOUT[config.model.svi2pro],
        frames=config.video_length,
        loras=loras,
        schedule=replace(
            base.schedule,
            solver=config.sample_solver,
            steps=config.num_inference_steps,
            flow_shift=config.flow_shift,
            switch_threshold=config.switch_threshold,
        ),
        phases=(Phase("high", config.guidance_scale), Phase("low", config.guidance2_scale)),
        negative_prompt=config.negative_prompt,
        settings=MappingProxyType(_settings(config)),
    )


def _settings(config: _Config) -> dict[str, Any]:
    model = config.model
    settings: dict[str, Any] = {
        "architecture": model.architecture,
        "svi2pro": model.svi2pro,
        "loras_multipliers": tuple(model.loras_multipliers),
        "lock_guidance_phases": model.lock_guidance_phases,
        "group": model.group,
        "guidance_phases": config.guidance_phases,
        "model_switch_phase": 1,
        "seed": config.seed,
    }
    if config.model_switch_phase == 2:
        settings["corrections"] = (
            "model_switch_phase 2 was read as 1: with 2 phases, 2 means that the low-noise expert never runs and "
            "the low-noise LoRAs go to the high-noise expert",
        )
    return settings


def _loras(model: _Model, base: Profile, problems: list[Problem]) -> tuple[Lora, ...]:
    """The base's LoRAs in the file's order; only what the bake merged, at the strength it merged."""
    baked = {PurePosixPath(lora.file).name: lora for lora in base.loras}
    asked = [PurePosixPath(url).name for url in model.loras]
    if sorted(asked) != sorted(baked):
        missing, more = sorted(set(baked) - set(asked)), sorted(set(asked) - set(baked))
        words = [f"{file} is baked in and must be named" for file in missing]
        words += [f"{file} is not baked into {base.name}" for file in more]
        problems.append(Problem("model.loras", "; ".join(words) or "names a file twice"))
        return ()
    loras = tuple(baked[file] for file in asked)
    try:
        strengths = parse_multipliers(model.loras_multipliers, len(loras), len(PHASES))
    except InvalidInput as error:
        problems.extend(Problem(f"model.{problem.field}", problem.message) for problem in error.problems)
        return ()
    problems.extend(_not_baked(loras, strengths))
    return loras


def _not_baked(loras: Sequence[Lora], strengths: Sequence[tuple[float, ...]]) -> list[Problem]:
    """Strengths other than the baked ones: they need a bake of their own, or a request that says so."""
    problems = []
    for index, (lora, row) in enumerate(zip(loras, strengths, strict=True)):
        merged = tuple(lora.strength if lora.expert == expert else 0.0 for expert in PHASES)
        if row != merged:
            problems.append(
                Problem(
                    f"model.loras_multipliers[{index}]",
                    f'must be "{";".join(f"{value:g}" for value in merged)}", which the bake merged; '
                    "a request can ask for others by loras_multipliers",
                )
            )
    return problems


def _parse(text: str) -> _Config:
    try:
        return _Config.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidInput([Problem("", f"is no JSON: {error.msg} in line {error.lineno}")]) from error
    except ValidationError as error:
        raise InvalidInput([_problem(found) for found in error.errors(include_url=False)]) from error


def _problem(found: Any) -> Problem:
    field = ".".join(str(part) for part in found["loc"])
    words = {"extra_forbidden": "is not a field that this worker knows", "missing": "is missing"}
    return Problem(field, words.get(found["type"], found["msg"]))
