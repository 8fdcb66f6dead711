"""Wan2.1 image-to-video through diffusers' own pipeline, put together from our parts.

The pipeline's loop, scheduler and conditioning are used as they are; around them stand our size rule, a CPU generator
(a seed means the same on every card), progress and cancel at each step, and a decode that hands out frames as they come.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline

from engine.backends import Task
from engine.frames import to_uint8
from engine.geometry import VideoShape, fit_area
from engine.outputs import Frames
from engine.pictures import fit_picture
from engine.profiles import Profile
from engine.progress import Progress
from engine.vae import decode_chunks
from engine.weights import Parts

COMPONENTS = (
    "tokenizer", "text_encoder", "vae", "scheduler", "image_processor", "image_encoder", "transformer",
)  # fmt: skip


class Wan:
    """Wan2.1 image-to-video: transformer and VAE resident, the encoders visiting the card when they are needed."""

    def __init__(self, profile: Profile, parts: Parts, device: str, budget_bytes: int) -> None:
        self.profile = profile
        self._device = torch.device(device)
        self._parts: dict[str, Any] = {name: parts.load(name, device) for name in COMPONENTS}

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Frames:
        request = task.request
        shape = self._shape(task)
        picture = fit_picture(task.pictures["image_url"], shape.height, shape.width)
        pipeline = self._pipeline()
        with progress.stage("denoise", request.num_inference_steps) as step:

            def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                step()
                return tensors

            latents = pipeline(
                image=picture,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=shape.height,
                width=shape.width,
                num_frames=shape.frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(task.seed),
                output_type="latent",
                callback_on_step_end=after_step,
            ).frames
        return Frames(self._decoded(latents, progress), shape, request.fps)

    def unload(self) -> None:
        self._parts.clear()

    def _shape(self, task: Task) -> VideoShape:
        request = task.request
        if request.height is not None:
            return VideoShape(request.num_frames, request.height, request.width)
        width, height = task.pictures["image_url"].size
        return VideoShape(request.num_frames, *fit_area(width / height, task.profile.max_area))

    def _pipeline(self) -> WanImageToVideoPipeline:
        parts = self._parts
        scheduler = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipeline = WanImageToVideoPipeline(**{**parts, "scheduler": scheduler})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _decoded(self, latents: torch.Tensor, progress: Progress) -> Iterator[np.ndarray]:
        with torch.inference_mode(), progress.stage("decode", latents.shape[2]) as step:
            for chunk in decode_chunks(self._parts["vae"], latents):
                yield to_uint8(chunk[0])
                step()
