"""The program of the decoding child: a stranger's picture or clip on stdin, raw RGB on stdout.

`engine.spares` runs it as a script, once for each file, with an empty environment, and has it wait for its order. It
imports nothing of this project, limits itself before it reads a byte, and from then on can open no file and no socket.

Stdout holds one line of JSON, then the frames, each (height, width, 3) uint8. The line is
`{"frames", "height", "width", "fps"}` or `{"refused": reason}`. Any other end means that the child died.
"""

import importlib
import json
import os
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import chain
from typing import Any, NamedTuple

IMPORTS_FAILED = 3
"""Exit status: the installation is broken, the file is innocent."""

_LAZY_IN_AV = ("av.subtitles.stream", "av.subtitles.codeccontext")
MODULES = {
    "PNG": ("PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.ImageChops"),
    "JPEG": ("PIL.JpegImagePlugin", "PIL.TiffImagePlugin", "PIL.ImageChops"),
    "WEBP": ("PIL.WebPImagePlugin", "PIL.TiffImagePlugin", "PIL.ImageChops"),
    "mov": ("av", *_LAZY_IN_AV, "PIL.ImageFile"),
    "matroska": ("av", *_LAZY_IN_AV, "PIL.ImageFile"),
}
"""All that decoding a format imports, lazy imports of the libraries included: later, no file can be opened."""
PICTURES = ("PNG", "JPEG", "WEBP")
"""The formats a child is ready for while it waits. Clips are rare, and PyAV would make it hold 36 MB in place of 16."""

# What Pillow 13 raises for broken files, found by mutating good ones. Anything else is a bug and ends us.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)

# libavcodec's decoders for what phones, browsers, editors and this worker write.
CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1")
REORDERED_FRAMES = 16  # H.264 and HEVC show a frame at most this many places after it was sent

STRIP_ROWS = 64  # 768 kB of a photo 4,000 wide

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type; source: PNG specification, table 11.1
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


class Refused(Exception):
    """The file is not accepted; `reason` is a key that the parent has a sentence for."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Decoded(NamedTuple):
    """Frames of one size."""

    pixels: Iterable[bytes]
    """All frames' bytes, in pieces of any length."""
    frames: int
    height: int
    width: int
    fps: float | None


def decode_picture(data: bytes, form: str, rules: dict[str, Any]) -> Decoded:
    """The first frame of a PNG, JPEG or WebP as RGB: upright, over white, with 16 bits scaled to 8.

    `rules`: min_side, max_side, max_pixels. Colour profiles are not applied.

    Raises:
        Refused: too_large, too_small, damaged or memory.
    """
    try:
        image = _open_picture(data, form, rules)
        _check_size(image.height, image.width, rules)
        if form == "PNG" and not png_is_whole(data):
            raise Refused("damaged")
        image.load()
        depth = data[24] if form == "PNG" else 8
        upright = _turn_upright(_to_rgb(image, depth), image)
        return Decoded(_strips(upright), 1, upright.height, upright.width, None)
    except MemoryError:
        raise Refused("memory") from None
    except DAMAGE as error:
        raise Refused("damaged") from error


def _strips(rgb: Any) -> Iterator[bytes]:
    """The picture's bytes, a few rows at a time, which stay in the processor's cache: half the time of one piece."""
    for top in range(0, rgb.height, STRIP_ROWS):
        yield rgb.crop((0, top, rgb.width, min(top + STRIP_ROWS, rgb.height))).tobytes()


def _open_picture(data: bytes, form: str, rules: dict[str, Any]) -> Any:
    """Read the header with the one plugin that the magic bytes name; Pillow's own search tries others."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = rules["max_pixels"]
    plugin = importlib.import_module(MODULES[form][0])
    kind = {"PNG": "PngImageFile", "JPEG": "JpegImageFile", "WEBP": "WebPImageFile"}[form]
    try:
        return getattr(plugin, kind)(BytesIO(data))
    except Image.DecompressionBombError:
        raise Refused("too_large") from None


def _check_size(height: int, width: int, rules: dict[str, Any]) -> None:
    if max(height, width) > rules["max_side"] or height * width > rules["max_pixels"]:
        raise Refused("too_large")
    if min(height, width) < rules["min_side"]:
        raise Refused("too_small")


def png_is_whole(data: bytes) -> bool:
    """Whether the PNG's pixel stream holds every row. Pillow leaves missing rows black without a word."""
    if data[12:16] != b"IHDR":
        return False  # Pillow takes the header from anywhere
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * PNG_CHANNELS[colour]
    passes = ADAM7 if interlace else ((0, 0, 1, 1),)
    missing = 0
    for top, left, down, right in passes:
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            missing += rows * (1 + (columns * bits + 7) // 8)  # 1: the row's filter type
    inflate = zlib.decompressobj()
    for part in _png_pixel_stream(data):
        while part and missing > 0:
            missing -= len(inflate.decompress(part, 2**20))
            part = inflate.unconsumed_tail
    return missing <= 0


def _png_pixel_stream(data: bytes) -> Iterator[bytes]:
    """The first run of IDAT chunks: the still picture, also in an animation."""
    position, has_begun = 8, False
    while position + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[position : position + 8])
        if name == b"IDAT":
            has_begun = True
            yield data[position + 8 : position + 8 + length]
        elif has_begun or (name == b"IHDR" and position > 8):  # of two headers Pillow takes the second
            return
        position += 12 + length


def _to_rgb(image: Any, depth: int) -> Any:
    """RGB without alpha. `depth`: bits of a sample in the file; transparent colours are given in these."""
    key = image.info.pop("transparency", None)
    if image.mode in ("1", "L", "I;16"):
        return _grey_to_rgb(image, depth, key)
    if image.mode == "RGB" and key is not None:
        key = tuple(sample >> 8 for sample in key) if depth == 16 else key  # Pillow keeps the high byte of a sample
    if key is not None:
        image.info["transparency"] = key
    if key is None and image.mode not in ("RGBA", "LA", "PA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    clear = image.convert("RGBA")
    return _over_white(clear.convert("RGB"), clear.getchannel("A"))


def _grey_to_rgb(image: Any, depth: int, key: int | None) -> Any:
    """Grey of 1 to 16 bits; `key` is the sample that is transparent."""
    from PIL import Image, ImageChops

    if image.mode != "I;16":
        grey = image.convert("L")
        if key is None:
            return grey.convert("RGB")
        scaled = key * 255 // (2**depth - 1)  # as Pillow scales samples of 1, 2 and 4 bits
        return _over_white(grey.convert("RGB"), grey.point([0 if v == scaled else 255 for v in range(256)]))
    # point() is linear for 16 bits; 65535 / 257 is 255. Pillow's own conversion clips at 255.
    grey = image.point(lambda sample: sample * (1 / 257) + 0.5).convert("L")
    if key is None:
        return grey.convert("RGB")
    samples = image.tobytes()
    low, high = (Image.frombytes("L", image.size, samples[half::2]) for half in (0, 1))
    opaque = ImageChops.lighter(
        low.point([0 if v == key & 255 else 255 for v in range(256)]),
        high.point([0 if v == key >> 8 else 255 for v in range(256)]),
    )
    return _over_white(grey.convert("RGB"), opaque)


def _over_white(rgb: Any, alpha: Any) -> Any:
    from PIL import Image

    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _turn_upright(rgb: Any, source: Any) -> Any:
    """Apply the EXIF orientation of `source`; EXIF that cannot be read says nothing about it."""
    from PIL.Image import Transpose

    try:
        orientation = source.getexif().get(0x0112)
    except DAMAGE:
        return rgb
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def decode_clip(data: bytes, form: str, rules: dict[str, Any]) -> Decoded:
    """The last frames of an MP4, MOV, WebM or Matroska clip as RGB, turned as its display matrix says.

    `rules`: last_frames, max_frames, max_duration_s, min_side, max_side, max_pixels. Pixels count as square.

    Raises:
        Refused: too_large, too_small, too_long, too_short, codec, damaged or memory.
    """
    import av

    options = {"protocol_whitelist": "none", "codec_whitelist": ",".join(CODECS)}
    try:
        with av.open(BytesIO(data), format=form, container_options=options) as container:
            if not container.streams.video:
                raise Refused("damaged")
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.codec_context.codec.name not in CODECS:
                raise Refused("codec")
            _check_size(stream.codec_context.height, stream.codec_context.width, rules)
            stream.codec_context.thread_count = 1
            last = _last_frames(_packets(container, stream, rules), stream, rules)
            fps = float(stream.average_rate) if stream.average_rate else None
        count, images = len(last), _take_as_rgb(last)
        first = next(images)
    except MemoryError:
        raise Refused("memory") from None
    except (av.FFmpegError, *DAMAGE) as error:
        raise Refused("damaged") from error
    return Decoded((image.tobytes() for image in chain([first], images)), count, first.height, first.width, fps)


def _packets(container: Any, stream: Any, rules: dict[str, Any]) -> list[Any]:
    """Every compressed frame of the stream, counted before one is decoded."""
    packets = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise Refused("damaged")
        if packet.size:
            packets.append(packet)
        if len(packets) > rules["max_frames"]:
            raise Refused("too_long")
    times = [packet.pts for packet in packets if packet.pts is not None]
    if times and float((max(times) - min(times)) * stream.time_base) > rules["max_duration_s"]:
        raise Refused("too_long")
    return packets


def _last_frames(packets: list[Any], stream: Any, rules: dict[str, Any]) -> deque[Any]:
    """Decode from the last key frame that is far enough from the end, and keep what was asked for."""
    wanted = rules["last_frames"]
    enough = max(1, len(packets) - wanted - REORDERED_FRAMES)
    begin = max((i for i, packet in enumerate(packets[:enough]) if packet.is_keyframe), default=0)
    last: deque[Any] = deque(maxlen=wanted)
    for packet in (*packets[begin:], None):  # None: give out what is still held back
        for frame in stream.codec_context.decode(packet):
            _check_size(frame.height, frame.width, rules)
            last.append(frame)
    if len(last) < wanted:
        raise Refused("too_short")
    shown = {(frame.height, frame.width, frame.rotation) for frame in last}  # each frame may bring its own rotation
    if any(frame.is_corrupt for frame in last) or len(shown) > 1:
        raise Refused("damaged")
    return last


def _take_as_rgb(frames: deque[Any]) -> Iterator[Any]:
    """Each frame as it is shown, taken off `frames`: as RGB they are twice as large, too much for all at once."""
    from av.video.reformatter import VideoReformatter

    converter = VideoReformatter()
    while frames:
        yield _frame_to_rgb(converter, frames.popleft())


def _frame_to_rgb(converter: Any, frame: Any) -> Any:
    from PIL import Image

    plane = converter.reformat(frame, format="rgb24", threads=1).planes[0]
    rgb = Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", plane.line_size, 1)
    return rgb.rotate(frame.rotation, expand=True) if frame.rotation % 360 else rgb.copy()


def take_limits(memory_bytes: int, cpu_s: int, wall_s: float, result_bytes: int) -> None:
    """Bound this process. The alarm ends it also when the parent is gone."""
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (result_bytes, result_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(orders: int, paths: list[str]) -> None:
    """Wait for the order in descriptor `orders`, then decode stdin to stdout. `paths`: where Pillow and PyAV lie.

    An order is a line of JSON: the file's `form`, a key of MODULES; `rules`, those of `decode_picture` or
    `decode_clip`; `limits`, those of `take_limits`. If there is none, whoever should have given it is gone.
    """
    sys.path[:0] = paths
    for form in PICTURES:
        import_for(form)
    with open(orders, "rb") as file:
        line = file.readline()  # and not to the end, which a process forked from the worker would keep open
    if not line:
        return
    order = json.loads(line)
    take_limits(**order["limits"])
    form = order["form"]
    import_for(form)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # stdin, stdout, stderr: no further file, no socket
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process and no thread either, unless root
    warnings.simplefilter("ignore")
    decode = decode_picture if form in PICTURES else decode_clip
    try:
        decoded = decode(sys.stdin.buffer.read(), form, order["rules"])
    except Refused as refusal:
        sys.stdout.write(json.dumps({"refused": refusal.reason}) + "\n")
    else:
        head = {name: getattr(decoded, name) for name in ("frames", "height", "width", "fps")}
        sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
        sys.stdout.buffer.writelines(decoded.pixels)
    sys.stdout.flush()
    os._exit(0)  # at once: nothing here needs tidying up


def import_for(form: str) -> None:
    """All that decoding the format needs, or the end of this process."""
    try:
        for module in MODULES[form]:
            importlib.import_module(module)
    except ImportError:
        sys.excepthook(*sys.exc_info())
        os._exit(IMPORTS_FAILED)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
