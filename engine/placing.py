"""A video profile's parts, loaded to where the plan for this card puts them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from engine import umt5_passes
from engine.arrival import Arrival, Coming
from engine.card import Card
from engine.experts import Experts, FixedExperts, RollingExperts
from engine.fast_decode import FastDecoder, channels
from engine.geometry import LatentShape
from engine.loading import Loaded, Loader
from engine.packing import HostCopy
from engine.parking import Parkable
from engine.passes import Chooser
from engine.profile import EIGHT_BITS, Profile
from engine.progress import Progress
from engine.readahead import order_of_need
from engine.residency import CARD, STREAM_SLOTS, Plan, plan
from engine.speed import Accelerated, accelerate, narrow, prove_ahead
from engine.standing import Standing
from engine.visitor import Visitor
from engine.weights import Parts

log = logging.getLogger(__name__)

Use = Callable[[], AbstractContextManager[Any]]
"""A block in which a component stands where it computes."""

ENCODERS = ("text_encoder", "image_encoder")


class Mover(Parkable, Protocol):
    """What copies between host and card."""

    bytes_moved: int


@dataclass(eq=False)
class Placed:
    """The experts of one profile, its VAE, and its encoders by name. All of it parks as one, see engine.parking."""

    plan: Plan | None
    """None on a CPU, where there is one memory and nothing to plan."""
    experts: Experts
    encoders: Mapping[str, Use]
    vae: Any
    """Encodes, in fp32: what it makes is held against every later frame."""
    make_decoder: Callable[[], Any]
    """What decodes, made from the VAE on the card: the same VAE, or a bf16 FastDecoder beside 8-bit experts. With its
    weights at the load, in milliseconds: what a job took of the allocator's memory later, the next would lack."""
    arrival: Arrival
    """Reads what is not there yet."""
    standing: Standing
    """What is on the card for good: the VAE, fixed experts, encoders that do not visit."""
    movers: tuple[Mover, ...] = ()
    accelerated: Accelerated | None = None
    notes: tuple[str, ...] = ()
    image_tokens: int = 0
    """Of a picture's embedding; 0 without an image encoder."""
    passes: Chooser | None = None
    """Chooses those of a FastDecoder; None: torch's serve, or it is another decoder."""

    def __post_init__(self) -> None:
        self._decoder = self.make_decoder()

    @property
    def decoder(self) -> Any:
        """What `make_decoder` has made; waits until its passes are chosen. None while it is parked."""
        if self._decoder is not None and self.passes is not None:
            self._decoder.passes = self.passes.chosen()
        return self._decoder

    @property
    def bytes_moved(self) -> int:
        """Host to device by what moves in a job, since the load, weights only."""
        return sum(mover.bytes_moved for mover in self.movers)

    @contextmanager
    def attended(self, progress: Progress) -> Iterator[None]:
        """A job at work with the models: its cancel ends a wait for weights. No thread outlives the block."""
        try:
            with self.arrival.attended(progress):
                yield
        finally:
            if self.passes is not None:
                self.passes.join()

    def expect(self, latents: Iterable[LatentShape]) -> None:
        """A job begins that will run over latents of these shapes; see Accelerated.expect."""
        if self.accelerated is not None:
            self.accelerated.expect(latents, self.image_tokens)

    def forwards_begin(self) -> None:
        """The card has work from now on: choose meanwhile what the decode after it needs."""
        if self.passes is not None:
            self.passes.begin()

    def end_job(self) -> None:
        """The card has done its work for a job; see Accelerated.end_job."""
        if self.accelerated is not None:
            self.accelerated.end_job()

    def finish(self) -> None:
        """Return once nothing is being compiled."""
        if self.accelerated is not None:
            self.accelerated.finish()

    @property
    def is_whole(self) -> bool:
        return all(part.is_whole for part in self._parts)

    @property
    def needed_bytes(self) -> int:
        return sum(part.needed_bytes for part in self._parts)

    @property
    def held_bytes(self) -> int:
        return sum(part.held_bytes for part in self._parts)

    def park(self) -> int:
        """A bf16 decoder goes: made again from the VAE in milliseconds, it is not worth 0.15 GB of locked memory."""
        self.arrival.pause()  # nothing is read any more, and every copy to the card is done
        self._decoder = None
        return sum(part.park() for part in self._parts)

    def bring_back(self) -> int:
        moved_bytes = sum(part.bring_back() for part in self._parts)
        self._decoder = self.make_decoder()
        return moved_bytes

    def unload(self) -> None:
        self.arrival.close()
        self._decoder = None
        for part in self._parts:
            part.unload()

    @property
    def _parts(self) -> tuple[Parkable, ...]:
        return (self.standing, *self.movers)


def place(profile: Profile, parts: Parts, card: Card, experts: Mapping[str, str]) -> Placed:
    """Put experts, VAE and encoders of `profile` where they work. `experts`: expert -> the component that holds it.

    Everything has its storage when this returns, and the VAE its values. The rest is read behind, in the order of
    need: encoders, then the experts in the order given; whoever uses a component waits for it. What must be rounded
    to 8 bits first needs whole tensors, and is loaded here.

    Raises:
        RequestTooLarge: no placement fits the card's budget and the host; nothing was loaded.
    """
    made = None if card.device == "cpu" else _plan(profile, card)
    if made is not None:
        prove_ahead(made.precision, card.device, card.levers)
    arrival = Arrival(card.device)
    try:
        return _placed(
            Loader(parts, made.precision if made else card.precision, card.device, arrival), made, card, experts
        )
    except BaseException:
        arrival.close()
        raise


def _plan(profile: Profile, card: Card) -> Plan:
    return plan(
        profile,
        card.budget_bytes,
        precision=card.precision,
        capability=torch.cuda.get_device_capability(card.device),
        shape=card.shape,
        host_bytes=card.host_bytes,
    )


def _placed(loader: Loader, made: Plan | None, card: Card, experts: Mapping[str, str]) -> Placed:
    """`made`: None on a CPU, where there is one memory and nothing to plan."""
    names = _in_order(loader, experts)
    stays = {name for name in names if made is None or made.where(name) == CARD}
    with loader.arrival.held():
        loaded = {name: loader.on_device(name) if name in stays else loader.in_host_memory(name) for name in names}
    running, models, notes = _experts({expert: loaded[name] for expert, name in experts.items()}, loader, made)
    accelerated = None if made is None else accelerate(models, card.device, card.levers)
    movers: list[Mover] = [running] if isinstance(running, RollingExperts) else []
    uses: dict[str, Use] = {}
    for name in _encoders(loader.parts.profile):
        umt5_passes.install(loaded[name].model)
        if name in stays:
            uses[name] = _stays(loaded[name])
        else:
            visitor = Visitor(loaded[name].model, card.device, _coming_to(loaded[name]))
            movers.append(visitor)
            uses[name] = visitor.on_card
    vae = loaded["vae"].model
    if (coming := loaded["vae"].coming) is not None:
        coming.wait_whole()  # it is read first, in a fraction of a second, and a decoder is made from its values
    is_fast = made is not None and made.precision in EIGHT_BITS
    make_decoder, passes = _bf16_decoder(vae, card) if is_fast else (lambda: vae, None)
    notes = (*notes, *(accelerated.notes if accelerated else ()))
    if made is not None and accelerated is not None:
        log.info("%s\nattention: %s%s", made.table(), accelerated.attention, "".join(f"\n- {note}" for note in notes))
    standing = _standing([each for name, each in loaded.items() if name in stays], loader.device)
    return Placed(
        made, running, uses, vae, make_decoder, loader.arrival, standing, tuple(movers), accelerated, notes,
        _image_tokens(loaded), passes,
    )  # fmt: skip


def _in_order(loader: Loader, experts: Mapping[str, str]) -> list[str]:
    """What is loaded first is read first. Experts to be rounded go before all: one in 16 bits needs the room."""
    used = ["vae", *_encoders(loader.parts.profile), *experts.values()]
    return [*experts.values(), *used[: -len(experts)]] if loader.rounds(experts.values()) else order_of_need(used)


def _experts(
    loaded: Mapping[str, Loaded], loader: Loader, made: Plan | None
) -> tuple[Experts, list[Any], tuple[str, ...]]:
    """The experts as they take turns, the models that run, and what should be said."""
    notes = dict[str, None]()
    for each in loaded.values():
        notes |= dict.fromkeys(narrow(each.model, loader.precision, loader.device))
    models = {expert: each.model for expert, each in loaded.items()}
    if made is None or made.kind == "resident":
        coming = {expert: each.coming for expert, each in loaded.items() if each.coming is not None}
        return FixedExperts(models, coming), list(models.values()), tuple(notes)
    buffers = {expert: found for expert, each in loaded.items() if (found := _coming_to(each)) is not None}
    rolling = RollingExperts(models, loader.device, STREAM_SLOTS if made.kind == "stream" else None, buffers)
    return rolling, [rolling.model], (*notes, *rolling.notes)


def _bf16_decoder(vae: Any, card: Card) -> tuple[Callable[[], FastDecoder], Chooser | None]:
    """Makes one with weights of its own, beside the fp32 ones that encode; and who chooses its passes."""
    passes = Chooser(card.device, channels(vae)) if card.levers.compile else None
    return partial(FastDecoder, vae, torch.bfloat16), passes


def _image_tokens(loaded: Mapping[str, Loaded]) -> int:
    """CLIP's: one a patch, and one for the whole picture."""
    if "image_encoder" not in loaded:
        return 0
    config = loaded["image_encoder"].model.config
    return int((config.image_size // config.patch_size) ** 2 + 1)


def _encoders(profile: Profile) -> list[str]:
    names = {component.name for component in profile.components}
    return [name for name in ENCODERS if name in names]


def _standing(loaded: list[Loaded], device: str) -> Standing:
    coming = [each.coming for each in loaded if each.coming is not None]
    return Standing([each.model for each in loaded], device, coming)


def _stays(loaded: Loaded) -> Use:
    """A component that stays: only to be waited for."""

    @contextmanager
    def use() -> Iterator[Any]:
        if loaded.coming is not None:
            loaded.coming.wait_whole()
        yield loaded.model

    return use


def _coming_to(loaded: Loaded) -> tuple[HostCopy, Coming] | None:
    return None if loaded.coming is None or loaded.host is None else (loaded.host, loaded.coming)
