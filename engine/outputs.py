"""What a backend hands back, and what a finished file is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.geometry import VideoShape


@dataclass(frozen=True)
class Images:
    """Finished pictures: each uint8 (height, width, 3) RGB."""

    pictures: list[Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frames:
    """A video still being decoded: `chunks` yields uint8 (f, height, width, 3) RGB and does the decoding as it goes."""

    chunks: Iterator[Any]
    shape: VideoShape
    fps: int
    notes: tuple[str, ...] = ()
    """What the caller should know about how it was made; they join the response's warnings."""
    state: Callable[[], str | None] = lambda: None
    """What a later job goes on from, known once `chunks` is exhausted; None where nothing was asked for."""


@dataclass(frozen=True)
class MediaFile:
    """A written and verified file. Every number was read back from the file, none copied from the request."""

    path: Path
    content_type: str
    height: int
    width: int
    frames: int
    size_bytes: int
    sha256: str
    fps: float | None = None
    duration_s: float | None = None
