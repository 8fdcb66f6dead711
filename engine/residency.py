"""What of a model stays on the card, what visits it, what waits in host memory: decided once, from bytes.

A job should move nothing. Where the card cannot hold everything, the order in which things give way is by what it
costs: encoders first (they run once a prompt, 0.5 s a visit), then the expert that is not running (its swap hides
behind the other one's last forward), then the blocks of the running one (every forward streams them, hidden too, but
the bus is busy all the time). What still does not fit is refused with the number, before any weight is read.

The planner never changes precision on its own: fewer bits change the pixels, so that is the operator's word.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.geometry import VideoShape
from engine.profile import Component, Profile
from schemas.errors import RequestTooLarge, SettingsError

GIB = 2**30
BLOCKS = 40  # of the 14B transformers (WanTransformer3DModel.config.num_layers)
OUTSIDE_BLOCKS_SHARE = 0.019  # of their bytes in bf16; counted like EIGHT_BIT_SHARE
STREAM_SLOTS = 2  # one block computes while the next arrives

# Bytes of a 14B transformer in 8 bits over its bytes in bf16. 98.1 % of them are the blocks' linear weights,
# which halve; row scales and what stays bf16 or fp32 are the rest. A test counts it on the meta device.
EIGHT_BIT_SHARE = 0.510
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
        """Peak on the card: what stays, plus the larger of the activations and the largest visitor."""
        visitors = [row.size_bytes for row in self.rows if row.where == VISITS]
        return sum(row.card_bytes for row in self.rows) + max([self.work_bytes, *visitors])

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
    host_bytes: int | None = None,
) -> Plan:
    """Choose the placement that moves least and fits `budget_bytes` of the card, and `host_bytes` if given.

    `precision`: bf16, fp8 or int8 for the transformers; None: as baked. `capability`: of the card, None: a
    CPU. `shape`: the largest video to expect; None: the profile's own size.

    Raises:
        RequestTooLarge: no placement fits; the sentence says what the smallest one needs.
        SettingsError: the weights are baked in fewer bits than `precision` asks for.
    """
    parts = [part for part in profile.components if part.size_bytes]
    stored = next((part.dtype for part in parts if is_transformer(part.name)), parts[0].dtype) or ""
    precision = precision if precision and any(is_transformer(part.name) for part in parts) else stored
    work_bytes = _work_bytes(profile, precision, shape)
    reasons = list(_kernel_notes(precision, capability))
    plans = []
    for kind, places in _choices(profile, parts):
        rows = tuple(_row(part, precision, places.get(part.name, CARD)) for part in parts)
        made = Plan(profile.name, kind, precision, rows, work_bytes, budget_bytes, tuple(reasons))
        if made.card_bytes > budget_bytes:
            reasons.append(f"{_name(kind, places)} needs {made.card_bytes / GIB:.2f} GiB of the card")
        elif host_bytes is not None and made.host_bytes > host_bytes:
            reasons.append(f"{_name(kind, places)} needs {made.host_bytes / GIB:.2f} GiB of host memory")
        else:
            return made
        plans.append(made)
    smallest = min(plans, key=lambda made: made.card_bytes)
    card, host = smallest.card_bytes / GIB, smallest.host_bytes / GIB
    raise RequestTooLarge(
        f"{profile.name} in {precision} at this size needs at least {card:.1f} GiB of card memory and "
        f"{host:.1f} GiB of host memory; the card has {budget_bytes / GIB:.1f} GiB"
    )


def is_transformer(component: str) -> bool:
    """Whether the component is one of a video model's experts: the parts that 8 bits, swapping and
    streaming are for."""
    return component.startswith(FIRST_TRANSFORMER)


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
    shares = {
        CARD: 1.0,
        VISITS: 0.0,
        SWAPS: 1.0 if part.name == FIRST_TRANSFORMER else 0.0,  # one set of buffers for all experts
        STREAMS: STREAM_SLOTS / BLOCKS + OUTSIDE_BLOCKS_SHARE if part.name == FIRST_TRANSFORMER else 0.0,
    }
    return Row(part.name, size_bytes, where, round(size_bytes * shares[where]))


def _size_bytes(part: Component, precision: str) -> int:
    if not is_transformer(part.name) or part.dtype == precision:
        return part.size_bytes
    if part.dtype in FAST_SINCE:
        raise SettingsError(f"the transformers are baked in {part.dtype}; {precision} needs another bake")
    return round(part.size_bytes * EIGHT_BIT_SHARE) if precision in FAST_SINCE else part.size_bytes


def _work_bytes(profile: Profile, precision: str, shape: VideoShape | None) -> int:
    """Activations grow with the number of tokens; the profile's figures are for its own size."""
    usual = VideoShape(profile.frames, profile.height, profile.width)
    work_bytes = profile.narrow_work_bytes if precision in FAST_SINCE else profile.work_bytes
    return work_bytes if shape is None else round(work_bytes * shape.latent().tokens / usual.latent().tokens)


def _kernel_notes(precision: str, capability: tuple[int, int] | None) -> Iterator[str]:
    since = FAST_SINCE.get(precision)
    if since is not None and (capability is None or capability < since):
        yield f"{precision} products need compute capability {since[0]}.{since[1]}: weights are widened"


def _name(kind: str, places: Mapping[str, str]) -> str:
    return f"{kind}, encoders visiting" if VISITS in places.values() else f"{kind}, encoders on the card"


def _line(name: str, size_bytes: int, where: str) -> str:
    return f"  {name:<16}{size_bytes / GIB:>8.2f} GiB  {where}".rstrip()
