"""A request's media, fetched and decoded: the only step between a parsed request and a task."""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.clips import load_clip
from engine.fetch import FetchBudget, fetch
from engine.pictures import load_picture
from engine.settings import Settings
from schemas.request import Request, media_fields

MIB = 2**20
PREFIX_FRAMES = 9  # the newest 4n + 1 of a prefix video that the motion latent is taken from; SVI's reference uses 9


@dataclass(frozen=True)
class Media:
    """Decoded media by request field, and a hash of each for `effective`."""

    pictures: dict[str, Any]
    """RGB pictures; a list where the field is a list, or for a video its newest frames."""
    hashes: dict[str, str | list[str]]
    """sha256 of the decoded pixels, so that one picture has one hash in whatever form it came."""


def load(request: Request, settings: Settings) -> Media:
    """Fetch and decode every picture and video of a request, within one budget of time and bytes for all of them.

    Raises:
        FetchFailed: a URL could not be read.
        InvalidMedia: the bytes are not what the field takes.
    """
    max_bytes = int(settings.fetch_max_mib * MIB)
    budget = FetchBudget(timeout_s=2 * settings.fetch_timeout_s, max_bytes=2 * max_bytes)

    def read(url: str) -> bytes:
        return fetch(
            url, timeout_s=settings.fetch_timeout_s, max_bytes=max_bytes, allow=settings.fetch_allow, budget=budget
        )

    def picture(text: str) -> Any:
        return load_picture(text, fetch=read, max_bytes=max_bytes)

    def clip(text: str) -> list[Any]:
        return load_clip(text, fetch=read, max_bytes=max_bytes, last_frames=PREFIX_FRAMES)

    loaded = {name: _each(value, picture) for name, value in media_fields(request, "picture").items()}
    loaded |= {name: _each(value, clip) for name, value in media_fields(request, "video").items()}
    hashes = {name: _each(value, _hash) for name, value in loaded.items()}
    hashes |= {name: _digest(str(value).encode()) for name, value in media_fields(request, "latent").items()}
    return Media(loaded, hashes)


def draw_seed(request: Request) -> int:
    """The request's seed, or 32 fresh bits where it leaves the choice to us (null or -1)."""
    return request.seed if request.seed is not None and request.seed >= 0 else secrets.randbits(32)


def _each(value: Any, one: Callable[[Any], Any]) -> Any:
    return [one(item) for item in value] if isinstance(value, list) else one(value)


def _hash(image: Any) -> str:
    return _digest(f"{image.width}x{image.height}".encode() + image.tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
