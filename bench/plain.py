"""The other arm: diffusers as its documentation shows it, for the same request, with the same weights.

bf16 transformers, fp32 VAE, `enable_model_cpu_offload` where the models don't fit the card together, and
`export_to_video`. Nothing is slowed down: inference mode, the same torch, the same resident card otherwise. For SDXL it
is the way of worker-sdxl: fp16, base and refiner, both offloaded.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    WanImageToVideoPipeline,
)
from diffusers.utils import export_to_video

from bench.jobs import JOBS, SEED, Job, located
from bench.ours import CardParts
from bench.watch import Watch, WatchedParts
from engine.geometry import VideoShape

EXPERT_BOUNDARY = 0.9  # of 1000: the first two points of the 6-step grid run on the first expert


class Arm:
    """Pipelines built once, warm after the first `run`."""

    def __init__(self, mode: str, twins: Path, watch: Watch, *, is_small: bool = False) -> None:
        """`is_small`: the twin's weights and sizes, for a CPU."""
        self.job: Job = JOBS[mode]
        self.notes: tuple[str, ...] = ()
        self._number = 0
        self._is_small = is_small
        profile, rest = located(mode, twins)
        parts = WatchedParts(rest if is_small else CardParts(profile, rest), watch)
        self._pipelines = {"svi_endframe": _svi, "short": _svi, "lightning": _svi, "video": _video, "image": _image}[
            mode
        ](parts)
        self._fps = profile.fps
        for pipeline in self._pipelines:
            pipeline.set_progress_bar_config(disable=True)
            if torch.cuda.is_available():
                pipeline.enable_model_cpu_offload()

    def draw(self) -> None:
        """The next job's pictures, which nobody should count as its work: 20 ms."""
        self.job.given(self._number + 1)

    @torch.inference_mode()
    def run(self, layout: str | None = None, steps: int | None = None) -> dict[str, float]:  # noqa: ARG002 one way only
        """One job; its stages: the pipeline as a whole, and the file. The pipeline has one layout, that of `flf`."""
        self._number += 1
        started = time.perf_counter()
        made = self._image() if self.job.mode == "image" else self._video(steps)
        piped = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if self.job.mode == "image":
                made[0].save(Path(folder) / "image.png")
            else:
                export_to_video(made, str(Path(folder) / "video.mp4"), fps=self._fps)
        return {"pipeline": piped - started, "file": time.perf_counter() - piped}

    def in_effect(self) -> dict[str, Any]:
        """What diffusers does by itself."""
        precision = "fp16" if self.job.mode == "image" else "bfloat16"
        return {"precision": precision, "attention": "diffusers' own", "linear8": "", "graphs": 0}

    def close(self) -> None:
        for pipeline in self._pipelines:
            pipeline.remove_all_hooks()
        self._pipelines = ()

    def _video(self, steps: int | None) -> Any:
        words = self.job.take(self._number)
        shape = VideoShape(13, 64, 64) if self._is_small else self.job.shape
        start, *ends = self.job.given(self._number).values()
        end = {"last_image": ends[0]} if ends else {}
        usual = (
            words.get("num_inference_steps", 6),
            words.get("guidance_scale", 5.0 if self.job.mode == "video" else 1.0),
        )
        return self._pipelines[0](
            image=start,
            prompt=words["prompt"],
            height=shape.height,
            width=shape.width,
            num_frames=shape.frames,
            num_inference_steps=usual[0] if steps is None else steps,
            guidance_scale=usual[1],
            generator=torch.Generator("cpu").manual_seed(SEED),
            **end,
        ).frames[0]

    def _image(self) -> Any:
        base, refiner = self._pipelines
        prompt = self.job.take(self._number)["prompt"]
        size = {"height": 64, "width": 64} if self._is_small else {}
        latents = base(
            prompt=prompt, **size, num_inference_steps=25, guidance_scale=7.5, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images  # fmt: skip
        return refiner(prompt=prompt, image=latents, num_inference_steps=50, strength=0.3).images


def _svi(parts: WatchedParts) -> tuple[Any, ...]:
    names = ("tokenizer", "text_encoder", "vae", "transformer", "transformer_2")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    loaded = {name: parts.load(name) for name in names}
    return (WanImageToVideoPipeline(**loaded, scheduler=scheduler, boundary_ratio=EXPERT_BOUNDARY),)


def _video(parts: WatchedParts) -> tuple[Any, ...]:
    names = ("tokenizer", "text_encoder", "image_processor", "image_encoder", "vae", "transformer", "scheduler")
    return (WanImageToVideoPipeline(**{name: parts.load(name) for name in names}),)


def _image(parts: WatchedParts) -> tuple[Any, ...]:
    names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler")
    base = StableDiffusionXLPipeline(**{name: parts.load(name) for name in names}, add_watermarker=False)
    refiner = StableDiffusionXLImg2ImgPipeline(
        tokenizer=None,
        text_encoder=None,
        tokenizer_2=base.tokenizer_2,
        text_encoder_2=base.text_encoder_2,
        vae=base.vae,
        unet=parts.load("refiner_unet"),
        scheduler=parts.load("refiner_scheduler"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return base, refiner
