"""The device as a backend may use it: how much of it, and by which means."""

from dataclasses import dataclass
from pathlib import Path

from engine.geometry import VideoShape


@dataclass(frozen=True)
class Levers:
    """What makes a transformer fast. `attention`: None takes the fastest that passes. `cache_dir`: of graphs."""

    attention: str | None = None
    compile: bool = True
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Card:
    """`device`: cuda or cpu. `precision`: bf16, fp8 or int8 for transformers; None: as baked."""

    device: str
    budget_bytes: int
    precision: str | None = None
    levers: Levers = Levers()
    shape: VideoShape | None = None
    """Of one clip: the largest that there must be room for. None: the profile's own."""
    host_bytes: int | None = None
    """Of page-locked host memory, for what does not stay on the card; None: as much as is wanted."""
