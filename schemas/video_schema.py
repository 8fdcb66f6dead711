"""`video`: one picture and some words to a clip, by Wan2.1 in many steps or by a distilled Wan2.2 in a few."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from schemas.fields import ClipFrames, Fps, Guidance, Media, Private, Seed, Source, Steps, Text, VideoSide
from schemas.request import Request, Rule

ModelType = Literal["wan21_i2v_480p", "wan22_i2v_lightning"]
WAN21, LIGHTNING = "wan21_i2v_480p", "wan22_i2v_lightning"

LIGHTNING_STEPS = (4, 8)
"""The fewest and the most: what the model was distilled for, and twice that."""

OWN_DEFAULTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {LIGHTNING: MappingProxyType({"num_inference_steps": 4, "guidance_scale": 1.0})}
)
"""Profile -> what it says in the place of the mode's defaults; a test compares both with the engine's rows."""


def _both_sides_or_none(request: "VideoRequest") -> str | None:
    if (request.height is None) == (request.width is None):
        return None
    return "must come with width; give both, or neither to follow the picture's aspect"


def _few_steps(request: "VideoRequest") -> str | None:
    least, most = LIGHTNING_STEPS
    steps = request.num_inference_steps
    if not _asks_lightning_for(request, "num_inference_steps") or least <= steps <= most:
        return None
    return f"must be {least} to {most} with model_type {LIGHTNING}, got {steps}: it is distilled for few steps"


def _no_guidance(request: "VideoRequest") -> str | None:
    scale = request.guidance_scale
    if not _asks_lightning_for(request, "guidance_scale") or scale == 1:
        return None
    return f"must be 1 with model_type {LIGHTNING}, got {scale:g}: guidance is distilled into it; leave it out"


def _asks_lightning_for(request: "VideoRequest", field: str) -> bool:
    """Whether the caller gave the field: in a request with wrong fields the others hold the mode's defaults."""
    return request.model_type == LIGHTNING and bool(request.given(field))


class VideoRequest(Request):
    """The picture moves: Wan2.1-I2V-14B-480P, or a distilled Wan2.2-I2V-A14B, far faster and lossy."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("height", "width"), _both_sides_or_none),
        Rule(("num_inference_steps", "model_type"), _few_steps),
        Rule(("guidance_scale", "model_type"), _no_guidance),
    )

    mode: Literal["video"] = Field("video", description="`video_generation` and `i2v` mean the same.")
    model_type: ModelType = Field(
        "wan21_i2v_480p",
        description="The profile. `wan22_i2v_lightning` needs 4 forwards in place of 80 and is lossy: it is another, "
        "distilled model with less motion, not the same video sooner.",
    )
    image_url: Annotated[Source, Media("picture")] = Field(
        description="The first frame: URL, data URI or base64 of a PNG, JPEG or WebP."
    )
    prompt: Annotated[Text, Private()] = Field("", description="What happens in the clip.")
    negative_prompt: Annotated[Text | None, Private()] = Field(
        None, description="What to keep out. Without effect where guidance is off."
    )
    num_frames: ClipFrames = Field(81, description="Frames, 4k + 1; the models were trained on 81.")
    fps: Fps = Field(16, description="Frames a second of the file; the models were trained on 16.")
    height: VideoSide | None = Field(
        None, description="Pixels. null: from the picture's aspect, area at most 480 x 832."
    )
    width: VideoSide | None = Field(None, description="Pixels; together with `height` or not at all.")
    num_inference_steps: Steps = Field(
        40, description="Steps of the sampler. With `wan22_i2v_lightning` 4 to 8, by default 4."
    )
    guidance_scale: Guidance = Field(
        5.0,
        description="Classifier-free guidance; at 1 or less it is off, and a step takes half the time. With "
        "`wan22_i2v_lightning` always 1.",
    )
    seed: Seed | None = Field(None, description="null or -1 draws one; the response tells which.")

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_of_the_profile(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            return validate(values)
        own = OWN_DEFAULTS.get(values["model_type"], {})
        open_ones = {name: default for name, default in own.items() if values.get(name) is None}
        request = validate({**values, **open_ones})
        request.model_fields_set.difference_update(open_ones)  # the caller did not give them
        return request

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
