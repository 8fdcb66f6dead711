"""A request's media, fetched and decoded: the only step between a parsed request and a task."""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.chain_state import base_seed
from engine.clips import decode_clip
from engine.fetch import FetchBudget, fetch
from engine.media import read_media
from engine.pictures import decode_picture
from engine.settings import Settings
from schemas.errors import FetchFailed, InvalidMedia
from schemas.request import Request, media_fields
from schemas.svi_schema import SviEndframeRequest

MIB = 2**20
CHILDREN = 2  # that decode at a time: a start and an end picture; each may take a gigabyte


@dataclass(frozen=True)
class Media:
    """Decoded media by request field, and a hash of each for `effective`."""

    pictures: dict[str, Any]
    """RGB pictures; a list where the field is a list, or for a video its newest frames."""
    hashes: dict[str, str | list[str]]
    """sha256 of each file as it came, after base64; of a state's text."""


def load(request: Request, settings: Settings, check: Callable[[], None]) -> Media:
    """Fetch and decode every picture and video of a request, within one budget of time and bytes for all of them.

    `check` is called before each file is read and each field's decoding waited for, and raises when the job must stop.

    Raises:
        FetchFailed: a URL could not be read.
        InvalidMedia: the bytes are not what the field takes.
    """
    max_bytes = int(settings.fetch_max_mib * MIB)
    budget = FetchBudget(timeout_s=2 * settings.fetch_timeout_s, max_bytes=2 * max_bytes)

    def read_url(url: str) -> bytes:
        return fetch(
            url,
            timeout_s=settings.fetch_timeout_s,
            max_bytes=max_bytes,
            allow=settings.fetch_allow,
            budget=budget,
        )

    def read(field: str, kind: str, text: str) -> bytes:
        check()
        with _blaming(field):
            return read_media(text, kind, fetch=read_url, max_bytes=max_bytes)

    def files(field_kind: str, kind: str) -> dict[str, Any]:
        return {
            field: _each(texts, partial(read, field, kind))
            for field, texts in media_fields(request, field_kind).items()
        }

    pictures, videos = files("picture", "image"), files("video", "video")
    decoded = dict(_decoded(pictures, check))
    for field, data in videos.items():
        check()
        with _blaming(field):
            decoded[field] = decode_clip(data, _motion_frames(request)).frames
    hashes = {name: _each(data, _digest) for name, data in (pictures | videos).items()}
    hashes |= {name: _digest(str(text).encode()) for name, text in media_fields(request, "latent").items()}
    return Media(decoded, hashes)


def fingerprint(payload: object) -> str:
    """A hash of the request as it came: the same job id with another input is another job."""
    return _digest(json.dumps(_hashed(payload), sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))


def _hashed(value: Any) -> Any:
    """With a hash for every string: of two pictures JSON would take 8 ms to escape what needs none."""
    if isinstance(value, dict):
        return {key: _hashed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hashed(item) for item in value]
    return _digest(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else value


def draw_seed(request: Request) -> int:
    """The request's seed; where it leaves the choice to us (null or -1), that of its `state`, or 32 fresh bits."""
    if request.seed is not None and request.seed >= 0:
        return request.seed
    if isinstance(request, SviEndframeRequest) and request.state is not None:
        return base_seed(request.state)
    return secrets.randbits(32)


def _motion_frames(request: Request) -> int:
    """The newest frames of a prefix video that its motion latents are encoded from, as engine.chain takes them."""
    if not isinstance(request, SviEndframeRequest):
        raise TypeError(f"{request.mode} takes no video")
    return request.overlap + 5


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Put the field's name in front of what is said about its file."""
    try:
        yield
    except (FetchFailed, InvalidMedia) as error:
        raise type(error)(f"{field}: {error.sentence}") from error


def _decoded(pictures: dict[str, Any], check: Callable[[], None]) -> Iterator[tuple[str, Any]]:
    """Fields with their pictures, two decoded at a time."""
    check()
    with ExitStack() as stack:
        threads = ThreadPoolExecutor(CHILDREN, thread_name_prefix="pictures")
        stack.callback(threads.shutdown, cancel_futures=True)
        coming = {  # each in a context of its own, from which the log takes the job's name
            field: threads.submit(copy_context().run, _each, data, decode_picture) for field, data in pictures.items()
        }
        for field, one in coming.items():
            check()
            with _blaming(field):
                yield field, one.result()


def _each(value: Any, one: Callable[[Any], Any]) -> Any:
    return [one(item) for item in value] if isinstance(value, list) else one(value)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
