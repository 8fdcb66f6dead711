"""x264 as it is set: frame threads, as many on every machine, and the same bytes of the same frames."""

import os
import re
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import engine.mp4 as mp4_module
from engine.geometry import VideoShape
from engine.h264 import decode_packets
from engine.mp4 import Mp4, converted
from engine.outputs import Frames
from engine.video import write_mp4


def noise(frames: int, height: int, width: int) -> np.ndarray:
    """(f, h, w, 3) uint8."""
    return np.random.default_rng(0).normal(128, 60, (frames, height, width, 3)).clip(0, 255).astype(np.uint8)


def written(path: Path, video: np.ndarray) -> bytes:
    write_mp4(Frames(iter([video]), VideoShape(*video.shape[:3]), 16), path)
    return path.read_bytes()


def test_x264_works_at_twelve_whole_frames_at_a_time(tmp_path):
    """As x264 itself says in the stream; of frames less than 256 high it takes fewer at a time."""
    content = written(tmp_path / "video.mp4", noise(3, 256, 64))
    assert re.findall(rb" (threads=\d+|sliced_threads=\d) ", content) == [b"threads=12", b"sliced_threads=0"]


@contextmanager
def one_core():
    """For this thread and those it starts; x264 counts these."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's cores can be chosen on Linux")
def test_write_mp4_makes_the_same_bytes_on_one_core(tmp_path):
    video = noise(17, 256, 128)
    on_all = written(tmp_path / "all.mp4", video)
    with one_core():
        assert written(tmp_path / "one.mp4", video) == on_all


def test_write_mp4_makes_the_same_bytes_of_the_same_frames(tmp_path):
    """Where the processor has AVX-512, x264's code for it made others 5 to 42 times in 300."""
    frames = noise(9, 64, 96)
    assert len({written(tmp_path / f"{i}.mp4", frames) for i in range(100)}) == 1


@pytest.mark.parametrize(
    ("flags", "options"), [("flags : sse2 avx2 avx512f bmi2", {"x264-params": "asm=avx2"}), ("flags : sse2 avx2", {})]
)
def test_x264_leaves_out_avx512_and_nothing_else(flags, options, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(mp4_module, "CPUINFO", tmp_path / "cpuinfo")
    assert mp4_module._repeatable.__wrapped__() == options
    (tmp_path / "cpuinfo").unlink()
    assert mp4_module._repeatable.__wrapped__() == {}


def given(video: np.ndarray) -> list[Future]:
    coming: list[Future] = [Future() for _ in video]
    for one, picture in zip(coming, video, strict=True):
        one.set_result(converted(picture))
    return coming


def test_mp4_gives_each_packet_while_later_frames_are_still_missing():
    """All but the 26 or so that x264 looks ahead and has in work."""
    mp4 = Mp4(VideoShape(40, 256, 64), 16)
    mp4.add(given(noise(40, 256, 64)))
    assert mp4._packets.qsize() >= 10
    mp4.finish()
    assert len(decode_packets(mp4.packets()).frames) == 40


def test_mp4_ends_its_packets_when_it_is_abandoned():
    mp4 = Mp4(VideoShape(40, 64, 64), 16)
    mp4.add(given(noise(30, 64, 64)))
    mp4.abandon()
    assert 0 < len(list(mp4.packets())) < 30
