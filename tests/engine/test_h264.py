"""Packets in the form of an MP4, against FFmpeg's own muxer, and a decoder that paints over nothing."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engine.h264 import Packet, avcc, decode_packets, length_prefixed
from tests.conftest import ROOT


def encoded(frames: int, height: int = 64, width: int = 96, **options: str) -> tuple[bytes, list[av.Packet]]:
    """The parameter sets and the packets of a noisy film, behind start codes, timed in 1/16 s."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base = Fraction(1, 16)
    context.options = {"preset": "veryfast", **options}
    context.color_range = context.color_primaries = context.color_trc = context.colorspace = 1
    context.flags |= av.codec.context.Flags.global_header
    made = []
    for i in range(frames):
        picture = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = i, context.time_base
        made += context.encode(frame)
    return context.extradata, made + context.encode(None)


def packets(parameters: bytes, made: list[av.Packet]) -> list[Packet]:
    return [Packet.of(packet, length_prefixed(bytes(packet)), avcc(parameters)) for packet in made]


@pytest.mark.parametrize("profile", ["baseline", "main", "high"])
def test_packets_and_parameters_are_those_of_the_muxer(tmp_path: Path, profile: str):
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"profile": profile, "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        given = []
        for i in range(9):
            picture = np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                given.append(length_prefixed(bytes(packet)))
                container.mux(packet)
        for packet in stream.encode(None):
            given.append(length_prefixed(bytes(packet)))
            container.mux(packet)
        parameters = avcc(stream.codec_context.extradata)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert [bytes(packet) for packet in container.demux(video=0) if packet.size] == given
        assert container.streams.video[0].codec_context.extradata == parameters


def test_length_prefixed_takes_short_and_long_start_codes():
    units = length_prefixed(b"\0\0\0\1\x67abc\0\0\1\x65\0\0\3\0de\0\0\0\1f")
    assert units == b"\0\0\0\4\x67abc" + b"\0\0\0\7\x65\0\0\3\0de" + b"\0\0\0\1f"


@pytest.mark.parametrize("parameters", [b"", b"\0\0\1\x67\x64\0\x1e", b"\0\0\1a\0\0\1b\0\0\1c"])
def test_avcc_wants_one_set_of_each_kind(parameters: bytes):
    with pytest.raises(ValueError, match="unpack"):
        avcc(parameters)


def test_decode_packets_says_what_each_frame_is():
    decoded = decode_packets(iter(packets(*encoded(9))))
    assert [frame.time_s for frame in decoded.frames] == [Fraction(i, 16) for i in range(9)]
    assert {frame[1:5] for frame in decoded.frames} == {("yuv420p", (1, 1, 1, 1), 64, 96)}
    assert all(120 < frame.luma < 132 for frame in decoded.frames)  # noise: the middle of 16 to 235
    assert len(set(decoded.sha256s)) == 9


def test_decode_packets_of_nothing_is_nothing():
    assert decode_packets(iter(())).frames == ()


@pytest.mark.parametrize("at", range(9))
def test_decode_packets_gives_no_frame_of_a_torn_packet(at: int):
    given = packets(*encoded(9))
    half = len(given[at].content) // 2
    given[at] = given[at]._replace(content=given[at].content[:half] + bytes(half))
    try:
        shown = len(decode_packets(iter(given)).frames)
    except av.InvalidDataError:
        return
    assert shown < 9


def run(code: str) -> str:
    """In a process of its own, which may crash or stand still."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout or f"exit code {done.returncode}"


LEFT_EARLY = """
from engine.h264 import decode_packets
from tests.engine.test_h264 import encoded, packets

given = packets(*encoded(9))

def broken(whole):
    yield from given[:whole]
    raise KeyError

for i in range(90):
    try:
        decode_packets(broken(i % 9))
    except KeyError:
        print(end="x")
"""


def test_decode_packets_leaves_no_thread_waiting_when_its_packets_end_in_an_error():
    """Were the packets' memory Python's, a thread of FFmpeg would wait for the interpreter, and it for the thread."""
    assert run(LEFT_EARLY) == "x" * 90


AT_THE_END_OF_MEMORY = """
import ctypes, mmap
from engine.h264 import decode_packets
from tests.engine.test_h264 import encoded, packets

def moved(content):
    size = -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    pages[size - len(content) : size] = content
    return memoryview(pages)[size - len(content) : size]

given = [packet._replace(content=moved(packet.content)) for packet in packets(*encoded(9))]
print(len(decode_packets(iter(given)).frames))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory by the C library")
def test_decode_packets_reads_nothing_behind_a_packet():
    """FFmpeg's decoder does, by some bytes; a packet of 128 kB or more has pages of its own, and may fill the last."""
    assert run(AT_THE_END_OF_MEMORY) == "9\n"


def test_packet_is_the_same_in_another_unit_of_time_and_in_nothing_else():
    packet = Packet(2, 1, Fraction(1, 16), b"units", b"avcC")
    assert packet._replace(pts=2000, dts=1000, time_base_s=Fraction(1, 16000)).sha256() == packet.sha256()
    others = [{"pts": 3}, {"dts": 0}, {"time_base_s": Fraction(1, 15)}, {"content": b"unit"}, {"parameters": b"avc"}]
    assert packet.sha256() not in {packet._replace(**other).sha256() for other in others}


@pytest.mark.parametrize("missing", ["pts", "dts"])
def test_packet_without_a_time_is_refused(missing: str):
    packet = encoded(1)[1][0]
    setattr(packet, missing, None)
    with pytest.raises(ValueError, match="a packet without a time"):
        Packet.of(packet, b"", b"")
