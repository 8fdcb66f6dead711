"""Frames to a verified MP4: right numbers and colours, no file after a failure, a strict verifier."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import engine.video as video_module
from engine.boxes import Box, check_streamable, top_boxes
from engine.geometry import VideoShape
from engine.h264 import Decoded, Packet, decode_packets
from engine.mp4 import Mp4, as_encoding_failed, converted
from engine.outputs import Frames
from engine.turns import TURN_S
from engine.video import QUEUE_CHUNKS, verify, write_mp4
from schemas.errors import BadOutput, Cancelled, DiskFull, EncodingFailed

ROOT = Path(__file__).parents[2]
SHAPE = VideoShape(17, 64, 96)
THREADS = ("colours", "encoder", "decoder")


def pictures(shape: VideoShape = SHAPE, seed: int = 0) -> np.ndarray:
    """A textured pan with noise: (f, h, w, 3) uint8."""
    generator = np.random.default_rng(seed)
    frames, height, width = shape
    small = generator.integers(0, 256, (height // 8 + 2, (width + frames) // 8 + 2, 3))
    wide = small.repeat(8, axis=0).repeat(8, axis=1)[:height].astype(int)
    pan = np.stack([wide[:, i : i + width] for i in range(frames)])
    return np.clip(pan + generator.integers(-6, 7, pan.shape), 0, 255).astype(np.uint8)


def chunks(video: np.ndarray):
    yield video[:1]
    for i in range(1, len(video), 4):
        yield video[i : i + 4]


def frames_of(video: np.ndarray, fps: int = 16) -> Frames:
    return Frames(chunks(video), VideoShape(*video.shape[:3]), fps)


def decoded(path: Path, pix_fmt: str) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format=pix_fmt) for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("shape", "fps", "duration_s"),
    [
        ((17, 64, 96), 16, 1.0625),
        ((1, 32, 32), 16, 0.0625),
        ((5, 32, 34), 24, 5 / 24),
        ((9, 96, 64), 60, 0.15),
        ((81, 48, 80), 16, 5.0625),
        ((81, 32, 32), 7, 81 / 7),
    ],
)
def test_write_mp4_gives_exactly_the_frames_size_and_rate_asked_for(tmp_path, shape, fps, duration_s):
    file = write_mp4(frames_of(pictures(VideoShape(*shape)), fps), tmp_path / "video.mp4")
    assert (file.frames, file.height, file.width) == shape
    assert (file.fps, file.content_type) == (fps, "video/mp4")
    assert file.duration_s == pytest.approx(duration_s, abs=1e-4)  # the index counts in 1/16000 s or finer
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    content = file.path.read_bytes()
    assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_write_mp4_makes_what_every_browser_plays(tmp_path):
    file = write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    kinds = [box.kind for box in top_boxes(file.path)]
    assert [kind for kind in kinds if kind != "free"] == ["ftyp", "moov", "mdat"]
    with av.open(str(file.path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.color_range, context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1, 1)
        assert stream.average_rate == stream.guessed_rate == Fraction(16)
        assert stream.sample_aspect_ratio in (None, 1)
        assert stream.codec_context.profile in ("High", "Main", "Constrained Baseline")


@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [  # ITU-R BT.709-6, 3.2 and 3.4: Y is 16 + 219 * (0.2126 R + 0.7152 G + 0.0722 B)
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
        ((255, 255, 255), (235, 128, 128)),
        ((128, 128, 128), (126, 128, 128)),
        ((0, 0, 0), (16, 128, 128)),
    ],
)
def test_write_mp4_writes_bt709_limited_range(tmp_path, rgb, yuv):
    """One half of the picture in the colour, the other half texture, so that there is something to see."""
    video = pictures(VideoShape(5, 64, 128))
    video[:, :, :64] = rgb
    file = write_mp4(frames_of(video), tmp_path / "video.mp4")
    planes = decoded(file.path, "yuv420p").astype(int)  # (f, 96, 128): Y, then U and V in half size
    y, uv = planes[:, :64, 8:40], planes[:, 64:].reshape(5, 2, 32, 64)[:, :, :, 4:20]
    assert np.abs(y.mean() - yuv[0]) < 1.0
    assert np.abs(uv[:, 0].mean() - yuv[1]) < 1.0
    assert np.abs(uv[:, 1].mean() - yuv[2]) < 1.0


def test_write_mp4_keeps_the_picture(tmp_path):
    video = np.kron(pictures(VideoShape(9, 16, 24)), np.ones((1, 4, 4, 1), np.uint8))  # no detail that 4:2:0 loses
    file = write_mp4(frames_of(video), tmp_path / "video.mp4")
    error = decoded(file.path, "rgb24").astype(float) - video
    assert 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3))).min() > 36.0  # dB, every frame; crf 18


def test_write_mp4_replaces_an_older_file_only_when_it_succeeds(tmp_path):
    path = tmp_path / "video.mp4"
    old = write_mp4(frames_of(pictures()), path)
    with pytest.raises(BadOutput):
        write_mp4(frames_of(np.zeros((5, 32, 32, 3), np.uint8)), path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == old.sha256
    new = write_mp4(frames_of(pictures(seed=1)), path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == new.sha256 != old.sha256


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95), (63, 95)])
def test_write_mp4_refuses_odd_sizes_before_the_first_frame(tmp_path, height, width):
    def never():
        pytest.fail("decoded")
        yield

    with pytest.raises(BadOutput, match="both sides must be even"):
        write_mp4(Frames(never(), VideoShape(5, height, width), 16), tmp_path / "video.mp4")


@pytest.mark.parametrize(
    "video",
    [
        pictures()[:13],
        np.concatenate([pictures(), pictures()]),
        pictures()[:, :32],
        np.zeros((17, 64, 96, 3), np.uint8),
    ],
    ids=["few", "many", "small", "black"],
)
def test_write_mp4_leaves_nothing_when_the_frames_are_bad(tmp_path, video):
    with pytest.raises(BadOutput):
        write_mp4(Frames(chunks(video), SHAPE, 16), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize(
    "error", [Cancelled("stop"), RuntimeError("card"), KeyboardInterrupt(), OSError(28, "not ours")]
)
def test_write_mp4_lets_the_decoders_exception_through_and_removes_the_file(tmp_path, at, error):
    closed = []

    def breaking():
        try:
            for i, chunk in enumerate(chunks(pictures())):
                if i == at:
                    raise error
                yield chunk
        finally:
            closed.append(True)

    with pytest.raises(type(error)) as caught:
        write_mp4(Frames(breaking(), SHAPE, 16), tmp_path / "video.mp4")
    assert caught.value is error
    assert closed == [True]
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def test_write_mp4_streams(tmp_path):
    """Only the chunk in hand, those that wait and the one being encoded are ever alive."""
    alive: list[weakref.ref] = []
    most = 0

    def counted():
        nonlocal most
        for i in range(101):
            chunk = pictures(VideoShape(1, 64, 96), seed=i)
            alive.append(weakref.ref(chunk))
            most = max(most, sum(ref() is not None for ref in alive))
            yield chunk
            del chunk

    write_mp4(Frames(counted(), VideoShape(101, 64, 96), 16), tmp_path / "video.mp4")
    assert most <= QUEUE_CHUNKS + 3


def test_write_mp4_converts_encodes_and_checks_while_the_frames_come(tmp_path):
    threads = set()

    def watching():
        for chunk in chunks(pictures()):
            threads.update(t.name for t in threading.enumerate() if t.name.startswith(THREADS))
            yield chunk

    write_mp4(Frames(watching(), SHAPE, 16), tmp_path / "video.mp4")
    assert {name.rpartition("_")[0] for name in threads} == {"colours", "encoder", "decoder"}
    assert not [t for t in threading.enumerate() if t.name.startswith(THREADS)]


def test_write_mp4_fails_cleanly_without_its_folder(tmp_path):
    with pytest.raises(EncodingFailed) as caught:
        write_mp4(frames_of(pictures()), tmp_path / "absent" / "video.mp4")
    assert caught.value.sentence == "the video could not be written: No such file or directory"


def test_write_mp4_fails_cleanly_when_the_encoder_refuses_the_frames(tmp_path):
    """libx264 takes no more than 16384 pixels a side; the failure comes from inside the encoder's thread."""
    shape = VideoShape(17, 16, 16400)
    closed = []

    def decoder():
        try:
            yield from chunks(pictures(shape))
        finally:
            closed.append(True)

    decoding = decoder()
    with pytest.raises(EncodingFailed, match="could not be encoded"):
        write_mp4(Frames(decoding, shape, 16), tmp_path / "video.mp4")
    assert closed == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda content: content[:-100], "is not what was written"),
        (lambda content: patched(content, len(content) - 50, b"?"), "is not what was written"),
        (lambda _content: b"", "is not what was written"),
    ],
)
def test_write_mp4_notices_a_disk_that_lies(tmp_path, monkeypatch, lie, words):
    monkeypatch.setattr(video_module, "_write", lambda path, content: path.write_bytes(lie(content)))
    with pytest.raises(EncodingFailed, match=words):
        write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "failure"), [(errno.ENOSPC, DiskFull), (errno.EIO, EncodingFailed)])
def test_write_mp4_gives_no_name_to_a_file_that_does_not_reach_the_disk(tmp_path, monkeypatch, number, failure):
    def refuse(_):
        raise OSError(number, "late")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(failure):
        write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


def test_write_mp4_verifies_what_the_encoder_made(tmp_path, monkeypatch):
    """An encoder that was given other frames."""

    def darker(picture):
        return converted(picture // 2)[0], converted(picture)[1]

    monkeypatch.setattr(video_module, "converted", darker)
    with pytest.raises(EncodingFailed, match="does not show the frames it was given"):
        write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


def test_write_mp4_refuses_a_file_of_other_packets_than_were_decoded(tmp_path, monkeypatch):
    """A muxer that writes a good file of frames like those it was given."""
    alike, other, finish = pictures() ^ 1, tmp_path / "other", Mp4.finish
    write_mp4(frames_of(alike), other)

    def finish_other(mp4):
        finish(mp4)
        return other.read_bytes()

    monkeypatch.setattr(Mp4, "finish", finish_other)
    with pytest.raises(EncodingFailed, match="its packets are not those that were decoded"):
        write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("at", [0, 8, 16])
def test_write_mp4_fails_cleanly_when_the_encoder_tears_a_packet(tmp_path, monkeypatch, at):
    packets = Mp4.packets

    def torn(mp4):
        for i, packet in enumerate(packets(mp4)):
            half = len(packet.content) // 2
            yield packet._replace(content=packet.content[:half] + bytes(half)) if i == at else packet

    monkeypatch.setattr(Mp4, "packets", torn)
    with pytest.raises(EncodingFailed, match=r"could not be decoded: InvalidDataError|the number of decoded frames is"):
        write_mp4(frames_of(pictures()), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def test_write_mp4_stops_the_card_when_the_decoder_fails_in_the_middle(tmp_path, monkeypatch):
    """Not a chunk is asked for once it is known; at the end it would be minutes later."""
    packets, begun = Mp4.packets, []

    class Recording(ThreadPoolExecutor):
        def submit(self, *call):
            begun.append(super().submit(*call))
            return begun[-1]

    def torn(mp4):
        for packet in packets(mp4):
            yield packet._replace(content=b"\xff" * 100)

    def watching():
        yield from chunks(pictures(VideoShape(121, 64, 96)))  # far more than x264 and a decoder hold back
        assert isinstance(begun[0].exception(), av.InvalidDataError)
        yield pictures(VideoShape(1, 64, 96))
        pytest.fail("asked for more")

    monkeypatch.setattr(Mp4, "packets", torn)
    monkeypatch.setattr(video_module, "ThreadPoolExecutor", Recording)
    with pytest.raises(EncodingFailed, match="could not be decoded: InvalidDataError"):
        write_mp4(Frames(watching(), VideoShape(161, 64, 96), 16), tmp_path / "video.mp4")


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads that are not Python's")
def test_write_mp4_frees_the_encoder_while_its_failure_is_still_looked_at(tmp_path):
    before, shape = threads_now(), VideoShape(81, 256, 64)

    def stopped():
        yield from chunks(pictures(shape)[:41])
        assert threads_now() >= before + 9  # x264's eight and the one that looks ahead
        raise Cancelled("stop")

    with pytest.raises(Cancelled) as caught:
        write_mp4(Frames(stopped(), shape, 16), tmp_path / "video.mp4")
    assert threads_now() <= before + 4  # Python's own may be about to end
    assert caught.value.sentence == "stop"


def threads_now() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_write_mp4_lets_threads_take_short_turns_until_it_ends(tmp_path):
    before, seen = sys.getswitchinterval(), []

    def watching():
        for chunk in chunks(pictures()):
            seen.append(sys.getswitchinterval())
            yield chunk

    write_mp4(Frames(watching(), SHAPE, 16), tmp_path / "video.mp4")
    assert seen == [pytest.approx(TURN_S)] * 5
    with pytest.raises(BadOutput):
        write_mp4(Frames(iter(()), SHAPE, 16), tmp_path / "video.mp4")
    assert sys.getswitchinterval() == before


@contextmanager
def largest_file(size_bytes: int):
    """No file of this process may grow past `size_bytes`: a full disk, for one writer, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_mp4_fails_cleanly_on_a_disk_that_fills_anywhere(tmp_path):
    shape = VideoShape(33, 128, 192)
    path = tmp_path / "video.mp4"
    whole = write_mp4(frames_of(pictures(shape)), path).size_bytes
    path.unlink()
    for limit in [0, 1, 40, 48, 1000, *(whole * i // 16 for i in range(1, 16))]:
        with largest_file(limit), pytest.raises(EncodingFailed, match="could not be written: File too large"):
            write_mp4(frames_of(pictures(shape)), path)
        assert list(tmp_path.iterdir()) == [], limit
    with largest_file(2 * whole):
        write_mp4(frames_of(pictures(shape)), path)
    assert decoded(path, "yuv420p").shape == (33, 192, 192)  # 4:2:0: 128 rows of Y, 32 and 32 of U and V


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_full(number):
    with pytest.raises(DiskFull, match="the worker's disk is full"), as_encoding_failed("written"):
        raise OSError(number, os.strerror(number))


KILLED = """
import itertools, sys
from pathlib import Path
import numpy as np
from engine.geometry import VideoShape
from engine.outputs import Frames
from engine.video import write_mp4
shape = VideoShape(17, 128, 192)
video = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
print("ready", flush=True)
for i in itertools.count():
    write_mp4(Frames(iter(np.split(video, 17)), shape, 16), Path(sys.argv[1]) / f"{i}.mp4")
    print(i, flush=True)
"""


@pytest.mark.parametrize("written", range(6))
def test_write_mp4_names_no_unfinished_file_when_the_process_is_killed(tmp_path, written):
    """kill -9, each time a bit further into a file: what has its name is whole."""
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.03 + 0.07 * written)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    for path in tmp_path.glob("*.mp4"):
        if not path.name.startswith("."):
            assert len(decoded(path, "yuv420p")) == 17


def test_video_module_imports_nothing_heavy():
    code = "import sys, engine.video; print(sorted({'av', 'numpy', 'torch', 'PIL'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(
    ("kinds", "good"),
    [
        ("ftyp moov mdat", True),
        ("ftyp free moov free free mdat free", True),
        ("ftyp mdat moov", False),
        ("free ftyp moov mdat", False),
        ("moov ftyp mdat", False),
        ("moov mdat", False),
        ("ftyp moov", False),
        ("ftyp mdat", False),
        ("ftyp moov mdat mdat", False),
        ("ftyp moov mdat moov", False),
        ("", False),
    ],
)
def test_check_streamable_wants_the_index_before_the_frames(kinds, good):
    boxes = [Box(kind, 0, 8) for kind in kinds.split()]
    if good:
        check_streamable(boxes)
    else:
        with pytest.raises(ValueError, match="not ftyp, moov, mdat"):
            check_streamable(boxes)


def test_top_boxes_reads_a_64_bit_size(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(
        (1).to_bytes(4, "big") + b"mdat" + (20).to_bytes(8, "big") + bytes(4) + (8).to_bytes(4, "big") + b"free"
    )
    assert top_boxes(path) == [("mdat", 0, 20), ("free", 20, 8)]


# ---- the verifier, on files that are wrong in one way each


def encoded(path: Path, video: np.ndarray, **choices) -> Path:
    """An MP4 by the library alone, with choices of ours undone one at a time."""
    fps = choices.get("fps", 16)
    options = {"movflags": choices.get("movflags", "+faststart")}
    with av.open(str(path), "w", format=choices.get("format", "mp4"), options=options) as container:
        streams = [
            container.add_stream(choices.get("codec", "libx264"), rate=fps) for _ in range(choices.get("streams", 1))
        ]
        for stream in streams:  # all of them, before the first frame opens the file
            context = stream.codec_context
            context.width, context.height = video.shape[2], video.shape[1]
            context.pix_fmt = choices.get("pix_fmt", "yuv420p")
            context.time_base = Fraction(1, fps * 10)
            context.color_range = choices.get("color_range", 1)
            context.color_primaries = context.color_trc = 1
            context.colorspace = choices.get("colorspace", 1)
            if "libx264" in choices.get("codec", "libx264"):
                context.options = {"crf": "18", "preset": "veryfast"}
        for stream in streams:
            context = stream.codec_context
            for i, picture in enumerate(video):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format=context.pix_fmt, dst_colorspace=1, dst_color_range=1
                )
                frame.pts = choices.get("times", lambda i: i * 10)(i)
                frame.time_base = context.time_base
                container.mux(stream.encode(frame))
            packets = stream.encode(None)
            if "last_s" in choices:
                packets[-1].duration = int(choices["last_s"] / packets[-1].time_base)
            container.mux(packets)
    return path


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def box(content: bytes, kind: bytes) -> int:
    """Offset of a box's payload, found by its name."""
    return content.index(kind) + 4


def cut_files(whole: bytes) -> dict[str, bytes]:
    at = [
        0,
        1,
        7,
        8,
        31,
        32,
        36,
        40,
        300,
        *(len(whole) * i // 16 for i in range(1, 16)),
        len(whole) - 8,
        len(whole) - 1,
    ]
    return {f"cut at {length}": whole[:length] for length in at}


def patched_files(whole: bytes) -> dict[str, bytes]:
    mdat = box(whole, b"mdat")
    frames_at = [mdat + (len(whole) - mdat) * i // 8 for i in range(8)]
    boxes = {
        name: box(whole, name.encode())
        for name in ("moov", "stts", "stsz", "stco", "avcC", "mdhd", "tkhd", "ftyp", "elst")
    }
    return {
        **{f"hole of 512 zeros at {at}": patched(whole, at, bytes(512)[: len(whole) - at]) for at in frames_at},
        "all of mdat zero": whole[:mdat] + bytes(len(whole) - mdat),
        "mdat of noise": whole[:mdat] + np.random.default_rng(0).bytes(len(whole) - mdat),
        "no index": whole.replace(b"moov", b"free"),
        "no ftyp": whole[int.from_bytes(whole[:4], "big") :],
        "no frames": whole.replace(b"mdat", b"free"),
        "bytes behind the end": whole + b"\0" * 5,
        "second index": whole + (8).to_bytes(4, "big") + b"moov",
        "mdat to the end of the file": patched(whole, mdat - 8, bytes(4)),
        "mdat of 7 bytes": patched(whole, mdat - 8, (7).to_bytes(4, "big")),
        "mdat one byte long": patched(whole, mdat - 8, (len(whole) - mdat + 9).to_bytes(4, "big")),
        "frames last 1.01 of their time": patched(whole, boxes["mdhd"] + 12, (16160).to_bytes(4, "big")),
        "frame table moved by 16": patched(
            whole,
            boxes["stco"] + 8,
            (int.from_bytes(whole[boxes["stco"] + 8 :][:4], "big") + 16).to_bytes(4, "big"),
        ),
        "one frame fewer in the table": patched(
            whole,
            boxes["stsz"] + 8,
            (int.from_bytes(whole[boxes["stsz"] + 8 :][:4], "big") - 1).to_bytes(4, "big"),
        ),
        "first time of zero": patched(whole, boxes["stts"] + 12, bytes(4)),
        "parameters gone": patched(whole, boxes["avcC"], bytes(24)),
        "lengths of 3 bytes": patched(whole, boxes["avcC"] + 4, b"\xfe"),
        "first two frames not shown": patched(whole, boxes["elst"] + 12, (4 * 1024).to_bytes(4, "big")),
        "last frame not shown": patched(whole, boxes["elst"] + 8, (1000).to_bytes(4, "big")),
    }


def torn_frames(path: Path) -> dict[str, bytes]:
    """The second half of one frame's bytes zero, for each frame of some size; a decoder paints over that."""
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 200]
    return {f"frame at {at} torn": patched(whole, at + size - size // 2, bytes(size // 2)) for at, size in packets}


def foreign_files(folder: Path, video: np.ndarray) -> dict[str, bytes]:
    choices = {
        "index last": {"movflags": "disable_chpl"},
        "fragments": {"movflags": "frag_keyframe+empty_moov"},
        "15 fps": {"fps": 15},
        "17 fps": {"fps": 17},
        "32 fps": {"fps": 32},
        "a frame held twice as long": {"times": lambda i: i * 10 + 10 * (i > 8)},
        "a frame a tenth late": {"times": lambda i: i * 10 + (i == 8)},
        "the last frame held for a second": {"last_s": 1},
        "yuv444p": {"pix_fmt": "yuv444p"},
        "yuvj420p": {"pix_fmt": "yuvj420p", "color_range": 2},
        "BT.601": {"colorspace": 6},
        "untagged": {"colorspace": 2},
        "MPEG-4 part 2": {"codec": "mpeg4"},
        "two streams": {"streams": 2},
        "Matroska": {"format": "matroska"},
    }
    files = {name: encoded(folder / "foreign", video, **chosen).read_bytes() for name, chosen in choices.items()}
    wrong = {
        "a frame fewer": video[:-1],
        "a frame more": np.concatenate([video, video[-1:]]),
        "half the frames": video[:9],
        "smaller": video[:, :48],
        "wider": np.concatenate([video, video[:, :, :32]], axis=2),
        "turned": video.transpose(0, 2, 1, 3),
        "black": np.zeros_like(video),
        "one black frame": np.concatenate([video[:8], video[:1] * 0, video[9:]]),
        "brighter": np.clip(video.astype(int) + 12, 0, 255).astype(np.uint8),
    }
    return files | {name: encoded(folder / "foreign", frames).read_bytes() for name, frames in wrong.items()}


def given_luma(video: np.ndarray) -> tuple[float, ...]:
    return tuple(float(16 + 219 * (frame / 255 @ (0.2126, 0.7152, 0.0722)).mean()) for frame in video)


def packets_of(path: Path):
    """Of an H.264 file in a box format, whatever else is wrong with it."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size:
                yield Packet.of(packet, bytes(packet), stream.codec_context.extradata or b"")


def done(decoded: Decoded) -> Future[Decoded]:
    coming: Future[Decoded] = Future()
    coming.set_result(decoded)
    return coming


def accepts(path: Path, luma: tuple[float, ...], expected: Decoded | None = None) -> bool:
    """Whether `verify` takes it for the file of `expected`; None: of its own packets, which is to decode it whole."""
    try:
        with as_encoding_failed("decoded"):
            decoded = expected or decode_packets(packets_of(path))
        verify(path, SHAPE, 16, luma, done(decoded))
    except EncodingFailed:
        return False
    return True


def damaged_files(folder: Path) -> dict[str, bytes]:
    whole = encoded(folder / "whole", pictures()).read_bytes()
    return cut_files(whole) | patched_files(whole) | torn_frames(folder / "whole") | foreign_files(folder, pictures())


def test_verify_accepts_no_damaged_or_foreign_file_were_its_packets_those_decoded(tmp_path):
    luma, path = given_luma(pictures()), tmp_path / "video.mp4"
    damaged = damaged_files(tmp_path)
    assert accepts(tmp_path / "whole", luma)  # so that what follows is refused for its damage alone
    accepted = []
    for name, content in damaged.items():
        path.write_bytes(content)
        accepted += [name] * accepts(path, luma)
    assert len(damaged) >= 60
    assert accepted == []


def test_verify_accepts_no_damaged_or_foreign_file_for_the_packets_decoded(tmp_path):
    luma, path = given_luma(pictures()), tmp_path / "video.mp4"
    damaged, whole = damaged_files(tmp_path), (tmp_path / "whole").read_bytes()
    expected = decode_packets(packets_of(tmp_path / "whole"))
    damaged |= {
        "other frames alike": encoded(path, pictures() ^ 1).read_bytes(),
        "one bit": patched(whole, len(whole) - 9, bytes([whole[-9] ^ 1])),
        "another profile in the index": patched(whole, box(whole, b"avcC") + 1, b"\x64\x01"),
    }
    assert accepts(tmp_path / "whole", luma, expected)
    accepted = []
    for name, content in damaged.items():
        path.write_bytes(content)
        accepted += [name] * accepts(path, luma, expected)
    assert accepted == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda d: replace(d, frames=d.frames[:-1]), "the number of decoded frames is 16, not 17"),
        (lambda d: replace(d, frames=d.frames[:9] + d.frames[8:]), "the number of decoded frames is 18, not 17"),
        (lambda d: looking(d, time_s=Fraction(81, 160)), "frame 8 is not at its time"),
        (lambda d: looking(d, pix_fmt="yuv422p"), "what was decoded is"),
        (lambda d: looking(d, color=(2, 1, 1, 1)), "what was decoded is"),
        (lambda d: looking(d, height=80), "what was decoded is"),
        (lambda d: looking(d, width=80), "what was decoded is"),
        (lambda d: looking(d, luma=d.frames[8].luma + 3.5), "does not show the frames it was given"),
        (lambda d: replace(d, sha256s=d.sha256s[:-1]), "its packets are not those that were decoded"),
        (lambda d: replace(d, sha256s=d.sha256s[::-1]), "its packets are not those that were decoded"),
        (lambda d: replace(d, sha256s=(*d.sha256s, b"")), "its packets are not those that were decoded"),
    ],
)
def test_verify_refuses_a_good_file_for_what_was_decoded(tmp_path, wrong, words):
    path = encoded(tmp_path / "video.mp4", pictures())
    good = decode_packets(packets_of(path))
    with pytest.raises(EncodingFailed, match=words):
        verify(path, SHAPE, 16, given_luma(pictures()), done(wrong(good)))


def looking(decoded: Decoded, **changed) -> Decoded:
    frames = list(decoded.frames)
    frames[8] = frames[8]._replace(**changed)
    return replace(decoded, frames=tuple(frames))


@pytest.mark.parametrize(
    ("choices", "video", "words"),
    [
        (
            {"movflags": "disable_chpl"},
            pictures(),
            "its boxes are ftyp, free, mdat, moov, not ftyp, moov, mdat",
        ),
        ({"fps": 15}, pictures(), "frame rate is 15, not 16"),
        ({"times": lambda i: i * 10 + (i == 8)}, pictures(), "frame 8 is not at its time"),
        ({"last_s": 1}, pictures(), "frame rate is 17/2, not 16"),  # 17 frames in 2 s
        ({"pix_fmt": "yuv444p"}, pictures(), r"what was decoded is {\('yuv444p'"),
        ({"colorspace": 6}, pictures(), r"colour is \(1, 1, 1, 6\), not \(1, 1, 1, 1\)"),
        ({"codec": "mpeg4"}, pictures(), "codec is mpeg4, not h264"),
        ({"streams": 2}, pictures(), "not one video stream"),
        ({}, pictures()[:13], r"shape is \(13, 64, 96\), not \(17, 64, 96\)"),
        ({}, pictures()[:, :, :64], r"shape is \(17, 64, 64\), not \(17, 64, 96\)"),
        ({}, pictures() // 2, "does not show the frames it was given"),
    ],
)
def test_verify_says_what_differs(tmp_path, choices, video, words):
    path = encoded(tmp_path / "video.mp4", video, **choices)
    whole = path if "codec" not in choices else encoded(tmp_path / "whole", video)
    with pytest.raises(EncodingFailed, match=words):
        verify(path, SHAPE, 16, given_luma(pictures()), done(decode_packets(packets_of(whole))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"not a video", "box 'a vi' at 0 has 1852797984 bytes, but the file ends at 11"),
        (b"".join((8).to_bytes(4, "big") + kind for kind in (b"ftyp", b"moov", b"mdat")), "InvalidDataError"),
    ],
    ids=["absent", "text", "empty boxes"],
)
def test_verify_names_no_path_in_its_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "video.mp4").write_bytes(content)
    with pytest.raises(EncodingFailed) as caught:
        verify(tmp_path / "video.mp4", SHAPE, 16, (), done(Decoded((), ())))
    assert caught.value.sentence == f"the video could not be read back: {words}"
