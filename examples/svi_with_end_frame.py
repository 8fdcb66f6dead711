"""A video from one picture to another, or on from a video: one `svi_endframe` job, on this machine or on RunPod.

python examples/svi_with_end_frame.py --start a.png --end b.png --prompt "dusk falls over the lake"
python examples/svi_with_end_frame.py --start clip.mp4 --num-start-frames 9 --end b.png
RUNPOD_API_KEY=... python examples/svi_with_end_frame.py --start a.png --end b.png --endpoint abc123
"""

import argparse
import base64
import io
import json
import sys
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from engine.clips import clip_form, decode_clip  # noqa: E402 after the path is set
from engine.pictures import picture_form  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.settings import Settings  # noqa: E402
from examples.runpod_endpoint import Endpoint, EndpointFailed, Show  # noqa: E402
from handler import Worker, run  # noqa: E402
from model_handler import ModelHandler  # noqa: E402
from schemas.errors import InvalidInput, WorkerError  # noqa: E402
from schemas.input_schema import parse_request  # noqa: E402

PICTURES = ROOT / "examples" / "pictures"
SVI = {"model_type": "wan_2_2_i2v_lightning_svi_3_3"}
REGULAR = {"model_type": "wan_2_2_i2v_lightning_svi_endframe", "svi2pro": False}

MOTION_FRAMES = 9  # one motion latent and its run-up; from fewer frames the model cannot tell any motion
MOST_STARTS = 9  # pictures that `image_start` takes
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")

STARTS = """\
what --start becomes:
  a picture                             the first frame
  a video, fewer than 9 start frames    the oldest of them is the first frame: so few carry no motion into
                                        SVI's layouts
  a video, 9 start frames or more       prefix_video: the new video takes up the motion of the newest 9,
                                        and has 5 frames fewer than --frames
  a video, with --use-regular-i2v       each start frame, up to 9, is a frame of the result
An http(s) URL is handed on as it is; a file is read here and sent inside the request.
"""


class Unusable(Exception):
    """What is wrong with the options or with the answer, in a sentence for the person at the terminal."""


@dataclass
class Bar:
    """Progress on stderr: one line drawn over and over on a terminal, a line for each stage elsewhere."""

    stage: str = ""

    def show(self, update: Mapping[str, Any]) -> None:
        """Draw an update of the worker."""
        done = "#" * round(update["percent"] * 0.3)
        eta = "" if update["eta_s"] is None else f", {update['eta_s']:.0f} s to go"
        line = f"[{done:.<30}] {update['percent']:5.1f} % {update['stage']} {update['step']}/{update['total']}{eta}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif update["stage"] != self.stage:
            say(line)
        self.stage = update["stage"]

    def end(self) -> None:
        if self.stage and sys.stderr.isatty():
            print(file=sys.stderr)
        self.stage = ""


def request_for(options: argparse.Namespace) -> dict[str, Any]:
    """The request that the options mean. What they cannot reach is said on stderr."""
    request = {"mode": "svi_endframe", **(REGULAR if options.use_regular_i2v else SVI)}
    request |= start_fields(options.start, options.num_start_frames, options.use_regular_i2v)
    request["image_end"] = sent(options.end)
    if options.anchor is not None:
        request["image_refs"] = [sent(options.anchor)]
    request |= {"prompt": options.prompt, "video_length": options.frames}
    return request if options.seed is None else {**request, "seed": options.seed}


def start_fields(start: str, count: int, is_regular: bool) -> dict[str, Any]:
    """The field that carries `start`, see STARTS."""
    if is_url(start):
        is_video = urlsplit(start).path.lower().endswith(VIDEO_SUFFIXES)
    else:
        is_video = clip_form(read(start)) is not None
    if not is_video:
        return {"image_start": sent(start)}
    if is_regular:
        if count > MOST_STARTS:
            raise Unusable(f"--num-start-frames must be at most {MOST_STARTS} with --use-regular-i2v, got {count}")
        return {"image_start": last_frames(start, count)}
    if count >= MOTION_FRAMES:
        say(f"going on from the newest {MOTION_FRAMES} frames of {start}: the last 5 of them are not repeated")
        return {"prefix_video": sent(start)}
    say(
        f"{count} start frames carry no motion, that takes {MOTION_FRAMES}: the video starts on the oldest of them. "
        f"To go on from the motion: --num-start-frames {MOTION_FRAMES}"
    )
    return {"image_start": last_frames(start, count)[0]}


def last_frames(video: str, count: int) -> list[str]:
    """The last `count` frames of a video file as PNG, the oldest first."""
    if is_url(video):
        raise Unusable(f"single frames are taken from files only; download it, or --num-start-frames {MOTION_FRAMES}")
    if count < 1:
        raise Unusable(f"--num-start-frames must be at least 1, got {count}")
    pictures = []
    for frame in decode_clip(read(video), count).frames:
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        pictures.append(data_uri(buffer.getvalue(), "image/png"))
    return pictures


def sent(source: str) -> str:
    """A picture or video as the request holds it: a URL as it is, a file's bytes as a data URI."""
    if is_url(source):
        return source
    data = read(source)
    if (picture := picture_form(data)) is not None:
        return data_uri(data, f"image/{picture.lower()}")
    if (video := clip_form(data)) is not None:
        return data_uri(data, "video/mp4" if video == "mov" else "video/webm")
    raise Unusable(f"{source} is no PNG, JPEG or WebP picture and no MP4, MOV, WebM or Matroska video")


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def read(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise Unusable(f"{source} cannot be read: {error.strerror}") from error


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def elided(value: Any) -> Any:
    """A request for people to read: media are named, not shown."""
    if isinstance(value, dict):
        return {name: elided(one) for name, one in value.items()}
    if isinstance(value, list):
        return [elided(one) for one in value]
    if isinstance(value, str) and value.startswith("data:"):
        media_type, _, body = value.removeprefix("data:").partition(";base64,")
        return f"<{media_type}, {len(base64.b64decode(body)):,} bytes>"
    return value


def run_here(request: dict[str, Any], folder: Path, show: Show) -> dict[str, Any]:
    """Run the job in this process, by the function that RunPod's loop calls too; the file lands in `folder`."""
    settings = replace(Settings.from_env(), output_dir=folder)
    worker = Worker(settings, ModelHandler(settings))
    progress = Progress(lambda update: show(asdict(update)))
    return run(request, job_id=uuid.uuid4().hex, worker=worker, progress=progress)


def fetched(response: Mapping[str, Any], folder: Path) -> str:
    """Where the video is on this machine, after a download if it is at a URL or in the response itself."""
    url: str = response["video_url"]
    if not (is_url(url) or url.startswith("data:")):
        return url
    try:
        with urllib.request.urlopen(url, timeout=60) as source:
            data = source.read()
    except (OSError, HTTPException) as error:
        raise Unusable(f"the video is made and could not be downloaded ({error}): {url}") from error
    if len(data) != response["size_bytes"]:
        raise Unusable(f"the video came with {len(data):,} of {response['size_bytes']:,} bytes: {url}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"svi-{response['seed']}-{uuid.uuid4().hex[:8]}.mp4"
    path.write_bytes(data)
    return str(path)


def make(options: argparse.Namespace, bar: Bar) -> None:
    """Run the job, or only show it, and print where the video is."""
    request = request_for(options)
    warnings = parse_request(request).warnings()  # refused here, before an upload and a wait
    if options.dry_run:
        print(json.dumps(elided(request), indent=2))
    else:
        folder = options.output_dir.resolve()
        if options.endpoint is None:
            response = run_here(request, folder, bar.show)
        else:
            response = Endpoint.named(options.endpoint).run(request, options.timeout_s, bar.show)
        bar.end()
        say(f"{response['num_frames']} frames of {response['width']}x{response['height']}, seed {response['seed']}")
        warnings = response["warnings"]
        print(fetched(response, folder))
    for warning in warnings:
        say(f"note: {warning}")


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The only line on stdout is where the video is. Returns the exit status."""
    options = parser().parse_args(argv)
    bar = Bar()
    try:
        make(options, bar)
        return 0
    except InvalidInput as error:
        problems = [str(problem) for problem in error.problems]
    except (Unusable, EndpointFailed, WorkerError) as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
    finally:
        bar.end()
    for problem in problems:
        say(f"error: {problem}")
    return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, epilog=STARTS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--start", default=str(PICTURES / "start.jpg"), help="picture or video to begin with: a file or a URL")
    add("--end", default=str(PICTURES / "end.jpg"), help="picture to end on: a file or a URL")
    add("--anchor", help="picture that all clips keep to, and that SVI starts on (default: the first start frame)")
    add("--prompt", default="A smooth cinematic transition between scenes", help="what happens in between")
    add("--frames", type=int, default=81, help="frames of the video, 4k + 1; over 81 it is a chain (default: 81)")
    add("--num-start-frames", type=int, default=3, help="frames to take from the end of a start video (default: 3)")
    add("--use-regular-i2v", action="store_true", help="plain image-to-video's layout flf, not SVI's")
    add("--seed", type=int, help="default: drawn")
    add("--output-dir", type=Path, default=Path("output"), help="folder of the MP4 (default: output)")
    add("--dry-run", action="store_true", help="print the request without its media; load and send nothing")
    add("--endpoint", help="ID or URL of a RunPod endpoint, its key in RUNPOD_API_KEY (default: run on this machine)")
    add("--timeout-s", type=int, default=1800, help="RunPod ends the job after so many seconds (default: 1800)")
    return made


if __name__ == "__main__":
    sys.exit(main())
