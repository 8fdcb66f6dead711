"""A job's place on the disk: a private folder, and whether there is room, before the card works for it."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.demand import Demand
from schemas.errors import DiskFull

VIDEO_BYTES_PER_PIXEL = 0.16  # 5 MB for 81 frames of 832x480 with grain, as engine.video encodes them
PICTURE_BYTES_PER_PIXEL = 1.6  # a PNG of a photograph
MARGIN = 3  # the file, its copy on the way out, and grain that packs worse
RESERVE_BYTES = 2**30  # for all else that writes there: logs, caches, another worker of the same machine

MIB = 2**20


@contextmanager
def work_folder() -> Iterator[Path]:
    """A private folder for a job's files, gone with the job however that ends.

    Raises:
        DiskFull: it could not be made, or what was to lie in it could not be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="job-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the worker's disk is full") from error
        raise


def check_room(folder: Path, wanted: Demand) -> None:
    """Refuse a job whose files the disk under `folder` would not hold.

    Raises:
        DiskFull: with both numbers.
    """
    needed_bytes, free_bytes = file_bytes(wanted) * MARGIN + RESERVE_BYTES, shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskFull(
            f"the worker's disk has {free_bytes // MIB} MiB left, and this job needs {-(-needed_bytes // MIB)} MiB"
        )


def file_bytes(wanted: Demand) -> int:
    """About what the finished files will have."""
    is_video = wanted.shape.frames > 1
    pixels = wanted.images * wanted.frames * wanted.shape.height * wanted.shape.width
    return int(pixels * (VIDEO_BYTES_PER_PIXEL if is_video else PICTURE_BYTES_PER_PIXEL))
