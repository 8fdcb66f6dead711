import math
import random
import struct
import tempfile
import time
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from engine import clips, decode_child
from engine.clips import Clip, decode_clip
from schemas.errors import InvalidMedia

DAMAGED = "the video is damaged, cut short or without pictures"
NOT_A_VIDEO = "not an MP4, MOV, WebM or Matroska video"


def level(index: int) -> int:
    """The grey of frame `index`: each differs from its neighbours by 5."""
    return 20 + 5 * (index % 40)


def clip(
    frames: int = 24,
    *,
    height: int = 48,
    width: int = 64,
    codec: str = "libx264",
    form: str = "mp4",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    rate: int = 16,
) -> bytes:
    """A video of flat greys, made by the encoder named."""
    with tempfile.NamedTemporaryFile() as file:  # faststart reads the file again
        with av.open(file.name, "w", format=form, options=container or {}) as output:
            stream = output.add_stream(codec, rate=rate)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = options or {}
            for index in range(frames):
                picture = np.full((height, width, 3), level(index), np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
        return Path(file.name).read_bytes()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return clip()


def verdict(data: bytes, last_frames: int = 3) -> str | None:
    try:
        decode_clip(data, last_frames)
    except InvalidMedia as error:
        return error.sentence
    return None


def greys(found: Clip) -> list[int]:
    return [int(np.asarray(frame).mean().round()) for frame in found.frames]


KINDS = {
    "mp4 h264": {},
    "mp4 h264 with B-frames in one group": {"options": {"g": "999", "bf": "3"}},
    "mp4 h264 in open groups": {"options": {"g": "6", "bf": "3", "x264-params": "open-gop=1"}},
    "mp4 h264 of key frames": {"options": {"g": "1"}},
    "mp4 h264 with its index in front": {"container": {"movflags": "faststart"}},
    "mp4 h264 in fragments": {"options": {"g": "8"}, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "mov h264": {"form": "mov"},
    "mp4 mpeg4": {"codec": "mpeg4", "options": {"flags": "+qscale", "global_quality": "118"}},
    "mkv h264": {"form": "matroska"},
    "webm vp8": {"codec": "libvpx", "form": "webm"},
    "webm vp9": {"codec": "libvpx-vp9", "form": "webm"},
    "webm live": {"codec": "libvpx", "form": "webm", "container": {"live": "1"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_decode_clip_gives_the_last_frames_in_order_of(kind):
    found = decode_clip(clip(60, **KINDS[kind]), 5)
    assert [frame.size for frame in found.frames] == [(64, 48)] * 5
    assert all(frame.mode == "RGB" for frame in found.frames)
    assert np.abs(np.array(greys(found)) - [level(index) for index in range(55, 60)]).max() <= 2


def test_decode_clip_equals_decoding_everything():
    data = clip(60, options={"g": "12", "bf": "3"})
    with av.open(BytesIO(data)) as container:
        everything = [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
    for last in (1, 9, 60):
        assert [frame.tobytes() for frame in decode_clip(data, last).frames] == everything[-last:]


def test_decode_clip_reads_the_rate():
    assert decode_clip(clip(rate=25), 1).fps == 25.0


def test_decode_clip_keeps_colours_as_tagged():
    for matrix in ("ITU709", "ITU601"):
        file = BytesIO()
        with av.open(file, "w", format="mp4") as output:
            stream = output.add_stream("libx264", rate=16, options={"crf": "5"})
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            space = getattr(av.video.reformatter.Colorspace, matrix)
            stream.codec_context.colorspace = space
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), (200, 50, 20), np.uint8), format="rgb24")
            for _ in range(3):
                output.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=space)))
            output.mux(stream.encode())
        found = np.asarray(decode_clip(file.getvalue(), 1).frames[0]).reshape(-1, 3).mean(axis=0)
        assert np.abs(found - (200, 50, 20)).max() < 4, matrix


def test_decode_clip_passes_over_sound():
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        video, sound = output.add_stream("libx264", rate=16), output.add_stream("aac", rate=44_100)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for index in range(8):
            picture = np.full((48, 64, 3), level(index), np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 44_100
            output.mux(sound.encode(samples))
        output.mux(video.encode())
        output.mux(sound.encode())
    assert len(decode_clip(file.getvalue(), 8).frames) == 8


def turned(data: bytes, degrees: int) -> bytes:
    """The clip with a display matrix that turns it clockwise, as phones write it. Source: ISO 14496-12, 8.3.2."""
    turn = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    at = data.index(matrix(*turn[0]), data.index(b"tkhd"))
    return data[:at] + matrix(*turn[degrees]) + data[at + 36 :]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_decode_clip_turns_upright(degrees):
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:16, :32] = 255  # the top left quarter is white
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    found = np.asarray(decode_clip(turned(file.getvalue(), degrees), 1).frames[0])[..., 0] > 128
    corners = {"top left": found[0, 0], "top right": found[0, -1], "low left": found[-1, 0], "low right": found[-1, -1]}
    white = {0: "top left", 90: "top right", 180: "low right", 270: "low left"}[degrees]
    assert found.shape == ((32, 64) if degrees % 180 == 0 else (64, 32))
    assert [corner for corner, is_white in corners.items() if is_white] == [white]


FOREIGN = {
    "nothing": b"",
    "text": b"hello world",
    "hls playlist": b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat script": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "avi": b"RIFF\x24\0\0\0AVI LIST" + bytes(32),
    "mpeg ts": b"\x47\x40\x00\x10" * 188,
    "gif": b"GIF89a" + bytes(32),
    "flv": b"FLV\x01\x05\0\0\0\x09",
    "ogg": b"OggS" + bytes(60),
    "sdp": b"v=0\r\nm=video 5004 RTP/AVP 96\r\n",
    "dash": b"<?xml version='1.0'?><MPD/>",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_decode_clip_refuses_what_is_no_video(what):
    assert verdict(FOREIGN[what]) == NOT_A_VIDEO


def box(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + name + data


BROKEN = {
    "mp4 of a type only": box(b"ftyp", b"isom\0\0\0\0isom"),
    "mp4 with an hls playlist inside": box(b"ftyp", b"isom\0\0\0\0isom") + box(b"mdat", FOREIGN["hls playlist"]),
    "mp4 of noise": box(b"ftyp", b"isom\0\0\0\0isom") + box(b"moov", random.Random(0).randbytes(999)),
    "mp4 of endless boxes": box(b"ftyp", b"isom\0\0\0\0isom") + box(b"free", b"") * 20_001,
    "mp4 with a box of 7 bytes": box(b"ftyp", b"isom\0\0\0\0isom") + b"\0\0\0\x07free",
    "matroska of a head only": b"\x1a\x45\xdf\xa3\x80",
    "matroska of noise": b"\x1a\x45\xdf\xa3" + random.Random(0).randbytes(999),
}


@pytest.mark.parametrize("what", BROKEN)
def test_decode_clip_refuses_a_broken(what):
    assert verdict(BROKEN[what]) == DAMAGED


def test_decode_clip_refuses_a_video_of_sound_only():
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=44_100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44_100
        output.mux(sound.encode(samples))
        output.mux(sound.encode())
    assert verdict(file.getvalue()) == DAMAGED


@pytest.mark.parametrize("codec", ["mjpeg", "ffv1"])
def test_decode_clip_refuses_a_codec_off_the_list(codec):
    file = BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream(codec, rate=16)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = {"mjpeg": "yuvj420p", "ffv1": "yuv420p"}[codec]
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        output.mux(stream.encode())
    assert verdict(file.getvalue(), 1) in ("the video's codec is not H.264, HEVC, MPEG-4, VP8, VP9 or AV1", DAMAGED)


def test_decode_clip_names_the_codec_it_does_not_take():
    data = clip(4, codec="libx264", form="matroska").replace(b"V_MPEG4/ISO/AVC", b"V_THEORA\0\0\0\0\0\0\0")
    assert verdict(data, 1) == "the video's codec is not H.264, HEVC, MPEG-4, VP8, VP9 or AV1"


def test_decode_clip_needs_as_many_frames_as_are_asked_for(mp4):
    assert verdict(mp4, 24) is None
    assert verdict(mp4, 25) == "the video has fewer frames than are needed"


def test_decode_clip_bounds_the_number_of_frames(mp4, monkeypatch):
    monkeypatch.setattr(clips, "MAX_FRAMES", 23)
    assert verdict(mp4) == clips._SENTENCES["too_long"]
    monkeypatch.setattr(clips, "MAX_FRAMES", 24)
    assert verdict(mp4) is None


def test_decode_clip_bounds_the_duration(monkeypatch):
    slow = clip(4, rate=1)
    monkeypatch.setattr(clips, "MAX_DURATION_S", 2.9)
    assert verdict(slow) == clips._SENTENCES["too_long"]
    monkeypatch.setattr(clips, "MAX_DURATION_S", 3.0)
    assert verdict(slow) is None


def test_decode_clip_bounds_the_size(mp4, monkeypatch):
    for limit, value, reason in (
        ("MAX_SIDE", 63, "too_large"),
        ("MAX_PIXELS", 48 * 64 - 1, "too_large"),
        ("MIN_SIDE", 49, "too_small"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(clips, limit, value)
            assert verdict(mp4) == clips._SENTENCES[reason], limit
    assert verdict(mp4) is None


def test_decode_clip_refuses_a_giant_frame_before_it_is_decoded():
    assert (
        verdict(clip(2, height=2320, width=4096, options={"preset": "ultrafast"}), 1) == clips._SENTENCES["too_large"]
    )


def test_decode_clip_judges_a_picture_that_grows_in_the_middle():
    """The container says 64 x 48; a later key frame says 128 x 96."""
    small, large = (
        clip(8, height=48 * factor, width=64 * factor, form="h264", options={"bf": "0", "g": "8"}) for factor in (1, 2)
    )
    assert verdict(in_matroska(small + large), 12) == DAMAGED


def test_decode_clip_judges_a_picture_that_turns_in_the_middle():
    """As many bytes, but one frame is shown as 48 x 64 and the others as 64 x 48."""
    upright = clip(8, form="h264", options={"bf": "0", "g": "8"})
    assert verdict(in_matroska(upright + upright), 12) is None
    assert verdict(in_matroska(upright + beginning_with_a_turn(upright)), 12) == DAMAGED


def in_matroska(h264: bytes) -> bytes:
    """The bare stream in a file whose head says what the stream's beginning says."""
    file = BytesIO()
    with av.open(BytesIO(h264), format="h264") as source, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, index, index
                output.mux(packet)
    return file.getvalue()


def beginning_with_a_turn(h264: bytes) -> bytes:
    """The stream with a message on its key frame that turns this frame by 90 degrees."""
    with av.open(BytesIO(h264), format="h264") as source:
        turn = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
        turned = [
            bytes(out) for packet in source.demux(video=0) for out in turn.filter(packet if packet.size else None)
        ]
    return b"".join(turned)


@pytest.mark.parametrize("kind", ["mp4 h264", "mp4 h264 with its index in front", "mkv h264", "webm vp9"])
def test_decode_clip_never_takes_a_cut_file_for_a_whole_one(kind):
    data = clip(**KINDS[kind])
    cuts = [*range(0, len(data), math.ceil(len(data) / 40)), len(data) - 1]
    assert {verdict(data[:length]) for length in cuts} <= {DAMAGED, NOT_A_VIDEO}


def test_structure_is_what_sees_a_cut_file(monkeypatch):
    data = clip(**KINDS["webm vp9"])
    cut = data[: len(data) * 3 // 4]
    assert verdict(cut) == DAMAGED
    monkeypatch.setattr(clips, "_segment_fits", lambda _: True)
    assert verdict(cut) is None


def mutants(data: bytes, count: int, seed: int):
    draw = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            mutant[draw.randrange(12, len(mutant))] = draw.choice(b"\x00\x01\x7f\x80\xfe\xff")
        yield bytes(mutant)


ANSWERS = {None, NOT_A_VIDEO, *clips._SENTENCES.values()}


@pytest.mark.parametrize("kind", ["mp4 h264", "webm vp9"])
def test_decode_clip_answers_mutants(kind):
    assert {verdict(mutant) for mutant in mutants(clip(8, **KINDS[kind]), 10, seed=1)} <= ANSWERS


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_decode_clip_answers_many_mutants(kind):
    assert {verdict(mutant) for mutant in mutants(clip(8, **KINDS[kind]), 100, seed=2)} <= ANSWERS


@pytest.mark.soak
def test_decode_clip_ends_a_clip_that_is_dear_to_decode():
    data = clip(300, height=2304, width=4096, options={"preset": "ultrafast", "g": "999"}, rate=30)
    started = time.monotonic()
    assert verdict(data) in (None, "the video takes too long to decode")
    assert time.monotonic() - started < 20.5


def test_child_holds_one_frame_at_a_time_as_rgb(mp4, monkeypatch):
    made = []
    to_rgb = decode_child._frame_to_rgb
    monkeypatch.setattr(decode_child, "_frame_to_rgb", lambda *frame: made.append(None) or to_rgb(*frame))
    rules = {
        "last_frames": 9,
        "max_frames": 24,
        "max_duration_s": 9,
        "max_pixels": 2**16,
        "max_side": 99,
        "min_side": 9,
    }
    decoded = decode_child.decode_clip(mp4, "mov", rules)
    assert len(made) == 1
    assert [len(made) for _ in decoded.pixels] == list(range(1, 10))


@pytest.mark.soak
def test_decode_clip_takes_the_most_frames_of_the_largest_size():
    data = clip(40, height=2304, width=4096, options={"preset": "ultrafast", "g": "12"})
    assert len(decode_clip(data, 25).frames) == 25  # overlap 20, and 5 that are encoded with them


def test_codecs_by_the_list_are_all_there():
    assert [name for name in decode_child.CODECS if name not in av.codecs_available] == []
