"""SDXL: base and refiner as one hand-over in latent space, or the refiner alone on a given picture.

Both pipelines are put together anew for each task from the same resident parts. That costs nothing (no weight is
touched) and makes it impossible that one request's scheduler is seen by the next. On a card the UNets' forwards are
recorded and replayed within a job, see engine.replay.
"""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import scheduling_lms_discrete
from PIL import Image

from engine.arrival import Arrival
from engine.backends import Task
from engine.card import Card
from engine.frames import image_to_uint8
from engine.loading import Loader
from engine.outputs import Images
from engine.profiles import Profile
from engine.progress import Progress
from engine.remembered import Remembered
from engine.replay import replayed
from engine.standing import Standing
from engine.tiled_decode import Tiling, decode_tiled
from engine.weights import Parts
from schemas.image_schema import ImageRequest


class Klms(scheduling_lms_discrete.LMSDiscreteScheduler):
    """Diffusers' own, which takes scipy when it integrates: told that there is none, its module has not."""

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        scheduling_lms_discrete.integrate = import_module("scipy.integrate")
        return super().get_lms_coefficient(order, t, current_order)


SCHEDULERS = {
    "PNDM": PNDMScheduler,
    "KLMS": Klms,
    "DDIM": DDIMScheduler,
    "K_EULER": EulerDiscreteScheduler,
    "K_EULER_ANCESTRAL": EulerAncestralDiscreteScheduler,
    "DPMSolverMultistep": DPMSolverMultistepScheduler,
    "DPMSolverSinglestep": DPMSolverSinglestepScheduler,
}
"""worker-sdxl's names. They choose the base's scheduler; the refiner keeps the one it was published with."""

SIZE_MULTIPLE = 8  # the VAE's stride: diffusers scales a picture to change down to it

TILING = Tiling(side=64, overlap=16)  # 512 pixels: the VAE's norms look at the whole tile, and a small one pales

EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""What `encode_prompt` returns, by the names under which a pipeline takes it."""

COMPONENTS = (
    "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "unet", "scheduler",
    "refiner_unet", "refiner_scheduler",
)  # fmt: skip


class Sdxl:
    """Base and refiner, resident; the VAE and the second text encoder are shared between them."""

    def __init__(self, profile: Profile, parts: Parts, card: Card) -> None:
        self.profile = profile
        self._device = torch.device(card.device)
        self._replays = card.levers.compile and self._device.type == "cuda"
        self._parts = _loaded(parts, card.device)
        modules = [part for part in self._parts.values() if isinstance(part, torch.nn.Module)]
        self.weights = Standing(modules, card.device)
        self._remembered: Remembered[Hashable, tuple[torch.Tensor | None, ...]] = Remembered()

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Images:
        request = cast(ImageRequest, task.request)  # the profile's modes hold it
        generator = torch.Generator("cpu").manual_seed(task.seed)
        picture = task.pictures.get("image_url")
        base = None if picture is not None else self._base(request.scheduler)
        refiner = self._refiner()
        with progress.stage("encode"):
            base_words = {} if base is None else self._words("base", base, request, request.guidance_scale)
            refiner_words = self._words("refiner", refiner, request, request.refiner_guidance_scale)
        with progress.stage("denoise", self._steps(request, refiner.scheduler)) as step:

            def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                step()
                return tensors

            image = picture if base is None else self._latents(base, base_words, request, generator, after_step)
            with self._quickly("refiner_unet"):
                latents = refiner(
                    image=image,
                    num_inference_steps=request.refiner_inference_steps,
                    strength=request.strength,
                    denoising_start=request.high_noise_frac if request.splits else None,
                    guidance_scale=request.refiner_guidance_scale,
                    num_images_per_prompt=request.num_images,
                    generator=generator,
                    output_type="latent",
                    callback_on_step_end=after_step,
                    **refiner_words,
                ).images
        with progress.stage("decode"):
            # All at once, as diffusers does: one by one the convolutions may round otherwise.
            decoded = self._decode_tiled(latents) if task.saves_memory else self._decode(latents)
            pictures = [image_to_uint8(image) for image in decoded.split(1)]
        return Images(pictures, (*self._unread(request), *_scaled(picture, pictures[0])))

    def finish(self) -> None:
        """Nothing ever does: forwards are recorded within the job."""

    def unload(self) -> None:
        self.weights.unload()
        self._parts.clear()
        del self._remembered

    def _base(self, scheduler: str) -> Any:
        parts = self._parts
        return _quiet(
            StableDiffusionXLPipeline(
                vae=parts["vae"],
                text_encoder=parts["text_encoder"],
                text_encoder_2=parts["text_encoder_2"],
                tokenizer=parts["tokenizer"],
                tokenizer_2=parts["tokenizer_2"],
                unet=parts["unet"],
                scheduler=SCHEDULERS[scheduler].from_config(parts["scheduler"].config),
                add_watermarker=False,
            )
        )

    def _refiner(self) -> Any:
        parts = self._parts
        return _quiet(
            StableDiffusionXLImg2ImgPipeline(
                vae=parts["vae"],
                text_encoder=None,
                text_encoder_2=parts["text_encoder_2"],
                tokenizer=None,
                tokenizer_2=parts["tokenizer_2"],
                unet=parts["refiner_unet"],
                scheduler=type(parts["refiner_scheduler"]).from_config(parts["refiner_scheduler"].config),
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
                add_watermarker=False,
            )
        )

    def _words(
        self, model: str, pipeline: Any, request: ImageRequest, guidance_scale: float
    ) -> dict[str, torch.Tensor | None]:
        """The request's words as the pipeline embeds them itself; words that it has embedded are remembered.

        A `negative_prompt` that is None and one that is empty are two: the base has zeros for the first.
        """
        is_guided = guidance_scale > 1
        prompt, negative = request.prompt or "", request.negative_prompt if is_guided else None

        def compute() -> tuple[torch.Tensor | None, ...]:
            made = pipeline.encode_prompt(
                prompt, negative_prompt=negative, device=self._device, do_classifier_free_guidance=is_guided
            )
            return tuple(one if one is None else one.cpu() for one in made)

        made = self._remembered.get((model, prompt, negative, is_guided), compute)
        return {name: one if one is None else one.to(self._device) for name, one in zip(EMBEDS, made, strict=True)}

    def _unread(self, request: ImageRequest) -> Iterator[str]:
        """What of the words is longer than CLIP reads."""
        tokenizer = self._parts["tokenizer_2"]
        for name, words in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
            tokens = len(tokenizer(words or "", verbose=False).input_ids)
            if tokens > tokenizer.model_max_length:
                yield f"the {name} is {tokens} tokens long; the model reads the first {tokenizer.model_max_length}"

    def _latents(
        self,
        base: Any,
        words: dict[str, torch.Tensor | None],
        request: ImageRequest,
        generator: torch.Generator,
        after_step: Any,
    ) -> torch.Tensor:
        with self._quickly("unet"):
            latents: torch.Tensor = base(
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                denoising_end=request.high_noise_frac if request.splits else None,
                num_images_per_prompt=request.num_images,
                generator=generator,
                output_type="latent",
                callback_on_step_end=after_step,
                **words,
            ).images
        return latents

    def _quickly(self, unet: str) -> AbstractContextManager[Any]:
        """Forwards of one shape without waiting for Python; off a card as they are."""
        return replayed(self._parts[unet]) if self._replays else nullcontext()

    def _steps(self, request: ImageRequest, refiner_scheduler: Any) -> int:
        """Steps of both models together, counted as the pipelines count them."""
        refiner = type(refiner_scheduler).from_config(refiner_scheduler.config)
        refiner.set_timesteps(request.refiner_inference_steps)
        refined = min(int(request.refiner_inference_steps * request.strength), request.refiner_inference_steps)
        if request.image_url is not None:
            return refined
        base = SCHEDULERS[request.scheduler].from_config(self._parts["scheduler"].config)
        base.set_timesteps(request.num_inference_steps)
        if not request.splits:
            return len(base.timesteps) + refined
        train_steps = base.config.num_train_timesteps
        cutoff = round(train_steps - request.high_noise_frac * train_steps)
        return int((base.timesteps >= cutoff).sum() + (refiner.timesteps < cutoff).sum())

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, 4, h, w) latents -> (n, 3, H, W) in [-1, 1]."""
        vae = self._parts["vae"]
        decoded: torch.Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return decoded

    def _decode_tiled(self, latents: torch.Tensor) -> torch.Tensor:
        """The same a picture and a tile at a time, on the CPU."""
        pictures = (decode_tiled(lambda tile: [self._decode(tile)], one, TILING) for one in latents.split(1))
        return torch.cat([picture for chunks in pictures for picture in chunks])


def _scaled(given: Image.Image | None, made: np.ndarray) -> Iterator[str]:
    """Whether a picture was changed at another size than its own."""
    height, width = made.shape[:2]
    if given is not None and given.size != (width, height):
        yield (
            f"image_url is {given.width}x{given.height} pixels and was scaled to {width}x{height}: sides must be "
            f"multiples of {SIZE_MULTIPLE}"
        )


def _loaded(parts: Parts, device: str) -> dict[str, Any]:
    """All components, whole. Each is read while the next one's empty model is built."""
    arrival = Arrival(device)
    try:
        loader = Loader(parts, None, device, arrival)
        loaded = {name: loader.on_device(name) for name in COMPONENTS}
        for each in loaded.values():
            if each.coming is not None:
                each.coming.wait_whole()
    finally:
        arrival.close()
    return {name: each.model for name, each in loaded.items()}


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
