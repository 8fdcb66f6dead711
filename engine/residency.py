"""What of a model stays on the card, what visits it, what waits in host memory: decided once, from bytes.

A job should move nothing. Where the card cannot hold everything, the order in which things give way is by what it
costs: encoders first (they run once a prompt, 0.5 s a visit), then the expert that is not running (its swap hides
behind the other one's last forward), then the blocks of the running one (every forward streams them, hidden too, but
the bus is busy all the time). What still does not fit is refused with the number, before any weight is read.

The planner never changes precision on its own: fewer bits change the pixels, so that is the operator's word.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engine.activations import usual_shape, work_bytes
from engine.geometry import VideoShape
from engine.profile import EIGHT_BITS, Component, Profile
from schemas.errors import RequestTooLarge, SettingsError

GIB = 2**30
BLOCKS = 40  # of the 14B transformers (WanTransformer3DModel.config.num_layers)
OUTSIDE_BLOCKS_SHARE = 0.019  # of their bytes in bf16; a test counts it on the meta device
OUTSIDE_BLOCKS_SHARE_NARROW = 0.036  # the same bytes beside blocks in 8 bits: what stands outside stays wide
STREAM_SLOTS = 2  # one block computes while the next arrives

FAST_SINCE: Mapping[str, tuple[int, int]] = {
    "fp8": (8, 9),
    "int8": (8, 0),
}  # compute capability of the fast kernel

FIRST_TRANSFORMER = "transformer"  # its name in every profile; a second one is transformer_2
CARD: str = "card"
VISITS: str = "visits"
SWAPS: str = "swaps"
STREAMS: str = "streams"


@dataclass(frozen=True)
class Row:
    """One component: its bytes at the plan's precision, where it is, and what that claims of the card."""

    component: str
    size_bytes: int
    where: str
    card_bytes: int


@dataclass(frozen=True)
class Plan:
    """Where a profile's bytes are. `kind`: resident (no transformer moves), swap, or stream."""

    profile: str
    kind: str
    precision: str
    rows: tuple[Row, ...]
    work_bytes: int
    budget_bytes: int
    reasons: tuple[str, ...] = ()
    """Why not something faster; one sentence each."""

    @property
    def card_bytes(self) -> int:
        """Peak on the card at the plan's own work."""
        return self.peak_bytes(self.work_bytes)

    @property
    def stays_bytes(self) -> int:
        """On the card also between jobs."""
        return sum(row.card_bytes for row in self.rows)

    def peak_bytes(self, work_bytes: int) -> int:
        """On the card in a job: what stays, plus the larger of the activations and the largest visitor."""
        visitors = [row.size_bytes for row in self.rows if row.where == VISITS]
        return self.stays_bytes + max([work_bytes, *visitors])

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory: everything that does not stay on the card."""
        return sum(row.size_bytes for row in self.rows if row.where != CARD)

    def where(self, component: str) -> str:
        """card, visits, swaps or streams."""
        return next(row.where for row in self.rows if row.component == component)

    def table(self) -> str:
        """The plan for people, as `--plan` prints it."""
        lines = [f"{self.profile}: {self.kind}, {self.precision}"]
        lines += [_line(row.component, row.size_bytes, row.where) for row in self.rows]
        lines.append(_line("activations", self.work_bytes, "at the largest size"))
        lines.append(_line("card, peak", self.card_bytes, f"of {self.budget_bytes / GIB:.2f} GiB"))
        lines.append(_line("host, locked", self.host_bytes, ""))
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


def plan(
    profile: Profile,
    budget_bytes: int,
    *,
    precision: str | None = None,
    capability: tuple[int, int] | None = None,
    shape: VideoShape | None = None,
    images: int = 1,
    host_bytes: int | None = None,
) -> Plan:
    """Choose the placement that moves least and fits `budget_bytes` of the card, and `host_bytes` if given.

    `precision`: bf16, fp8 or int8 for the transformers; None: as baked. `capability`: of the card, None: a
    CPU. `shape` of one clip, or of `images` pictures at once: the largest to expect; None: the profile's own.

    Raises:
        RequestTooLarge: no placement fits; the sentence says what the smallest one needs.
        SettingsError: the weights are baked in fewer bits than `precision` asks for.
    """
    precision = runs_in(profile, precision)
    needed = work_bytes(profile, shape or usual_shape(profile), images, is_narrow=precision in EIGHT_BITS)
    reasons = list(_kernel_notes(precision, capability))
    plans = []
    for made, places in _plans(profile, precision, needed, budget_bytes):
        if made.card_bytes > budget_bytes:
            reasons.append(f"{_name(made.kind, places)} needs {made.card_bytes / GIB:.2f} GiB of the card")
        elif host_bytes is not None and made.host_bytes > host_bytes:
            reasons.append(f"{_name(made.kind, places)} needs {made.host_bytes / GIB:.2f} GiB of host memory")
        else:
            return replace(made, reasons=tuple(reasons))
        plans.append(made)
    smallest = min(plans, key=lambda made: made.card_bytes)
    card, host = smallest.card_bytes / GIB, smallest.host_bytes / GIB
    raise RequestTooLarge(
        f"{profile.name} in {precision} at this size needs at least {card:.1f} GiB of card memory and "
        f"{host:.1f} GiB of host memory; the card has {budget_bytes / GIB:.1f} GiB"
        + ("" if host_bytes is None else f" and the host {host_bytes / GIB:.1f} GiB")
    )


def room_bytes(profile: Profile, budget_bytes: int, precision: str | None = None, host_bytes: int | None = None) -> int:
    """The most that a request's activations may take, whatever placement that needs; 0: none fits card and host."""
    plans = [made for made, _ in _plans(profile, runs_in(profile, precision), 0, budget_bytes)]
    fitting = [made for made in plans if host_bytes is None or made.host_bytes <= host_bytes]
    return max([0, *(budget_bytes - made.stays_bytes for made in fitting if made.card_bytes <= budget_bytes)])


def least_card_bytes(profile: Profile, precision: str | None, work_bytes: int) -> int:
    """Peak of the placement that claims least of a card."""
    plans = _plans(profile, runs_in(profile, precision), work_bytes, 0)
    return min(made.card_bytes for made, _ in plans)


def least_host_bytes(profile: Profile, precision: str | None, work_bytes: int, budget_bytes: int) -> int | None:
    """Of the placements that fit the card, what the one claims that needs least beside it; None: none fits."""
    plans = _plans(profile, runs_in(profile, precision), work_bytes, budget_bytes)
    return min((made.host_bytes for made, _ in plans if made.card_bytes <= budget_bytes), default=None)


def runs_in(profile: Profile, wanted: str | None) -> str:
    """The precision that the profile's transformers run in: as wanted, else as baked; a UNet's as baked."""
    parts = _tensors(profile)
    baked = next((part.dtype for part in parts if is_transformer(part.name)), None)
    return (wanted or baked) if baked else str(parts[0].dtype)


def is_transformer(component: str) -> bool:
    """Whether the component is one of a video model's experts: the parts that 8 bits, swapping and
    streaming are for."""
    return component.startswith(FIRST_TRANSFORMER)


def _tensors(profile: Profile) -> list[Component]:
    return [part for part in profile.components if part.size_bytes]


def _plans(
    profile: Profile, precision: str, work_bytes: int, budget_bytes: int
) -> Iterator[tuple[Plan, Mapping[str, str]]]:
    """Every placement, fitting or not, from the one that moves least."""
    parts = _tensors(profile)
    for kind, places in _choices(profile, parts):
        rows = tuple(_row(part, precision, places.get(part.name, CARD)) for part in parts)
        yield Plan(profile.name, kind, precision, rows, work_bytes, budget_bytes), places


def _choices(profile: Profile, parts: list[Component]) -> Iterator[tuple[str, dict[str, str]]]:
    """Placements from the one that moves least: (kind, component -> where, if not on the card)."""
    visits: dict[str, str] = {row.component: VISITS for row in profile.placement if row.where == VISITS}
    transformers = [part.name for part in parts if is_transformer(part.name)]
    yield "resident", {}
    if visits:
        yield "resident", visits
    if len(transformers) > 1:
        swaps: dict[str, str] = dict.fromkeys(transformers, SWAPS)
        yield "swap", swaps
        yield "swap", {**swaps, **visits}
    if transformers:
        yield "stream", {**dict.fromkeys(transformers, STREAMS), **visits}


def _row(part: Component, precision: str, where: str) -> Row:
    size_bytes = _size_bytes(part, precision)
    outside = OUTSIDE_BLOCKS_SHARE_NARROW if precision in EIGHT_BITS else OUTSIDE_BLOCKS_SHARE
    shares = {
        CARD: 1.0,
        VISITS: 0.0,
        SWAPS: 1.0 if part.name == FIRST_TRANSFORMER else 0.0,  # one set of buffers for all experts
        STREAMS: STREAM_SLOTS / BLOCKS + outside if part.name == FIRST_TRANSFORMER else 0.0,
    }
    return Row(part.name, size_bytes, where, round(size_bytes * shares[where]))


def _size_bytes(part: Component, precision: str) -> int:
    """At the plan's precision: a text encoder's weights are rounded beside 8-bit transformers, also at load."""
    if part.dtype in EIGHT_BITS and part.dtype != precision:
        raise SettingsError(f"{part.name} is baked in {part.dtype}; {precision} needs another bake")
    return part.narrow_size_bytes if part.narrow_size_bytes and precision in EIGHT_BITS else part.size_bytes


def _kernel_notes(precision: str, capability: tuple[int, int] | None) -> Iterator[str]:
    since = FAST_SINCE.get(precision)
    if since is not None and (capability is None or capability < since):
        yield f"{precision} products need compute capability {since[0]}.{since[1]}: weights are widened"


def _name(kind: str, places: Mapping[str, str]) -> str:
    return f"{kind}, encoders visiting" if VISITS in places.values() else f"{kind}, encoders on the card"


def _line(name: str, size_bytes: int, where: str) -> str:
    return f"  {name:<16}{size_bytes / GIB:>8.2f} GiB  {where}".rstrip()
