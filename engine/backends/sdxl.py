"""SDXL: base and refiner as one hand-over in latent space, or the refiner alone on a given picture.

Both pipelines are put together anew for each task from the same resident parts. That costs nothing (no weight is
touched) and makes it impossible that one request's scheduler is seen by the next. On a card the UNets' forwards are
recorded and replayed within a job, see engine.replay.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from engine.backends import Task
from engine.card import Card
from engine.frames import image_to_uint8
from engine.outputs import Images
from engine.profiles import Profile
from engine.progress import Progress
from engine.replay import replayed
from engine.standing import Standing
from engine.tiled_decode import Tiling, decode_tiled
from engine.weights import Parts
from schemas.image_schema import ImageRequest

SCHEDULERS = {
    "PNDM": PNDMScheduler,
    "KLMS": LMSDiscreteScheduler,
    "DDIM": DDIMScheduler,
    "K_EULER": EulerDiscreteScheduler,
    "K_EULER_ANCESTRAL": EulerAncestralDiscreteScheduler,
    "DPMSolverMultistep": DPMSolverMultistepScheduler,
    "DPMSolverSinglestep": DPMSolverSinglestepScheduler,
}
"""worker-sdxl's names. They choose the base's scheduler; the refiner keeps the one it was published with."""

SIZE_MULTIPLE = 8  # the VAE's stride; UNet strides are handled by its own padding-free sizes from 8 up

TILING = Tiling(side=64, overlap=16)  # 512 pixels: the VAE's norms look at the whole tile, and a small one pales

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
        self._parts: dict[str, Any] = {name: parts.load(name, card.device) for name in COMPONENTS}
        modules = [part for part in self._parts.values() if isinstance(part, torch.nn.Module)]
        self.weights = Standing(modules, card.device)

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Images:
        request = cast(ImageRequest, task.request)  # the profile's modes hold it
        generator = torch.Generator("cpu").manual_seed(task.seed)
        picture = task.pictures.get("image_url")
        refiner = self._refiner()
        with progress.stage("encode"):
            texts = self._encode(refiner, request)
        with progress.stage("denoise", self._steps(request, refiner.scheduler)) as step:

            def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                step()
                return tensors

            image = self._base_latents(request, generator, after_step) if picture is None else picture
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
                    **texts,
                ).images
        with progress.stage("decode"):
            # All at once, as diffusers does: one by one the convolutions may round otherwise.
            decoded = self._decode_tiled(latents) if task.saves_memory else self._decode(latents)
            return Images([image_to_uint8(image) for image in decoded.split(1)])

    def unload(self) -> None:
        self.weights.unload()
        self._parts.clear()

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

    def _encode(self, refiner: Any, request: ImageRequest) -> dict[str, torch.Tensor]:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = refiner.encode_prompt(
            prompt=request.prompt or "",
            negative_prompt=request.negative_prompt,
            device=self._device,
            do_classifier_free_guidance=request.refiner_guidance_scale > 1,
        )
        return dict(zip(names, embeds, strict=True))

    def _base_latents(self, request: ImageRequest, generator: torch.Generator, after_step: Any) -> torch.Tensor:
        with self._quickly("unet"):
            latents: torch.Tensor = self._base(request.scheduler)(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                denoising_end=request.high_noise_frac if request.splits else None,
                num_images_per_prompt=request.num_images,
                generator=generator,
                output_type="latent",
                callback_on_step_end=after_step,
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


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
