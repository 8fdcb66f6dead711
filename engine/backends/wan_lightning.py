"""Wan2.2 image-to-video on two distilled experts: a picture and a prompt to a clip in a few forwards.

The arithmetic is that of diffusers' WanImageToVideoPipeline with two transformers and a boundary, on the Euler grid
that the distillation was made for. The loop is our own, so that one expert may take the other's place in the same
memory.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.backends import Task
from engine.card import Card
from engine.conditioning import start_condition
from engine.denoise import PhaseRun, denoise
from engine.frames import stream_uint8
from engine.geometry import VideoShape
from engine.memo_encode import MemoEncoder
from engine.outputs import Frames
from engine.parking import Parkable
from engine.picture_video import asked_shape, read_picture, read_words
from engine.placing import place
from engine.profile import EXPERTS, Profile
from engine.progress import Progress
from engine.scheduler import DistilledEuler, split_at, timesteps_of
from engine.text import PromptEncoder
from engine.tiled_decode import stepped, steps
from engine.vae import decode_chunks, encode_norm
from engine.weights import Parts
from schemas.video_schema import VideoRequest


class WanLightning:
    """Both experts, the VAE and the text encoder, each where the plan for this card puts it."""

    def __init__(self, profile: Profile, parts: Parts, card: Card) -> None:
        self.profile = profile
        self._device = torch.device(card.device)
        self._placed = place(profile, parts, card, {phase.expert: EXPERTS[phase.expert] for phase in profile.phases})
        self._memo = MemoEncoder(self._placed.vae)
        self._prompts = PromptEncoder(parts.load("tokenizer"), self._placed.encoders["text_encoder"], self._device)

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Frames:
        with self._placed.attended(progress):
            return self._run(task, progress)

    def _run(self, task: Task, progress: Progress) -> Frames:
        request = cast(VideoRequest, task.request)  # the profile's modes hold it
        shape = asked_shape(request, task.pictures["image_url"], task.profile.max_area)
        self._placed.expect([shape.latent()])
        with progress.stage("encode"):
            start = read_picture(task.pictures["image_url"], shape).to(self._device)
            noise = self._noise(task.seed, shape)
            condition = start_condition(start, shape.frames, self._encode)
            words = read_words(request, self._prompts)  # last: the text encoder is read after the VAE
        self._placed.forwards_begin()
        with progress.stage("denoise", request.num_inference_steps) as step:
            latents = denoise(
                noise,
                condition,
                words.embedded,
                phases_for(task.profile, request.num_inference_steps, request.guidance_scale),
                DistilledEuler(shift=task.profile.schedule.flow_shift),
                self._placed.experts,
                lambda *_: step(),
            )
        return Frames(self._decoded(latents, progress, task.saves_memory), shape, request.fps, words.notes)

    @property
    def weights(self) -> Parkable:
        return self._placed

    def finish(self) -> None:
        self._placed.finish()

    def unload(self) -> None:
        self._placed.unload()
        del self._placed, self._memo, self._prompts

    def _noise(self, seed: int, shape: VideoShape) -> Tensor:
        """(1, z, T, h, w) fp32, drawn on the CPU: a seed means the same on every card."""
        size = (1, self._placed.vae.config.z_dim, *shape.latent())
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(size, generator=generator, dtype=torch.float32).to(self._device)

    def _encode(self, pixels: Tensor) -> Tensor:
        return encode_norm(self._placed.vae, pixels, self._memo.encode)

    @torch.inference_mode()
    def _decoded(self, latents: Tensor, progress: Progress, in_tiles: bool) -> Iterator[np.ndarray]:
        with progress.stage("decode", steps(latents, in_tiles)) as step:
            chunks = stepped(partial(decode_chunks, self._placed.decoder), latents, in_tiles, step)
            yield from stream_uint8(chunk[0] for chunk in chunks)
        self._placed.end_job()


def phases_for(profile: Profile, steps: int, guidance_scale: float) -> tuple[PhaseRun, PhaseRun]:
    """How many of `steps` each expert runs: the first one those above the profile's boundary.

    Raises:
        InvalidInput: an expert would not run at all.
        ValueError: the profile has no two phases on the distilled grid.
    """
    row = profile.schedule
    if row.solver != "euler_distilled" or row.flow_shift is None or row.switch_threshold is None:
        raise ValueError(f"{profile.name} has no two phases on the distilled grid")
    split = split_at(timesteps_of(DistilledEuler(shift=row.flow_shift), steps), row.switch_threshold)
    return PhaseRun("high", split.high, guidance_scale), PhaseRun("low", split.low, guidance_scale)
