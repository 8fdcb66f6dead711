"""The video twins show what they were given: colours, sides, and which picture stands at which end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.profiles import PROFILES
from engine.settings import Settings
from engine.weights import Parts, locate

HEIGHT, WIDTH = 64, 96
RED, BLUE = (220, 40, 40), (40, 60, 220)


def parts_of(name: str, twins: Path) -> Parts:
    return locate(PROFILES[name], Settings(weights_dir=twins)).parts()


def picture(top: tuple[int, int, int], bottom: tuple[int, int, int] = (40, 160, 60)) -> Image.Image:
    """One colour above, another below: shows swapped channels and a picture upside down."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2], pixels[HEIGHT // 2 :] = top, bottom
    return Image.fromarray(pixels)


def top_and_bottom(frame: np.ndarray) -> np.ndarray:
    """Mean colour of the inner upper and lower quarter of a frame (height, width, 3), 0 to 255."""
    return np.stack([frame[8:24].mean((0, 1)), frame[40:56].mean((0, 1))])


def distance(frame: np.ndarray, wanted: Image.Image) -> float:
    """Mean difference of the two halves' colours, in levels."""
    return float(np.abs(top_and_bottom(frame) - top_and_bottom(np.asarray(wanted, np.float32))).mean())


def painted(name: str, twins: Path, end: Image.Image | None, frames: int) -> np.ndarray:
    """Plain diffusers on the twin: (frames, height, width, 3), 0 to 255."""
    from diffusers import WanImageToVideoPipeline

    parts = parts_of(name, twins)
    components: dict[str, Any] = {part.name: parts.load(part.name) for part in parts.profile.components}
    pipeline = WanImageToVideoPipeline(**components, boundary_ratio=0.9 if name == "wan22_i2v_svi" else None)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        picture(RED), "a red fox", height=HEIGHT, width=WIDTH, num_frames=frames, num_inference_steps=8,
        guidance_scale=1.0, last_image=end, generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip
    return np.asarray(result) * 255


def test_vae_twin_gives_back_the_colours_it_was_given(twins: Path) -> None:
    vae = parts_of("wan22_i2v_svi", twins).load("vae")
    wanted = picture(RED)
    video = torch.from_numpy(np.stack([np.asarray(wanted)] * 5)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
    frames = (decoded[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy() + 1) * 127.5
    assert max(distance(frame, wanted) for frame in frames) < 15


def test_vae_twin_writes_latents_of_the_published_statistics(twins: Path) -> None:
    vae = parts_of("wan22_i2v_svi", twins).load("vae")
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.inference_mode():
        white = (vae.encode(torch.ones(1, 3, 1, 32, 32)).latent_dist.mode() - mean) / std
    assert white[:, :15].abs().mean().item() == pytest.approx(1.5, abs=0.15)


def test_video_twin_keeps_the_start_picture(twins: Path) -> None:
    frames = painted("wan21_i2v_480p", twins, None, 9)
    assert max(distance(frame, picture(RED)) for frame in frames) < 35


def test_two_expert_twin_goes_from_the_start_to_the_end_picture(twins: Path) -> None:
    frames = painted("wan22_i2v_svi", twins, picture(BLUE), 81)
    start, end = picture(RED), picture(BLUE)
    assert distance(frames[0], start) < 35 < distance(frames[0], end)
    assert distance(frames[-1], end) < 35 < distance(frames[-1], start)
    reds = [top_and_bottom(frame)[0, 0] for frame in frames]
    thirds = [float(np.mean(reds[i : i + 27])) for i in (0, 27, 54)]
    assert thirds == sorted(thirds, reverse=True)


def test_random_part_of_the_twin_is_not_zero(twins: Path) -> None:
    """No tensor of the hand-set models is without effect: a test that drops one must see it."""
    for name in ("transformer", "vae"):
        state = parts_of("wan22_i2v_svi", twins).load(name).state_dict()
        assert [key for key, tensor in state.items() if not tensor.any()] == []
