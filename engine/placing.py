"""A video profile's parts, loaded to where the plan for this card puts them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from engine.experts import Experts, FixedExperts, RollingExperts
from engine.profile import Profile
from engine.residency import CARD, STREAM_SLOTS, Plan, plan
from engine.visitor import Visitor
from engine.weights import Parts

Use = Callable[[], AbstractContextManager[Any]]
"""A block in which a component stands where it computes."""

ENCODERS = ("text_encoder", "image_encoder")


@dataclass(frozen=True)
class Placed:
    """The experts of one profile, and its encoders by name."""

    plan: Plan | None
    """None on a CPU, where there is one memory and nothing to plan."""
    experts: Experts
    encoders: Mapping[str, Use]
    movers: tuple[Any, ...]
    """What copies between host and card, each with `bytes_moved` and `unload`."""

    @property
    def bytes_moved(self) -> int:
        """Host to device since the load, weights only."""
        return sum(mover.bytes_moved for mover in self.movers)

    def unload(self) -> None:
        for mover in self.movers:
            mover.unload()


def place(
    profile: Profile, parts: Parts, device: torch.device, budget_bytes: int, experts: Mapping[str, str]
) -> Placed:
    """Load experts and encoders of `profile`. `experts`: expert -> the component that holds it.

    Raises:
        RequestTooLarge: no placement fits `budget_bytes` of the card; nothing was loaded.
    """
    if device.type == "cpu":
        fixed = FixedExperts({expert: parts.load(name) for expert, name in experts.items()})
        encoders = {name: _standing(parts.load(name)) for name in _encoders(profile)}
        return Placed(None, fixed, encoders, ())
    made = plan(profile, budget_bytes, capability=torch.cuda.get_device_capability(device))
    movers: list[Any] = []
    uses: dict[str, Use] = {}
    for name in _encoders(profile):
        if made.where(name) == CARD:
            uses[name] = _standing(parts.load(name, str(device)))
        else:
            visitor = Visitor(parts.load(name), str(device))
            movers.append(visitor)
            uses[name] = visitor.on_card
    if made.kind == "resident":
        models = {expert: parts.load(name, str(device)) for expert, name in experts.items()}
        return Placed(made, FixedExperts(models), uses, tuple(movers))
    hosted = {expert: parts.load(name) for expert, name in experts.items()}
    rolling = RollingExperts(hosted, str(device), STREAM_SLOTS if made.kind == "stream" else None)
    return Placed(made, rolling, uses, (*movers, rolling))


def _encoders(profile: Profile) -> list[str]:
    names = {component.name for component in profile.components}
    return [name for name in ENCODERS if name in names]


def _standing(module: Any) -> Use:
    return lambda: nullcontext(module)
