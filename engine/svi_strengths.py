"""LoRA strengths of one request, where they are not those that the bake merged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from engine.denoise import ExpertSource
from engine.lora import Expert, LoraWeights
from engine.lora_live import Change, live_adapters, strength_changes
from engine.multipliers import FIELD
from engine.profile import Lora, Profile
from engine.svi_request import PHASES, asked_strengths
from schemas.errors import InvalidInput, Problem


@runtime_checkable
class KeepsLoras(Protocol):
    """Parts that may hold the LoRA files beside the weights that they were merged into."""

    @property
    def keeps_loras(self) -> bool:
        """Whether they do: the bake is asked to."""

    def load_lora(self, lora: Lora) -> LoraWeights:
        """Read one of the profile's LoRA files."""


@dataclass(frozen=True)
class AdjustedExperts:
    """Experts that run at other LoRA strengths while they are used, and are as before afterwards."""

    experts: ExpertSource
    changes: Mapping[Expert, Sequence[Change]]

    @contextmanager
    def use(self, expert: str, forwards: int = 0, then: str | None = None) -> Iterator[Any]:
        """See ExpertSource.use."""
        name: Expert = "high" if expert == "high" else "low"
        with (
            self.experts.use(expert, forwards, then) as model,
            live_adapters({name: model}, {name: self.changes[name]}, model.dtype),
        ):
            yield model


def with_strengths(
    experts: ExpertSource,
    profile: Profile,
    parts: object,
    multipliers: Sequence[str] | None,
) -> ExpertSource:
    """`experts` at the strengths that a request asks for; the same object where it asks for the baked ones.

    Raises:
        InvalidInput: `multipliers` do not fit the profile's LoRAs, or the bake kept no LoRA files.
    """
    if multipliers is None:
        return experts
    asked = asked_strengths(profile, multipliers)
    baked = [[lora.strength * (lora.expert == expert) for expert in PHASES] for lora in profile.loras]
    if [list(row) for row in asked] == baked:
        return experts
    if not isinstance(parts, KeepsLoras) or not parts.keeps_loras:
        raise InvalidInput([Problem(FIELD, "must be left out: these weights were baked without --keep-loras")])
    loras = [parts.load_lora(lora) for lora in profile.loras]
    changes = {
        expert: strength_changes(loras, [row[i] for row in asked], [row[i] for row in baked])
        for i, expert in enumerate(PHASES)
    }
    return AdjustedExperts(experts, changes)
