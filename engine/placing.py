"""A video profile's parts, loaded to where the plan for this card puts them."""

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from engine.card import Card
from engine.experts import Experts, FixedExperts, RollingExperts
from engine.profile import Profile
from engine.residency import CARD, FAST_SINCE, STREAM_SLOTS, Plan, plan
from engine.speed import Accelerated, accelerate, narrow
from engine.visitor import Visitor
from engine.weights import Parts

log = logging.getLogger(__name__)

Use = Callable[[], AbstractContextManager[Any]]
"""A block in which a component stands where it computes."""

ENCODERS = ("text_encoder", "image_encoder")


@dataclass(frozen=True)
class Placed:
    """The experts of one profile, its VAE, and its encoders by name."""

    plan: Plan | None
    """None on a CPU, where there is one memory and nothing to plan."""
    experts: Experts
    encoders: Mapping[str, Use]
    vae: Any
    """Encodes, in fp32: what it makes is held against every later frame."""
    decoder: Any
    """Decodes. The same VAE, or a bf16 copy of its second half beside 8-bit experts."""
    movers: tuple[Any, ...] = ()
    """What copies between host and card, each with `bytes_moved` and `unload`."""
    accelerated: Accelerated | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """Host to device since the load, weights only."""
        return sum(mover.bytes_moved for mover in self.movers)

    def settle(self) -> None:
        """Between jobs: keep for the next process what this one has compiled."""
        if self.accelerated is not None:
            self.accelerated.save()

    def unload(self) -> None:
        for mover in self.movers:
            mover.unload()


def place(profile: Profile, parts: Parts, card: Card, experts: Mapping[str, str]) -> Placed:
    """Load experts, VAE and encoders of `profile`. `experts`: expert -> the component that holds it.

    Raises:
        RequestTooLarge: no placement fits the card's budget; nothing was loaded.
    """
    if card.device == "cpu":
        fixed = FixedExperts({expert: parts.load(name) for expert, name in experts.items()})
        encoders = {name: _standing(parts.load(name)) for name in _encoders(profile)}
        vae = parts.load("vae")
        return Placed(None, fixed, encoders, vae, vae)
    made = plan(
        profile,
        card.budget_bytes,
        precision=card.precision,
        capability=torch.cuda.get_device_capability(card.device),
    )
    # Experts first: narrowing to 8 bits needs room for one of them in 16.
    running, running_models, notes = _experts(parts, card, made, experts)
    accelerated = accelerate(running_models, card.device, card.levers)
    movers: list[Any] = [running] if isinstance(running, RollingExperts) else []
    uses: dict[str, Use] = {}
    for name in _encoders(profile):
        if made.where(name) == CARD:
            uses[name] = _standing(parts.load(name, card.device))
        else:
            visitor = Visitor(parts.load(name), card.device)
            movers.append(visitor)
            uses[name] = visitor.on_card
    vae = parts.load("vae", card.device)
    decoder = vae if made.precision not in FAST_SINCE else _bf16_decoder(vae)
    notes = (*notes, *accelerated.notes)
    log.info("%s\nattention: %s%s", made.table(), accelerated.attention, "".join(f"\n- {note}" for note in notes))
    return Placed(made, running, uses, vae, decoder, tuple(movers), accelerated, notes)


def _experts(
    parts: Parts, card: Card, made: Plan, experts: Mapping[str, str]
) -> tuple[Experts, list[Any], tuple[str, ...]]:
    """The experts where the plan puts them, the models that run, and what should be said."""
    is_narrow = made.precision in FAST_SINCE
    models, notes = {}, dict[str, None]()
    for expert, name in experts.items():
        model = parts.load(name, card.device if made.kind == "resident" or is_narrow else "cpu")
        notes |= dict.fromkeys(narrow(model, made.precision, card.device))
        models[expert] = model if made.kind == "resident" else model.to("cpu")
    if made.kind == "resident":
        return FixedExperts(models), list(models.values()), tuple(notes)
    rolling = RollingExperts(models, card.device, STREAM_SLOTS if made.kind == "stream" else None)
    return rolling, [rolling.model], (*notes, *rolling.notes)


def _bf16_decoder(vae: Any) -> Any:
    decoder = copy.deepcopy(vae).to(torch.bfloat16)
    del decoder.encoder, decoder.quant_conv
    return decoder


def _encoders(profile: Profile) -> list[str]:
    names = {component.name for component in profile.components}
    return [name for name in ENCODERS if name in names]


def _standing(module: Any) -> Use:
    return lambda: nullcontext(module)
