"""`svi_endframe`: a clip, or a chain of clips, from a start picture to an end picture."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag

from schemas import svi_rules
from schemas.errors import Problem
from schemas.fields import (
    ChainFrames,
    Entries,
    Fps,
    Guidance,
    Latent,
    Media,
    Overlap,
    Private,
    Resolution,
    Seed,
    Source,
    Strengths,
    Text,
    Word,
    side_problems,
)
from schemas.request import Request, Rule
from schemas.svi_rules import CLIP_FRAMES, MAX_CLIPS, MAX_STEPS
from schemas.words import shown

Layout = Literal["svi", "svi_latent", "svi_upstream", "svi_pixel4", "flf", "kijai_end"]
ModelType = Literal["wan_2_2_i2v_lightning_svi_3_3", "wan_2_2_i2v_lightning_svi_endframe"]
MIN_SHIFT = 0.01  # far below it the grid's first step is a division by nearly zero
PADDING = "svi_pad_empty_frames_with_anchor"


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Several = Annotated[tuple[Source, ...], Entries(9)]
StartPictures = Annotated[
    Annotated[Source, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_one_or_several)
]
Prompts = Annotated[tuple[Text, ...], Entries(MAX_CLIPS)]
Anchor = Annotated[tuple[Source, ...], Entries(1)]
ExpertSteps = Annotated[int, Field(ge=1, le=MAX_STEPS - 1)]


class SviEndframeRequest(Request):
    """Wan2.2-I2V-A14B with SVI 2.0 Pro and LightX2V: from picture to picture, at any length."""

    RULES: ClassVar[tuple[Rule, ...]] = svi_rules.RULES
    ALIASES: ClassVar[Mapping[str, str]] = {
        "num_frames": "video_length",
        "lora_multipliers": "loras_multipliers",
        "guidance_scale_2": "guidance2_scale",
        "svi_empty_frames_mode": "empty_frames",
    }

    mode: Literal["svi_endframe"] = Field("svi_endframe", description="From picture to picture.")
    model_type: ModelType = Field(
        "wan_2_2_i2v_lightning_svi_3_3",
        description="The profile. `..._svi_3_3` means layout `svi_latent`, `..._svi_endframe` layout `flf`.",
    )
    prompt: Annotated[Text, Private()] = Field("", description="What happens, in every clip.")
    prompts: Annotated[Prompts | None, Private()] = Field(
        None,
        description="A prompt for each clip, in place of `prompt`. The last one holds for further clips.",
    )
    negative_prompt: Annotated[Text | None, Private()] = Field(
        None, description="What to keep out. null: the profile's own. Without effect where guidance is off."
    )
    image_start: Annotated[StartPictures | None, Media("picture")] = Field(
        None,
        description="The first frame, or a list of up to 9 for layouts that take several: URL, data URI or "
        "base64 of a PNG, JPEG or WebP. null: the picture in `image_refs`.",
    )
    image_end: Annotated[Source | None, Media("picture")] = Field(
        None, description="The last frame. Every layout but `svi` needs it."
    )
    image_refs: Annotated[Anchor | None, Media("picture")] = Field(
        None,
        description="A list with one picture, the anchor: the same in all clips of a chain. null: the start.",
    )
    prefix_video: Annotated[Source | None, Media("video")] = Field(
        None, description="A video to go on from, of at least 9 frames: URL, data URI or base64."
    )
    video_prompt_type: Word | None = Field(None, description="Accepted and without effect: `image_refs` always counts.")
    svi2pro: bool | None = Field(
        None, description="true: layout `svi_latent`; false: layout `flf`. null: as `model_type` says."
    )
    layout: Layout | None = Field(
        None, description="How the pictures enter the condition, see docs/svi.md. null: as `svi2pro` says."
    )
    video_length: ChainFrames = Field(
        81,
        description="Frames of the whole video, 4k + 1; beyond 81 it is a chain of clips. With `state` or "
        "`prefix_video` the frames that repeat what was before are counted, and not returned.",
    )
    segments: int | None = Field(
        None,
        ge=1,
        le=MAX_CLIPS,
        description="Number of clips. With `video_length` it divides that, alone it means clips of 81 "
        "frames; null: the fewest possible.",
    )
    overlap: Overlap = Field(
        4,
        description="Frames that two clips share, 4 for each latent handed over. One more, the anchor's, is "
        "dropped at each seam.",
    )
    resolution: Resolution | None = Field(
        None,
        description='Width x height such as "832x480": multiples of 16 from 32 to 1280. null: from the start '
        "picture's aspect, area at most 480 x 832.",
    )
    fps: Fps = Field(16, description="Frames a second of the file; the model was trained on 16.")
    frame_policy: Literal["exact", "window"] = Field(
        "exact",
        description="`exact` returns `video_length` frames. `window` returns what the layout's first "
        "implementation did: 78 for 81 in `svi_latent`.",
    )
    lock_end: bool | None = Field(
        None, description="The last frame is exactly the decoded end picture. null: where the layout can."
    )
    empty_frames: Literal["zeros", "anchor", "noise"] = Field(
        "zeros", description="What stands between start and end in the condition; the mask stays the same."
    )
    num_inference_steps: Annotated[int, Field(ge=2, le=MAX_STEPS)] | None = Field(
        None, description="Steps of both experts together. null: the profile's 6."
    )
    guidance_scale: Guidance | None = Field(
        None, description="Guidance of the high-noise expert; 1 or less is off. null: the profile's."
    )
    guidance2_scale: Guidance | None = Field(
        None, description="Guidance of the low-noise expert; 1 or less is off. null: the profile's 1."
    )
    flow_shift: float | None = Field(
        None, ge=MIN_SHIFT, le=100, description="Shift of the noise grid. null: the profile's 5."
    )
    switch_threshold: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="The low-noise expert takes over at the first timestep at or below this. null: the profile's 883.",
    )
    high_steps: ExpertSteps | None = Field(
        None, description="Steps of the high-noise expert; with `low_steps`, in place of `switch_threshold`."
    )
    low_steps: ExpertSteps | None = Field(None, description="Steps of the low-noise expert; with `high_steps`.")
    loras_multipliers: Strengths | None = Field(
        None,
        description='Strength of each LoRA in each phase, "1;0 0;1 1.2;0 0;1" or a list: SVI high, SVI low, '
        "LightX2V high, LightX2V low. null: as baked, which is faster.",
    )
    seed: Seed | None = Field(
        None,
        description="null or -1: that of `state`, else one is drawn. Clip i of a chain, counted from 0, uses "
        "seed + 42 i.",
    )
    return_state: bool = Field(False, description="Return `state`, for a later request to go on from.")
    state: Annotated[Latent | None, Media("latent")] = Field(
        None, description="The `state` of an earlier response: this video goes on where that one ended."
    )

    @classmethod
    def names(cls) -> list[str]:
        return [*super().names(), "width", "height", PADDING]

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        found, renamed, problems = super().canonical(values)
        return found, renamed, [*problems, *_size_alias(found), *_padding_alias(found)]

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None: from the start picture."""
        if self.resolution is None:
            return None
        width, height = self.resolution.split("x")
        return int(height), int(width)

    @property
    def chosen_layout(self) -> str:
        """The layout that this request means."""
        if self.layout is not None:
            return self.layout
        if self.svi2pro is not None:
            return "svi_latent" if self.svi2pro else "flf"
        return svi_rules.DEFAULT_LAYOUTS[self.model_type]

    @property
    def total_frames(self) -> int:
        """Frames of the whole video, repeated leading ones included."""
        if self.segments is not None and not self.given("video_length"):
            return CLIP_FRAMES + (CLIP_FRAMES - 1 - self.overlap) * (self.segments - 1)
        return self.video_length

    @property
    def possible_clips(self) -> tuple[int, int]:
        """The fewest and the most clips that `total_frames` can be divided into."""
        repeated = 1 + self.overlap
        fewest = 1 + -(-max(0, self.total_frames - CLIP_FRAMES) // (CLIP_FRAMES - repeated))
        most = min(MAX_CLIPS, (self.total_frames - repeated) // 4)  # 4 new frames a clip at least
        return fewest, max(fewest, most)

    @property
    def clip_count(self) -> int:
        """Clips in this request."""
        return self.possible_clips[0] if self.segments is None else self.segments

    @property
    def clip_prompts(self) -> tuple[str, ...]:
        """A prompt for each clip."""
        prompts = self.prompts or (self.prompt,)
        return prompts + prompts[-1:] * (self.clip_count - len(prompts))

    @property
    def counted_steps(self) -> int | None:
        """Steps of both experts together, where `high_steps` and `low_steps` say so."""
        return None if self.high_steps is None or self.low_steps is None else self.high_steps + self.low_steps

    def warnings(self) -> list[str]:
        return svi_rules.svi_warnings(self)

    def explicit(self) -> dict[str, Any]:
        length = {"video_length": self.total_frames, "segments": self.clip_count}
        words = {"prompt": None} if self.prompts is not None else {}
        return {**super().explicit(), "layout": self.chosen_layout, **length, **words}

    def filled(self, values: Mapping[str, Any]) -> Self:
        if self.counted_steps is not None:  # the caller's own split stands in place of the profile's
            values = {**values, "num_inference_steps": self.counted_steps, "switch_threshold": None}
        return super().filled(values)


def _size_alias(found: dict[str, Any]) -> list[Problem]:
    """`width` and `height` -> `resolution`, in place."""
    sides = {name: found.pop(name) for name in ("width", "height") if name in found}
    if "resolution" in found:
        return [Problem(name, "means the same as resolution, which is given too; keep one") for name in sides]
    if len(sides) == 1:
        return [Problem(name, "is half of a size; give width and height, or resolution") for name in sides]
    problems = [Problem(name, sentence) for name, sentence in side_problems(**sides).items()]
    if sides and not problems:
        found["resolution"] = f"{sides['width']}x{sides['height']}"
    return problems


def _padding_alias(found: dict[str, Any]) -> list[Problem]:
    """`svi_pad_empty_frames_with_anchor` -> `empty_frames`, in place."""
    if PADDING not in found:
        return []
    value = found.pop(PADDING)
    if "empty_frames" in found:
        return [Problem(PADDING, "means the same as empty_frames, which is given too; keep one")]
    if not isinstance(value, bool):
        return [Problem(PADDING, f"must be true or false, got {shown(value)}")]
    found["empty_frames"] = "anchor" if value else "zeros"
    return []
