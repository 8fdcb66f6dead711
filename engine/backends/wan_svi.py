"""Wan2.2 image-to-video on two experts, with SVI 2.0 Pro and an end picture: one clip, or a chain of clips.

All clips are denoised first and decoded afterwards. Latents are small, 8 MB a clip; a failure is known before
the first frame is written; and the experts have done their work when the VAE begins.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from engine.backends import Task
from engine.card import Card
from engine.chain import Clip, keep, motion_after, returned_frames
from engine.chain_state import ChainState, anchor_digest, pack_state, unpack_state
from engine.conditioning import LAYOUTS, Filling, Given, condition
from engine.denoise import ExpertSource, Prompts, denoise
from engine.frames import stream_uint8
from engine.geometry import VAE_STRIDE_S, VAE_STRIDE_T, LatentShape, VideoShape
from engine.memo_encode import MemoEncoder
from engine.outputs import Frames
from engine.parking import Parkable
from engine.placing import place
from engine.profile import EXPERTS, Profile
from engine.progress import Progress
from engine.scheduler import ReferenceEuler
from engine.svi_clips import clips_for
from engine.svi_request import scene_size
from engine.svi_scene import Scene, read_scene
from engine.svi_schedule import Schedule, schedule_for
from engine.svi_strengths import with_strengths
from engine.text import MAX_TOKENS, PromptEncoder
from engine.tiled_decode import stepped, steps
from engine.vae import decode_chunks, decode_end_single, encode_norm
from engine.weights import Parts
from schemas.svi_schema import SviEndframeRequest

TRAINED_LATENT_FRAMES = 21  # of 81 pixel frames

Film = list[tuple[Clip, Tensor]]
"""Clips with their final latents (1, z, T, h, w), on the CPU."""


@dataclass(frozen=True)
class Job:
    """A request as it will run. Another request is another job; none changes the backend."""

    request: SviEndframeRequest
    profile: Profile
    seed: int
    state: ChainState | None
    height: int
    width: int
    schedule: Schedule
    clips: tuple[Clip, ...]
    experts: ExpertSource

    @property
    def motion_frames(self) -> int:
        """Latent frames that one clip hands to the next."""
        return self.request.overlap // VAE_STRIDE_T

    def latent(self, frames: int) -> LatentShape:
        return LatentShape(frames, self.height // VAE_STRIDE_S, self.width // VAE_STRIDE_S)


class Noise(NamedTuple):
    """A clip's, and the generator that it came from: what fills unknown frames is drawn after it."""

    drawn: Tensor
    """(1, z, T, h, w) fp32 on the CPU."""
    generator: torch.Generator


class Opening(NamedTuple):
    """What a clip's denoising begins with, on the card."""

    noise: Tensor
    """(1, z, T, h, w) fp32."""
    condition: Tensor
    """(1, 4 + z, T, h, w) fp32."""


class WanSvi:
    """Both experts, the VAE and the text encoder, each where the plan for this card puts it."""

    def __init__(self, profile: Profile, parts: Parts, card: Card) -> None:
        self.profile = profile
        self._parts = parts
        self._device = torch.device(card.device)
        self._placed = place(profile, parts, card, {name: EXPERTS[name] for name in ("high", "low")})
        self._memo = MemoEncoder(self._placed.vae)
        self._prompts = PromptEncoder(parts.load("tokenizer"), self._placed.encoders["text_encoder"], self._device)

    @torch.inference_mode()
    def generate(self, task: Task, progress: Progress) -> Frames:
        with self._placed.attended(progress):
            return self._run(task, progress)

    def _run(self, task: Task, progress: Progress) -> Frames:
        job = self._job(task)
        self._placed.expect(job.latent(clip.latent_frames) for clip in job.clips)
        with ThreadPoolExecutor(1, thread_name_prefix="noise") as thread:
            noise = thread.submit(self._draw, job, job.clips[0])  # 15 ms, in which pictures are read
            scene = read_scene(job.request, task.pictures, job.height, job.width)
        with progress.stage("encode"):
            given = self._given(job, scene)
            # First, because the card works on pictures alone while Python launches the text encoder's many kernels; and
            # in a new process the VAE is there before the text encoder.
            opening = self._open(job, job.clips[0], given, noise.result())
            prompts, notes = self._embed(job)
        self._placed.forwards_begin()
        with progress.stage("denoise", job.schedule.steps * len(job.clips)) as step:
            film = self._denoise(job, given, opening, prompts, step)
        state = _state_after(job, film, scene) if job.request.return_state else None
        return Frames(
            self._decoded(film, progress, task.saves_memory),
            VideoShape(returned_frames(job.clips), job.height, job.width),
            job.request.fps,
            (*_notes(job, scene), *notes),
            lambda: state,
        )

    @property
    def weights(self) -> Parkable:
        return self._placed

    def finish(self) -> None:
        self._placed.finish()

    def unload(self) -> None:
        self._placed.unload()
        del self._memo, self._placed, self._prompts

    def _job(self, task: Task) -> Job:
        """Decide everything that can be decided, and refuse what cannot be, before any model works.

        `Gate.admit` has asked the same functions, all but whether the bake kept its LoRA files.
        """
        request = cast(SviEndframeRequest, task.request)  # the profile's modes hold it
        state = None if request.state is None else unpack_state(request.state)
        height, width = scene_size(request, task.pictures, task.profile)
        schedule = schedule_for(task.profile, request)
        clips = clips_for(request, task.seed, 0 if state is None else state.next_index)
        experts = with_strengths(self._placed.experts, task.profile, self._parts, request.loras_multipliers)
        return Job(request, task.profile, task.seed, state, height, width, schedule, clips, experts)

    def _embed(self, job: Job) -> tuple[list[Prompts], list[str]]:
        """The embeddings of each clip's prompts, and what of them nobody reads."""
        negative = None
        if job.schedule.is_guided:
            words = job.request.negative_prompt
            words = job.profile.negative_prompt if words is None else words
            negative = self._prompts.encode(words).hidden
        prompts, notes = [], []
        for clip in job.clips:
            embedding = self._prompts.encode(clip.prompt)
            prompts.append(Prompts(embedding.hidden, negative))
            if embedding.unread_tokens:
                notes.append(
                    f"the prompt of clip {clip.index} is {embedding.tokens} tokens long; "
                    f"the model reads the first {MAX_TOKENS}"
                )
        return prompts, notes

    def _given(self, job: Job, scene: Scene) -> Given:
        """The scene on the card, with the motion latents that the first clip goes on from."""
        anchor, start, end = scene.given.anchor, scene.given.start, scene.given.end
        motion = None if job.state is None else job.state.motion.to(self._device)
        if scene.prefix is not None:
            motion = self._encode(scene.prefix)[:, :, -job.motion_frames :]
        return Given(
            anchor.to(self._device),
            start.to(self._device),
            None if end is None else end.to(self._device),
            motion,
        )

    def _draw(self, job: Job, clip: Clip) -> Noise:
        generator = torch.Generator("cpu").manual_seed(clip.seed)
        shape = (1, self._placed.vae.config.z_dim, *job.latent(clip.latent_frames))
        return Noise(torch.randn(shape, generator=generator, dtype=torch.float32), generator)

    def _open(self, job: Job, clip: Clip, given: Given, noise: Noise) -> Opening:
        """What a clip begins with. The card may still be at work on the condition."""
        on_card = noise.drawn.to(self._device)  # before the VAE begins: the copy waits for what the card does
        shown = given if LAYOUTS[clip.layout].needs_end else replace(given, end=None)
        filling = Filling(job.request.empty_frames, noise.generator)
        return Opening(on_card, condition(clip.layout, clip.latent_frames, shown, self._encode, filling))

    def _denoise(
        self, job: Job, given: Given, opening: Opening, prompts: list[Prompts], step: Callable[[], None]
    ) -> Film:
        """Run the clips one after the other, each on the motion of the one before. `opening`: of the first."""
        film: Film = []
        for clip, prompt in zip(job.clips, prompts, strict=True):
            if film:
                opening = self._open(job, clip, given, self._draw(job, clip))
            latents = denoise(
                opening.noise,
                opening.condition,
                prompt,
                job.schedule.phases,
                ReferenceEuler(shift=job.schedule.flow_shift),
                job.experts,
                lambda *_: step(),
            )
            if LAYOUTS[clip.layout].end_alone and job.request.lock_end is not False:
                end = opening.condition[:, 4:, -1:]  # the condition ends on E(end)
                latents = torch.cat([latents[:, :, :-1], end], dim=2)
            import_module("av")  # the film's encoder, 0.2 s once: the card still works, and nobody waits for it here
            film.append((clip, latents.cpu()))
            if clip is not job.clips[-1]:
                given = replace(given, motion=motion_after(clip, latents, job.request.overlap))
        return film

    def _encode(self, pixels: Tensor) -> Tensor:
        return encode_norm(self._placed.vae, pixels, self._memo.encode)

    @torch.inference_mode()
    def _decoded(self, film: Film, progress: Progress, in_tiles: bool) -> Iterator[np.ndarray]:
        """Decode and join: uint8 (f, height, width, 3), a latent frame at a time."""
        with progress.stage("decode", sum(steps(latents, in_tiles) for _, latents in film)) as step:
            for clip, latents in film:
                by_layout = decode_end_single if LAYOUTS[clip.layout].end_alone else decode_chunks
                decoded = stepped(partial(by_layout, self._placed.decoder), latents, in_tiles, step)
                chunks = keep(decoded, clip.kept)
                yield from stream_uint8(chunk[0] for chunk in chunks)
        self._placed.end_job()


def _state_after(job: Job, film: Film, scene: Scene) -> str:
    clip, latents = film[-1]
    motion = motion_after(clip, latents, job.request.overlap)
    return pack_state(ChainState(motion, job.seed, clip.index + 1, anchor_digest(scene.given.anchor)))


def _notes(job: Job, scene: Scene) -> Iterator[str]:
    """What the caller should know about how it ran, beyond what the request itself told."""
    yield from job.profile.settings.get("corrections", ())
    last, state = job.clips[-1], job.state
    if last.latent_frames > TRAINED_LATENT_FRAMES:
        yield (
            f"{last.frames} frames in layout {last.layout} take {last.latent_frames} latent frames, and the "
            f"model was trained on {TRAINED_LATENT_FRAMES}; {last.frames - VAE_STRIDE_T} frames stay within"
        )
    if state is not None and state.seed != job.seed:
        yield f"the state's chain has seed {state.seed}; this video goes on with seed {job.seed}"
    if state is not None and state.anchor_sha256 != anchor_digest(scene.given.anchor):
        yield "the anchor is not the one of the state's chain"
