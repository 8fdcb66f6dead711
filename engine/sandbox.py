"""Decoding a stranger's bytes in a throwaway child: its memory, its clocks, its files, never ours.

The child is started anew for each file by `subprocess` (safe beside threads and CUDA), with an empty
environment and no descriptor but its own three. Bytes go in and pixels come out through anonymous memory:
nothing touches a disk, no pipe can block, and the kernel bounds the result. What it answers is checked before
it is believed.
"""

import importlib.util
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.decode_child import IMPORTS_FAILED
from schemas.errors import InternalError

CHILD = Path(__file__).with_name("decode_child.py")
REASONS = frozenset({"too_large", "too_small", "too_long", "too_short", "codec", "memory", "slow", "damaged"})
MAX_HEAD_BYTES = 256
MAX_STDERR_BYTES = 4096

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
    try:
        order = {
            "form": form,
            "rules": rules,
            "limits": {**asdict(limits), "wall_s": limits.wall_s + 1},
            "paths": _package_folders(),
        }
        with _memory("source") as source, _memory("result") as result:
            source.write(data)
            source.seek(0)
            status = _run(json.dumps(order), source, result, limits.wall_s)
            if status != 0:
                raise Refused("slow" if status in (-signal.SIGXCPU, -signal.SIGALRM) else "damaged")
            raster = _read_result(result, limits.result_bytes)
    except OSError as error:  # no process, no descriptor or no memory left to this one
        _log.error("the decoder did not start: %s", error)
        raise InternalError(_NOT_STARTED) from error
    if raster.frames != rules.get("last_frames", 1):
        raise Refused("damaged")
    return raster


def _memory(name: str) -> BinaryIO:
    """A file that is nowhere but in memory."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _package_folders() -> list[str]:
    """Where Pillow and PyAV lie: the child runs without site-packages of its own."""
    specs = [importlib.util.find_spec(package) for package in ("PIL", "av")]
    return sorted({str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin})


def _run(order: str, source: BinaryIO, result: BinaryIO, wall_s: float) -> int:
    """Run the child to its end, at most `wall_s`; its exit status, negative for a signal."""
    ends = time.monotonic() + wall_s
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD), order],
        stdin=source,
        stdout=result,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        said = _read_until_exit(process, ends)
        status = process.wait(max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Refused("slow") from None
    finally:
        process.kill()  # no effect on one that has ended
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if status == IMPORTS_FAILED:
        _log.error("the decoder did not start: %s", said)
        raise InternalError(_NOT_STARTED)
    if status > 0:
        _log.warning("the decoder failed with status %d: %s", status, said)
    return status


def _read_until_exit(process: "subprocess.Popen[bytes]", ends: float) -> str:
    """What the child says on stderr until it closes it, which its end does. Only the last bytes are kept."""
    if process.stderr is None:
        raise InternalError("the decoder was started without stderr")
    poll = select.poll()
    poll.register(process.stderr, select.POLLIN)
    said = b""
    while (left_s := ends - time.monotonic()) > 0:
        if poll.poll(left_s * 1000):
            chunk = os.read(process.stderr.fileno(), MAX_STDERR_BYTES)
            if not chunk:
                break
            said = (said + chunk)[-MAX_STDERR_BYTES:]
    return said.decode(errors="replace")


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
