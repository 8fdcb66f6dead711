"""Decoding a stranger's bytes in a throwaway child: its memory, its clocks, its files, never ours.

Each file has a child of its own, started by `subprocess` (safe beside threads and CUDA), with an empty environment and
no descriptor but its own three once it reads the file. What it answers is checked before it is believed.
"""

import json
import logging
import math
import signal
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from engine.decode_child import IMPORTS_FAILED
from engine.spares import SPARES
from schemas.errors import InternalError

REASONS = frozenset({"too_large", "too_small", "too_long", "too_short", "codec", "memory", "slow", "damaged"})
MAX_HEAD_BYTES = 256

_NOT_STARTED = "the decoder did not start; the operator's log holds the reason"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one decode may use. The parent ends it at `wall_s`, the kernel at any of the others."""

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_bytes: int = 2**30
    result_bytes: int = 2**26


@dataclass(frozen=True)
class Raster:
    """Decoded frames: `pixels` is uint8 (frames, height, width, 3) RGB; `fps` None if the file has none."""

    frames: int
    height: int
    width: int
    fps: float | None
    pixels: bytes


class Refused(Exception):
    """The child did not take the file, or died of it. `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes, form: str, rules: dict[str, Any], limits: Limits) -> Raster:
    """Decode a file whose format the caller knows by its magic bytes.

    `form`: PNG, JPEG, WEBP, mov or matroska. `rules`: what `engine.decode_child` asks of that format. The answer has
    `rules["last_frames"]` frames, a picture one.

    Raises:
        Refused: the file is not accepted, or the child died of it.
        InternalError: the child could not start.
    """
    order = {"form": form, "rules": rules, "limits": {**asdict(limits), "wall_s": limits.wall_s + 1}}
    try:
        with closing(SPARES.take()) as child:
            _check_end(*child.run(data, order, limits.wall_s))
            raster = _read_result(child.result, limits.result_bytes)
    except TimeoutError:
        raise Refused("slow") from None
    except OSError as error:  # no process, no descriptor or no memory left to this one
        _log.error("the decoder did not start: %s", error)
        raise InternalError(_NOT_STARTED) from error
    finally:
        SPARES.refill()
    if raster.frames != rules.get("last_frames", 1):
        raise Refused("damaged")
    return raster


def _check_end(status: int, said: str) -> None:
    """Whether the child has done its work; `status` as `Child.run` gives it."""
    if status == IMPORTS_FAILED:
        _log.error("the decoder did not start: %s", said)
        raise InternalError(_NOT_STARTED)
    if status > 0:
        _log.warning("the decoder failed with status %d: %s", status, said)
    if status != 0:
        raise Refused("slow" if status in (-signal.SIGXCPU, -signal.SIGALRM) else "damaged")


def _read_result(result: BinaryIO, limit_bytes: int) -> Raster:
    """Check the child's answer against itself; a child taken over by its input may say anything."""
    result.seek(0)
    head = result.readline(MAX_HEAD_BYTES)
    pixels = result.read(limit_bytes)
    try:
        answer = json.loads(head)
        if "refused" in answer:
            raise Refused(answer["refused"] if answer["refused"] in REASONS else "damaged")
        raster = Raster(**answer, pixels=pixels)
    except (ValueError, TypeError, RecursionError):
        raise Refused("damaged") from None
    if not _is_sound(raster):
        raise Refused("damaged")
    return raster


def _is_sound(raster: Raster) -> bool:
    sides = (raster.frames, raster.height, raster.width)
    if any(type(side) is not int or side < 1 for side in sides) or math.prod(sides) * 3 != len(raster.pixels):
        return False
    return raster.fps is None or (type(raster.fps) is float and 0 < raster.fps < math.inf)
