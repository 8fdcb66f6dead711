"""What of a model stays on the card, what visits it, what waits in host memory: decided once, from bytes.

A job should move nothing. Where the card cannot hold everything, the order in which things give way is by what it
costs: encoders first (they run once a prompt, 0.5 s a visit), then the expert that is not running (its swap hides
behind the other one's last forward), then the blocks of the running one (every forward streams them, hidden too, but
the bus is busy all the time). What still does not fit is refused with the number, before any weight is read.

The planner never changes precision on its own: fewer bits change the pixels, so that is the operator's word.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.geometry import VideoShape
from engine.profile import Component, Profile
from schemas.errors import RequestTooLarge

GIB = 2**30
BLOCKS = 40  # of the 14B transformers (WanTransformer3DModel.config.num_layers)
STREAM_SLOTS = 2  # one block computes while the next arrives

# Bytes of a 14B transformer in 8 bits over its bytes in bf16. 98.1 % of them are the blocks' linear weights, which
# halve; row scales and what stays bf16 or fp32 are the rest. Counted on the meta device; a test counts it again.
EIGHT_BIT_SHARE = 0.510
FAST_SINCE: Mapping[str, tuple[int, int]] = {"fp8": (8, 9), "int8": (8, 0)}  # compute capability of the fast kernel

CARD, VISITS, SWAPS, STREAMS = "card", "visits", "swaps", "streams"


@dataclass(frozen=True)
class Row:
    """One component: its bytes at the plan's precision, and where they are between and during jobs."""

    component: str
    size_bytes: int
    where: str


@dataclass(frozen=True)
class Plan:
    """Where a profile's bytes are. `kind`: resident (no transformer moves), swap, or stream."""

    profile: str
    kind: str
    precision: str
    rows: tuple[Row, ...]
    work_bytes: int
    budget_bytes: int
    reasons: tuple[str, ...]

    @property
    def card_bytes(self) -> int:
        """Peak on the card: what stays, plus the larger of the activations and the largest visitor."""
        return _card_bytes(self.rows, self.work_bytes)

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory: visitors, and every expert of a set that takes turns."""
        return _host_bytes(self.rows)

    def where(self, component: str) -> str:
        """card, visits, swaps or streams."""
        return next(row.where for row in self.rows if row.component == component)

    def table(self) -> str:
        """The plan for people, as `--plan` prints it."""
        lines = [f"{self.profile}: {self.kind}, {self.precision}"]
        lines += [f"  {row.component:<16}{row.size_bytes / GIB:>8.2f} GiB  {row.where}" for row in self.rows]
        lines.append(f"  {'activations':<16}{self.work_bytes / GIB:>8.2f} GiB")
        lines.append(f"  {'card, peak':<16}{self.card_bytes / GIB:>8.2f} GiB  of {self.budget_bytes / GIB:.2f} GiB")
        lines.append(f"  {'host, locked':<16}{self.host_bytes / GIB:>8.2f} GiB")
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
    """Choose the placement that moves least and fits `budget_bytes` of the card (and `host_bytes`, if given).

    `precision`: bf16, fp8 or int8 for the transformers; None: as baked. `capability`: of the card, None for a CPU.
    `shape`: the largest video to expect; None: the profile's own size.

    Raises:
        RequestTooLarge: no placement fits; the sentence says what the smallest one needs.
    """
    work_bytes = _work_bytes(profile, shape)
    parts = [part for part in profile.components if part.size_bytes]
    transformers = [part.name for part in parts if part.name.startswith("transformer")]
    precision = precision or _stored(parts, transformers)
    sizes = {part.name: _size(part, precision) for part in parts}
    reasons = _kernel_notes(precision, capability)
    tried: list[int] = []
    for kind, places in _choices(profile, transformers):
        rows = tuple(
            Row(name, _resident_bytes(size, places.get(name, CARD)), places.get(name, CARD)) for name, size in sizes.items()
        )
        needs_card, needs_host = _card_bytes(rows, work_bytes), _host_bytes(rows)
        tried.append(needs_card)
        if needs_card > budget_bytes:
            reasons.append(f"{_describe(kind, places)} needs {needs_card / GIB:.2f} GiB of the card")
        elif host_bytes is not None and needs_host > host_bytes:
            reasons.append(f"{_describe(kind, places)} needs {needs_host / GIB:.2f} GiB of host memory")
        else:
            return Plan(profile.name, kind, precision, rows, work_bytes, budget_bytes, tuple(reasons))
    raise RequestTooLarge(
        f"{profile.name} needs at least {min(tried) / GIB:.1f} GiB of card memory at this size and precision; "
        f"{budget_bytes / GIB:.1f} GiB are there"
    )
