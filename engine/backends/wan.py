"""Wan2.1 image-to-video through diffusers' own pipeline, put together from our parts.

The pipeline's loop and scheduler are used as they are, begun at the first step. Ours are the size rule, the encoders
that visit the card and are asked once a prompt or picture, the encode that skips what it has already computed, a CPU
generator (a seed means the same on every card), progress and cancel at each step, and a decode that hands out frames
as they come.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from engine.backends import Task
from engine.card import Card
from engine.conditioning import start_condition
from engine.frames import stream_uint8
from engine.geometry import VideoShape
from engine.memo_encode import MemoEncoder
from engine.outputs import Frames
from engine.parking import Parkable
from engine.picture_embeds import PictureEncoder
from engine.picture_video import Words, asked_shape, read_words
from engine.pictures import fit_picture
from engine.placing import place
from engine.profile import Profile
from engine.progress import Progress
from engine.text import PromptEncoder
from engine.tiled_decode import stepped, steps
from engine.vae import decode_chunks, encode_norm
from engine.weights import Parts
from schemas.video_schema import VideoRequest


class Wan:
    """Wan2.1 image-to-video: transformer and VAE on the card, the encoders visiting where there is no room."""

    def __init__(self, profile: Profile, parts: Parts, card: Card) -> None:
        self.profile = profile
        self._device = torch.device(card.device)
        self._placed = place(profile, parts, card, {"single": "transformer"})
        self._memo = MemoEncoder(self._placed.vae)
        self._scheduler = parts.load("scheduler")
        self._prompts = PromptEncoder(parts.load("tokenizer"), self._placed.encoders["text_encoder"], self._device)
        self._pictures = PictureEncoder(parts.load("image_processor"), self._placed.encoders["image_encoder"])

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Frames:
        with self._placed.attended(progress):
            return self._run(task, progress)

    def _run(self, task: Task, progress: Progress) -> Frames:
        request = cast(VideoRequest, task.request)  # the profile's modes hold it
        shape = asked_shape(request, task.pictures["image_url"], task.profile.max_area)
        self._placed.expect([shape.latent()])
        with progress.stage("encode"):
            words = read_words(request, self._prompts)
        self._placed.forwards_begin()
        latents = self._denoise(task, request, shape, words, progress)
        return Frames(self._decoded(latents, progress, task.saves_memory), shape, request.fps, words.notes)

    @property
    def weights(self) -> Parkable:
        return self._placed

    def finish(self) -> None:
        self._placed.finish()

    def unload(self) -> None:
        self._placed.unload()
        del self._placed, self._memo, self._prompts, self._pictures

    def _denoise(
        self, task: Task, request: VideoRequest, shape: VideoShape, words: Words, progress: Progress
    ) -> torch.Tensor:
        """The pipeline's own loop: latents (1, 16, T, h, w) fp32."""
        with (
            progress.stage("denoise", request.num_inference_steps) as step,
            self._placed.experts.use("single") as transformer,
        ):

            def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                step()
                return tensors

            latents: torch.Tensor = self._pipeline(transformer)(
                image=fit_picture(task.pictures["image_url"], shape.height, shape.width),
                prompt_embeds=words.embedded.positive,
                negative_prompt_embeds=words.embedded.negative,
                height=shape.height,
                width=shape.width,
                num_frames=shape.frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(task.seed),
                output_type="latent",
                callback_on_step_end=after_step,
            ).frames
            return latents

    def _pipeline(self, transformer: Any) -> Any:
        """Made anew for each job: a pipeline is a dozen references, and its scheduler has a memory."""
        pipeline: Any = _MemoPipeline(
            tokenizer=None,
            text_encoder=None,
            image_encoder=None,
            image_processor=None,
            transformer=transformer,
            vae=self._placed.vae,
            scheduler=type(self._scheduler).from_config(self._scheduler.config),
        )
        pipeline.memo = self._memo
        pipeline.pictures = self._pictures
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.inference_mode()
    def _decoded(self, latents: torch.Tensor, progress: Progress, in_tiles: bool) -> Iterator[np.ndarray]:
        with progress.stage("decode", steps(latents, in_tiles)) as step:
            chunks = stepped(partial(decode_chunks, self._placed.decoder), latents, in_tiles, step)
            yield from stream_uint8(chunk[0] for chunk in chunks)
        self._placed.end_job()


class _MemoPipeline(WanImageToVideoPipeline):
    """The stock pipeline, asking our encoders: equal, without computing what is known already."""

    vae: Any
    scheduler: Any
    _execution_device: torch.device
    memo: MemoEncoder
    pictures: PictureEncoder

    def encode_image(self, image: Image.Image, device: torch.device | None = None) -> torch.Tensor:
        return self.pictures.encode(image).to(device or self._execution_device)

    def prepare_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (1, 16, T, h, w) and condition (1, 20, T, h, w), both fp32; `image` is (1, 3, H, W) in [-1, 1]."""
        # Else the scheduler looks for the first timestep among its whole numbers, and takes the second that is equal:
        # from 334 steps on there is one, and the last step would have none to go to.
        self.scheduler.set_begin_index(0)
        if latents is not None or last_image is not None or batch_size != 1:
            raise ValueError("one picture, no last picture, noise of its own")
        t, h, w = VideoShape(num_frames, height, width).latent()
        noise = randn_tensor((1, num_channels_latents, t, h, w), generator=generator, device=device, dtype=dtype)
        return noise, start_condition(
            image.unsqueeze(2), num_frames, lambda pixels: encode_norm(self.vae, pixels, self.memo.encode)
        )
