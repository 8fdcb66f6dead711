"""`image`: the request of RunPod's SDXL worker, field for field, and what it could not ask for."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from schemas.fields import MAX_MEDIA, Guidance, ImageSide, Media, Private, Seed, Source, Steps, Text
from schemas.request import Request, Rule

Scheduler = Literal["PNDM", "KLMS", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"]
BASE_ONLY = ("height", "width", "scheduler", "num_inference_steps", "guidance_scale", "high_noise_frac")


def _none_if_empty(value: object) -> object:
    return None if isinstance(value, str) and not value else value


def _needs_words_or_picture(request: "ImageRequest") -> str | None:
    if request.prompt is None and not request.image_url:
        return "is missing; give a prompt, an image_url or both"
    return None


def _refiner_has_a_step(request: "ImageRequest") -> str | None:
    steps = request.refiner_inference_steps
    if request.splits or int(steps * request.strength) >= 1:
        return None
    return (
        f"must leave the refiner a step, got {request.strength:g} of {steps} refiner_inference_steps; "
        "their product must be 1 or more"
    )


SourceOrEmpty = Annotated[
    Source | None,
    BeforeValidator(_none_if_empty),
    WithJsonSchema({"anyOf": [{"type": "string", "maxLength": MAX_MEDIA}, {"type": "null"}]}),
]


class ImageRequest(Request):
    """SDXL base and refiner: words to pictures, or a picture changed by the refiner alone."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("prompt", "image_url"), _needs_words_or_picture),
        Rule(("strength", "refiner_inference_steps", "high_noise_frac", "image_url"), _refiner_has_a_step),
    )

    mode: Literal["image"] = Field("image", description="Also the mode when none is given.")
    prompt: Annotated[Text | None, Private()] = Field(
        None, description="What to show. Needed unless `image_url` is given."
    )
    negative_prompt: Annotated[Text | None, Private()] = Field(
        None, description="What to keep out; base and refiner both get it."
    )
    image_url: Annotated[SourceOrEmpty, Media("picture")] = Field(
        None,
        description="A picture to change: URL, data URI or base64 of a PNG, JPEG or WebP. Only the refiner "
        "runs, at the picture's own size, scaled down to multiples of 8. An empty string means none.",
    )
    height: ImageSide = Field(1024, description="Pixels. Without effect with `image_url`.")
    width: ImageSide = Field(1024, description="Pixels. Without effect with `image_url`.")
    seed: Seed | None = Field(None, description="null or -1 draws one; the response tells which.")
    scheduler: Scheduler = Field("DDIM", description="The base's scheduler; the refiner keeps its own.")
    num_inference_steps: Steps = Field(25, description="Steps of the base.")
    refiner_inference_steps: Steps = Field(
        50, description="Steps of the refiner's whole schedule, of which the share `strength` is run."
    )
    guidance_scale: Guidance = Field(7.5, description="Classifier-free guidance of the base.")
    refiner_guidance_scale: Guidance = Field(5.0, description="Classifier-free guidance of the refiner.")
    strength: float = Field(
        0.3, ge=0, le=1, description="How much the refiner changes. Without effect with `high_noise_frac`."
    )
    num_images: int = Field(1, ge=1, le=4, description="Pictures from one request.")
    high_noise_frac: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the noise that the base removes before the refiner takes over in mid-schedule. "
        "null, 0 or 1: the base finishes, and the refiner adds noise again by `strength`.",
    )
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="File type of the pictures.")
    quality: int = Field(90, ge=1, le=100, description="Of jpeg and webp.")

    @property
    def splits(self) -> bool:
        """Whether base and refiner share one schedule instead of running one after the other."""
        return not self.image_url and self.high_noise_frac is not None and 0 < self.high_noise_frac < 1

    @property
    def _is_unguided(self) -> bool:
        """Whether no model that runs reads the negative prompt."""
        scales = [self.refiner_guidance_scale, *([] if self.image_url is not None else [self.guidance_scale])]
        return max(scales) <= 1

    def warnings(self) -> list[str]:
        notes = []
        if self.image_url is not None:
            notes += [
                f"{name} has no effect with image_url: only the refiner runs, at the picture's size"
                for name in self.changed(*BASE_ONLY)
            ]
        elif self.splits:
            notes += [
                f"{name} has no effect with high_noise_frac: the refiner goes on where the base stopped"
                for name in self.changed("strength")
            ]
        elif self.high_noise_frac is not None:
            notes.append(f"high_noise_frac {self.high_noise_frac:g} splits nothing: the base runs all its steps")
        if self.negative_prompt is not None and self._is_unguided:
            notes.append("negative_prompt has no effect where guidance is 1 or less in every model that runs")
        if self.output_format == "png":
            notes += [f"{name} has no effect on png" for name in self.changed("quality")]
        return notes
