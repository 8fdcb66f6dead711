"""Room on the disk, to the byte."""

from collections import namedtuple
from pathlib import Path

import pytest

from engine import disk
from engine.demand import Demand
from engine.geometry import VideoShape
from schemas.errors import DiskFull

DEFAULT_VIDEO = Demand(VideoShape(81, 480, 832), 6, frames=81)
NEEDED_BYTES = 1_089_268_939  # three times the file, and 1 GiB

Usage = namedtuple("Usage", "total used free")


def test_files_of_the_default_video_and_of_four_pictures() -> None:
    assert disk.file_bytes(DEFAULT_VIDEO) == 5_175_705
    assert disk.file_bytes(Demand(VideoShape(1, 1024, 1024), 80, images=4)) == 6_710_886


def test_disk_with_room_for_three_such_files_and_a_gibibyte_is_let_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.disk.shutil.disk_usage", {tmp_path: Usage(2**40, 0, NEEDED_BYTES)}.__getitem__)
    disk.check_room(tmp_path, DEFAULT_VIDEO)


def test_disk_with_a_byte_less_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.disk.shutil.disk_usage", {tmp_path: Usage(2**40, 0, NEEDED_BYTES - 1)}.__getitem__)
    with pytest.raises(DiskFull) as caught:
        disk.check_room(tmp_path, DEFAULT_VIDEO)
    assert caught.value.sentence == "the worker's disk has 1038 MiB left, and this job needs 1039 MiB"
    assert caught.value.retryable


def test_job_larger_than_this_machines_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"^the worker's disk has \d+ MiB left, and this job needs \d+ MiB$"):
        disk.check_room(tmp_path, Demand(VideoShape(81, 480, 832), 6, frames=10**12))
