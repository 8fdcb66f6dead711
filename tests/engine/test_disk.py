"""Room on the disk, on a real one."""

import shutil
from pathlib import Path

import pytest

from engine import disk
from engine.demand import Demand
from engine.geometry import VideoShape
from schemas.errors import DiskFull

DEFAULT_VIDEO = Demand(VideoShape(81, 480, 832), 6, frames=81)


def test_files_of_the_default_video_and_of_four_pictures() -> None:
    assert disk.file_bytes(DEFAULT_VIDEO) == 5_175_705
    assert disk.file_bytes(Demand(VideoShape(1, 1024, 1024), 80, images=4)) == 6_710_886


def test_disk_with_room_is_let_pass(tmp_path: Path) -> None:
    disk.check_room(tmp_path, DEFAULT_VIDEO)


def test_job_larger_than_what_is_free_is_refused_with_both_numbers(tmp_path: Path) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    frames = int(free_bytes / (disk.MARGIN * disk.VIDEO_BYTES_PER_PIXEL * 480 * 832)) + 1
    with pytest.raises(DiskFull, match=r"^the worker's disk has \d+ MiB left, and this job needs \d+ MiB$") as caught:
        disk.check_room(tmp_path, Demand(VideoShape(81, 480, 832), 6, frames=frames))
    assert caught.value.retryable
