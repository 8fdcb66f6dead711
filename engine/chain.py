"""From a wanted length to clips the model can make, and from decoded clips back to one film.

Every clip but the last is conditioned on the anchor and the last denoised latents of the clip before (layout
svi); only the last one knows the end picture. A later clip renders the anchor and the frames of those latents
again: they are dropped at the seam. Source: Stable-Video-Infinity, branch svi_wan22,
inference_svi_2.0_pro.py, which drops one frame less and so leaves a duplicate at each seam.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.conditioning import LAYOUTS
from engine.geometry import VAE_STRIDE_T, clip_lengths, frames_advice, is_legal_frames
from schemas.errors import InvalidInput, Problem

MAX_CLIP_FRAMES = 81  # SVI was trained on it; beyond, colours fade and the motion runs back to the first frame
SEED_STRIDE = 42  # the authors' own; with one seed for all clips colours saturate from clip to clip
OVERLAP = 4  # pixel frames that two clips share: those of one motion latent

FramePolicy = Literal["exact", "window"]
"""exact: the frames asked for, the last one on the end picture. window: what the layout's origin returns."""


@dataclass(frozen=True)
class Wish:
    """What a request asks of a chain."""

    frames: int
    """The whole film, 4k + 1. When it goes on from something, the frames it shares with that are counted."""
    prompts: tuple[str, ...]
    """One for each clip; the last one holds for the clips that have none."""
    seed: int
    """Of clip 0 of the whole film, whichever job made it."""
    layout: str
    policy: FramePolicy = "exact"
    segments: int | None = None
    """Number of clips. None: the fewest."""
    overlap: int = OVERLAP
    """Frames that two clips share, 4 for each motion latent; the anchor's own frame comes on top."""
    continues: bool = False
    """The first clip repeats something: motion latents, or start frames in layouts that begin on those."""
    first_index: int = 0


@dataclass(frozen=True)
class Clip:
    """One run of the sampler, and which of its decoded frames are kept."""

    index: int
    """Through the whole film, earlier jobs included."""
    layout: str
    frames: int
    """Pixel frames as planned, 4k + 1."""
    latent_frames: int
    seed: int
    prompt: str
    drop: int
    """Leading decoded frames that the clip before has shown."""
    cut: int | None
    """One more decoded frame to leave out; negative: counted from the end."""

    @property
    def decoded_frames(self) -> int:
        plain = VAE_STRIDE_T * (self.latent_frames - 1) + 1
        return plain - VAE_STRIDE_T + 1 if LAYOUTS[self.layout].end_alone else plain

    @property
    def kept(self) -> tuple[int, ...]:
        """Indexes of the decoded frames that go into the film."""
        cut = None if self.cut is None else self.cut % self.decoded_frames
        return tuple(i for i in range(self.drop, self.decoded_frames) if i != cut)


def plan(wish: Wish) -> tuple[Clip, ...]:
    """Divide a film into clips of at most 81 frames and of about equal length.

    Raises:
        InvalidInput: neither the VAE nor the number of clips takes this length, or the layout makes one clip.
    """
    _check_length(wish)
    lengths = _lengths(wish)
    if len(lengths) > 1 and not LAYOUTS[wish.layout].takes_motion:
        chaining = ", ".join(name for name, layout in LAYOUTS.items() if layout.takes_motion)
        raise _refuse(
            "layout",
            f"{wish.layout} makes one clip of at most {MAX_CLIP_FRAMES} frames; for more: {chaining}",
        )
    return tuple(_clip(wish, i, frames, is_last=i == len(lengths) - 1) for i, frames in enumerate(lengths))


def returned_frames(clips: Iterable[Clip]) -> int:
    """Frames of the finished film."""
    return sum(len(clip.kept) for clip in clips)


def motion_after(clip: Clip, latents: Tensor, overlap: int = OVERLAP) -> Tensor:
    """The motion latents (1, 16, m, h, w) for the next clip, from this one's denoised (1, 16, T, h, w).

    They are the last m; where the clip ended on a single-picture latent, the last m before it, because a
    first-frame latent carries no motion.

    Raises:
        InvalidInput: as `check_hand_over`.
    """
    check_hand_over(clip, overlap)
    stop = clip.latent_frames - LAYOUTS[clip.layout].single_image_end
    return latents[:, :, stop - overlap // VAE_STRIDE_T : stop].clone()


def check_hand_over(clip: Clip, overlap: int = OVERLAP) -> None:
    """Refuse to hand over more latents than the clip has between its first one, a still picture, and its end.

    Raises:
        InvalidInput: names the shortest clip that can.
    """
    stills = 1 + LAYOUTS[clip.layout].single_image_end
    missing = overlap // VAE_STRIDE_T + stills - clip.latent_frames
    if missing > 0:
        raise _refuse(
            "return_state",
            f"needs a clip of at least {clip.frames + VAE_STRIDE_T * missing} frames, got {clip.frames}",
        )


def newest_frames(video: Tensor, overlap: int = OVERLAP) -> Tensor:
    """The last overlap + 5 frames of a video (1, 3, F, H, W): what its motion latents are encoded from.

    Sliced before the encoder, which would keep the oldest 4k + 1 by itself. 9 is the reference for 1 latent.

    Raises:
        InvalidInput: the video is shorter.
    """
    needed = overlap + 1 + VAE_STRIDE_T
    if video.shape[2] < needed:
        raise _refuse("prefix_video", f"has {video.shape[2]} frames; going on from it takes at least {needed}")
    return video[:, :, -needed:]


def keep(chunks: Iterable[Tensor], kept: Iterable[int]) -> Iterator[Tensor]:
    """Pass on only the frames whose index in the whole stream is in `kept`; chunks are (1, 3, f, H, W)."""
    wanted = frozenset(kept)
    position = 0
    for chunk in chunks:
        frames = chunk.shape[2]
        here = [i for i in range(frames) if position + i in wanted]
        position += frames
        if len(here) == frames:
            yield chunk
        elif here:
            # Not chunk[:, :, here]: the list would go to the card, and the host wait for all that the card has to do.
            yield torch.stack([chunk[:, :, i] for i in here], dim=2)


def _check_length(wish: Wish) -> None:
    if wish.overlap < VAE_STRIDE_T or wish.overlap % VAE_STRIDE_T:
        raise _refuse("overlap", f"must be a multiple of {VAE_STRIDE_T}: whole motion latents")
    if not is_legal_frames(wish.frames) or wish.frames == 1:
        raise _refuse("video_length", frames_advice(max(wish.frames, 1 + VAE_STRIDE_T)))
    repeated = 1 + wish.overlap
    if wish.continues and wish.frames < repeated + VAE_STRIDE_T:
        raise _refuse(
            "video_length",
            f"must be at least {repeated + VAE_STRIDE_T}: {repeated} frames repeat what was before",
        )


def _lengths(wish: Wish) -> tuple[int, ...]:
    """Frames of each clip, each 4k + 1, the longer ones first."""
    repeated = 1 + wish.overlap
    fewest = 1 + -(-max(0, wish.frames - MAX_CLIP_FRAMES) // (MAX_CLIP_FRAMES - repeated))
    most = max(fewest, (wish.frames - repeated) // VAE_STRIDE_T)  # at least 4 new frames in each
    count = fewest if wish.segments is None else wish.segments
    if not fewest <= count <= most:
        raise _refuse("segments", f"must be {fewest} to {most} for {wish.frames} frames, got {count}")
    return clip_lengths(wish.frames, count, wish.overlap)


def _clip(wish: Wish, i: int, frames: int, is_last: bool) -> Clip:
    name = wish.layout if is_last else "svi"
    layout = LAYOUTS[name]
    exact = wish.policy == "exact"
    # One latent more gives one frame too many: the one before the end picture goes.
    exact_cut = -2 if layout.end_alone else None
    repeated = wish.overlap if layout.from_start else 1 + wish.overlap
    return Clip(
        index=wish.first_index + i,
        layout=name,
        frames=frames,
        latent_frames=(frames - 1) // VAE_STRIDE_T + 1 + (layout.extra_latent or (layout.end_alone and exact)),
        seed=wish.seed + SEED_STRIDE * (wish.first_index + i),
        prompt=wish.prompts[min(i, len(wish.prompts) - 1)],
        drop=repeated if i > 0 or wish.continues else 0,
        cut=exact_cut if exact else layout.window_cut,
    )


def _refuse(field: str, sentence: str) -> InvalidInput:
    return InvalidInput([Problem(field, sentence)])
