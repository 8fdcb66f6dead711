"""The condition that an image-to-video transformer is shown beside the noise: 4 mask channels and 16 latents.

A layout says where the known pictures stand in it, what stands between them, and how the last latent is to be
decoded. A mask row is T groups of 4 sub-frames: group 0 is pixel frame 0, group k > 0 is pixel frames 4k - 3
.. 4k; 1 = known.

Sources: Stable-Video-Infinity, branch svi_wan22 (svi); Headless-Wan2GP at 4733f05 (svi_latent) and 50066ea
(svi_pixel4); Wan2GP at 8681e9f7 (svi_upstream); diffusers 0.42.1, WanImageToVideoPipeline.prepare_latents
with last_image (flf); ComfyUI-WanVideoWrapper, WanVideoImageToVideoEncode without fun_or_fl2v_model
(kijai_end). Written from their behaviour.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.geometry import VAE_STRIDE_T
from engine.passage import to_device

Encode = Callable[[Tensor], Tensor]
"""Pixels (1, 3, F, H, W) in [-1, 1], F = 4k + 1, to normalised latents (1, 16, T, h, w) fp32."""

EmptyFrames = Literal["zeros", "anchor", "noise"]
EndMask = Literal["none", "last", "group"]


@dataclass(frozen=True)
class Given:
    """What one clip starts from: pixels (1, 3, f, H, W) in [-1, 1], latents (1, 16, m, h, w) normalised."""

    anchor: Tensor
    """The picture that stays the same in every clip of a chain: 1 frame."""
    start: Tensor
    """1 or more frames. Only the layouts made in pixel space look at them."""
    end: Tensor | None = None
    motion: Tensor | None = None
    """The last denoised latents of the clip before."""


@dataclass(frozen=True)
class Filling:
    """What stands in the unknown frames; the mask stays as it is. `generator`: on the CPU, for the noise."""

    kind: EmptyFrames = "zeros"
    generator: torch.Generator | None = None

    def like(self, picture: Tensor, frames: int) -> Tensor:
        """`frames` unknown frames beside `picture` (1, c, 1, H, W), in pixel space or in latent space."""
        shape = (picture.shape[0], picture.shape[1], frames, *picture.shape[3:])
        if self.kind == "zeros":
            return picture.new_zeros(shape)
        if self.kind == "anchor":
            return picture.expand(shape)
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return noise.to(device=picture.device, dtype=picture.dtype)


@dataclass(frozen=True)
class Layout:
    """One way to tell the transformer about start and end."""

    build: Callable[[int, Given, Encode, Filling], Tensor]
    """(T, given, encode, filling) -> latents (1, 16, T, h, w)."""
    end_mask: EndMask
    single_image_end: bool = False
    """The last latent is made from one picture alone, so it is a first-frame latent and no motion latent."""
    end_alone: bool = False
    """That latent is decoded alone, so it can be locked. svi_upstream decodes it in the causal stream."""
    from_start: bool = False
    """Latent 0 comes from `start`. Otherwise it is the anchor, and `start` has no influence at all."""
    takes_motion: bool = False
    extra_latent: bool = False
    """The layout itself is one latent frame longer than the pixel frames asked for."""
    window_cut: int | None = None
    """Index of the decoded frame that the implementation it comes from throws away."""

    @property
    def needs_end(self) -> bool:
        return self.end_mask != "none"


def known_mask(latent_frames: int, known_frames: int = 1, end: EndMask = "none") -> Tensor:
    """Mark which sub-frames are known.

    `known_frames`: leading pixel frames that are given; the first counts for all 4 sub-frames of group 0.
    `end`: only the last pixel frame, or the whole last group. Returns (4, T) fp32; axis 0 is the VAE's
    temporal stride.

    Raises:
        ValueError: no known frame, or start and end overlap.
    """
    end_subframes = {"none": 0, "last": 1, "group": VAE_STRIDE_T}[end]
    start_subframes = VAE_STRIDE_T + known_frames - 1
    if known_frames < 1 or start_subframes + end_subframes > VAE_STRIDE_T * latent_frames:
        raise ValueError(f"{known_frames} known start frames and end {end!r} do not fit {latent_frames} latent frames")
    row = torch.zeros(VAE_STRIDE_T * latent_frames)
    row[:start_subframes] = 1
    row[len(row) - end_subframes :] = 1
    return row.view(latent_frames, VAE_STRIDE_T).T.contiguous()


def condition(name: str, latent_frames: int, given: Given, encode: Encode, filling: Filling | None = None) -> Tensor:
    """Build `y`: (1, 20, T, h, w) fp32, the mask first, on the device of the encoded latents.

    Raises:
        KeyError: `name` is no layout.
        ValueError: an end picture is missing or has no place, or motion has none; or T is too small.
    """
    layout = LAYOUTS[name]
    if layout.needs_end != (given.end is not None):
        raise ValueError(f"layout {name} {'needs an' if layout.needs_end else 'takes no'} end picture")
    if given.motion is not None and not layout.takes_motion:
        raise ValueError(f"layout {name} takes no motion latents")
    known_frames = given.start.shape[2] if layout.from_start else 1
    mask = known_mask(latent_frames, known_frames, layout.end_mask)
    latents = layout.build(latent_frames, given, encode, filling or Filling())
    return _marked(mask, latents)


def start_condition(start: Tensor, frames: int, encode: Encode) -> Tensor:
    """Plain image-to-video, which has no layout: E([start | zeros]) in one pass, and frame 0 known.

    `start`: pixels (1, 3, 1, H, W). Returns `y` for `frames` pixel frames as `condition` does.
    """
    height, width = start.shape[3:]
    known = encode(torch.cat([start, start.new_zeros(1, 3, frames - 1, height, width)], dim=2))
    return _marked(known_mask(known.shape[2]), known)


def _marked(mask: Tensor, latents: Tensor) -> Tensor:
    """Mask (4, T) and latents (1, 16, T, h, w) -> (1, 20, T, h, w)."""
    on_card = to_device(mask.to(latents.dtype), latents.device)[None, :, :, None, None]
    return torch.cat([on_card.expand(1, -1, -1, *latents.shape[3:]), latents], dim=1)


def _anchor_latents(latent_frames: int, given: Given, encode: Encode, filling: Filling) -> Tensor:
    """[E(anchor) | motion | empty | E(end)], put together in latent space; motion and end where given."""
    anchor = encode(given.anchor)
    head = [anchor] if given.motion is None else [anchor, given.motion.to(anchor)]
    tail = [] if given.end is None else [encode(given.end)]
    empty = latent_frames - sum(part.shape[2] for part in head + tail)
    if empty < 0:
        raise ValueError(f"{latent_frames} latent frames cannot hold anchor, motion and end")
    return torch.cat([*head, filling.like(anchor, empty), *tail], dim=2)


def _pixels_to_end(latent_frames: int, given: Given, encode: Encode, filling: Filling) -> Tensor:
    """E([start | empty | end]) in one pass: the end is the last frame of the last group of 4."""
    return encode(_pixels(VAE_STRIDE_T * (latent_frames - 1) + 1, given, filling, end_frames=1))


def _pixels_to_end_group(latent_frames: int, given: Given, encode: Encode, filling: Filling) -> Tensor:
    """E([start | empty | end x4]) in one pass: the whole last group shows the end."""
    return encode(_pixels(VAE_STRIDE_T * (latent_frames - 1) + 1, given, filling, end_frames=VAE_STRIDE_T))


def _pixels_then_end(latent_frames: int, given: Given, encode: Encode, filling: Filling) -> Tensor:
    """[E([start | empty]) | E(end)]: two passes, the end as a latent of its own."""
    pixels = _pixels(VAE_STRIDE_T * (latent_frames - 2) + 1, given, filling, end_frames=0)
    return torch.cat([encode(pixels), encode(_end(given))], dim=2)


def _pixels(frames: int, given: Given, filling: Filling, end_frames: int) -> Tensor:
    middle = filling.like(given.anchor, frames - given.start.shape[2] - end_frames).clamp(-1.0, 1.0)
    end = _end(given).expand(-1, -1, end_frames, -1, -1)
    return torch.cat([given.start, middle, end], dim=2)


def _end(given: Given) -> Tensor:
    assert given.end is not None, "condition() lets no end layout through without its end"
    return given.end


LAYOUTS: dict[str, Layout] = {
    "svi": Layout(_anchor_latents, "none", takes_motion=True),
    "svi_latent": Layout(_anchor_latents, "group", single_image_end=True, end_alone=True, takes_motion=True),
    "svi_upstream": Layout(_anchor_latents, "last", single_image_end=True, takes_motion=True),
    "svi_pixel4": Layout(_pixels_to_end_group, "group", from_start=True, window_cut=0),
    "flf": Layout(_pixels_to_end, "last", from_start=True),
    "kijai_end": Layout(
        _pixels_then_end,
        "group",
        single_image_end=True,
        end_alone=True,
        from_start=True,
        extra_latent=True,
        window_cut=-1,
    ),
}
