"""`video`: one picture and some words to a clip, by Wan2.1."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from schemas.fields import ClipFrames, Fps, Guidance, Media, Private, Seed, Source, Steps, Text, VideoSide
from schemas.request import Request, Rule


def _both_sides_or_none(request: "VideoRequest") -> str | None:
    if (request.height is None) == (request.width is None):
        return None
    return "must come with width; give both, or neither to follow the picture's aspect"


class VideoRequest(Request):
    """Wan2.1-I2V-14B-480P: the picture moves."""

    RULES: ClassVar[tuple[Rule, ...]] = (Rule(("height", "width"), _both_sides_or_none),)

    mode: Literal["video"] = Field("video", description="`video_generation` and `i2v` mean the same.")
    image_url: Annotated[Source, Media("picture")] = Field(
        description="The first frame: URL, data URI or base64 of a PNG, JPEG or WebP."
    )
    prompt: Annotated[Text, Private()] = Field("", description="What happens in the clip.")
    negative_prompt: Annotated[Text | None, Private()] = Field(None, description="What to keep out.")
    num_frames: ClipFrames = Field(81, description="Frames, 4k + 1; the model was trained on 81.")
    fps: Fps = Field(16, description="Frames a second of the file; the model was trained on 16.")
    height: VideoSide | None = Field(
        None, description="Pixels. null: from the picture's aspect, area at most 480 x 832."
    )
    width: VideoSide | None = Field(None, description="Pixels; together with `height` or not at all.")
    num_inference_steps: Steps = Field(40, description="Steps of the sampler.")
    guidance_scale: Guidance = Field(
        5.0, description="Classifier-free guidance; at 1 or less it is off, and a step takes half the time."
    )
    seed: Seed | None = Field(None, description="null or -1 draws one; the response tells which.")

    @property
    def total_frames(self) -> int:
        """Frames of the whole video."""
        return self.num_frames

    def warnings(self) -> list[str]:
        notes = []
        if not self.prompt:
            notes.append("prompt is empty: only the picture leads the clip")
        if self.guidance_scale <= 1 and self.negative_prompt is not None:
            notes.append("negative_prompt has no effect at guidance_scale 1 or less")
        return notes
