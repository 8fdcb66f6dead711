"""The wire contract of responses: what a finished job answers. A failed one answers by schemas.errors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from schemas.effective import as_run, effective
from schemas.request import Request
from schemas.svi_schema import SviEndframeRequest
from schemas.video_schema import VideoRequest

WORKER_VERSION = "0.1.0"


class Response(BaseModel):
    """What every mode answers. Sizes and counts were measured on the finished file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    mode: str = Field(description="The mode that ran.")
    profile: str = Field(description="The model that ran; `tiny/...` is a stand-in with random weights.")
    seed: int = Field(description="The seed, drawn or given.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    size_bytes: int = Field(description="Of all files together.")
    content_type: str = Field(description="Media type of the files.")
    effective: dict[str, Any] = Field(
        description="The request as it ran. With the media in place of their hashes it makes the same again."
    )
    warnings: list[str] = Field(description="What had no effect, or may surprise.")
    timings_s: dict[str, float] = Field(
        description="Seconds by stage; the stages follow one another. A job that loads a model says more of it: "
        "`load_import` is the part of `load` in which libraries were imported, `load_wait` the part of `encode` and "
        "`denoise` in which the job stood still for weights, `load_make_room` the part of `load` in which other models "
        "left the card. `load_read` (from the first byte read to the last) runs beside the stages and is in no sum, "
        "nor is `load_to_card` (the bus at work within that); for a model that comes back from host memory "
        "`load_to_card` is part of `load`."
    )
    worker_version: str = Field(description="Version of this worker.")


class ImageResponse(Response):
    """What `image` answers."""

    mode: Literal["image"] = Field(description="The mode that ran.")
    image_url: str = Field(description="The first picture: a URL, a path or a data URI.")
    images: list[str] = Field(description="All pictures.")


class VideoResponse(Response):
    """What `video` and `svi_endframe` answer."""

    mode: Literal["video", "svi_endframe"] = Field(description="The mode that ran.")
    video_url: str = Field(description="The MP4: a URL, a path or a data URI.")
    num_frames: int = Field(description="Frames in the file.")
    frames_requested: int = Field(
        description="Frames asked for. Those that repeat what `state` or `prefix_video` ended on, and "
        "those that `frame_policy` window leaves out, are not in the file."
    )
    fps: float = Field(description="Frames a second of the file.")
    duration_s: float = Field(description="Seconds.")
    state: str | None = Field(None, description="With `return_state`: what a later request goes on from.")


class File(Protocol):
    """The facts of a finished file that a response repeats; engine.outputs.MediaFile has them."""

    @property
    def content_type(self) -> str: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def duration_s(self) -> float | None: ...


class Made(Protocol):
    """What a job left behind; model_handler.Generated is one."""

    @property
    def files(self) -> Sequence[File]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def state(self) -> str | None: ...


class Delivered(Protocol):
    """Where a file went; engine.storage.Delivered is one."""

    @property
    def url(self) -> str: ...


class Task(Protocol):
    """What was run; engine.backends.Task is one."""

    @property
    def profile(self) -> Any: ...
    @property
    def request(self) -> Request: ...
    @property
    def seed(self) -> int: ...


def success(
    task: Task,
    made: Made,
    delivered: Sequence[Delivered],
    hashes: Mapping[str, str | Sequence[str]],
    timings_s: Mapping[str, float],
) -> dict[str, Any]:
    """The response of a finished job, as plain JSON.

    `delivered`: one for each file. `hashes`: of each picture, video and latent given, by field.

    Raises:
        ValueError: something in it is no JSON, such as a NaN: better here than in the client.
    """
    first = made.files[0]
    ran = as_run(task.request, task.profile, first.height, first.width)
    facts: dict[str, Any] = {
        "mode": ran.mode,
        "profile": task.profile.name,
        "seed": task.seed,
        "width": first.width,
        "height": first.height,
        "size_bytes": sum(file.size_bytes for file in made.files),
        "content_type": first.content_type,
        "effective": effective(ran, task.seed, hashes),
        "warnings": [*ran.warnings(), *made.notes],
        "timings_s": dict(timings_s),
        "worker_version": WORKER_VERSION,
    }
    urls = [place.url for place in delivered]
    if isinstance(ran, VideoRequest | SviEndframeRequest):
        facts |= {"num_frames": first.frames, "frames_requested": ran.total_frames}
        facts |= {"fps": first.fps, "duration_s": first.duration_s, "state": made.state}
        response: Response = VideoResponse(**facts, video_url=urls[0])
    else:
        response = ImageResponse(**facts, image_url=urls[0], images=urls)
    answer = response.model_dump(exclude_none=True)
    json.dumps(answer, allow_nan=False).encode()
    return answer
