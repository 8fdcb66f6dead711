"""Integer rules of sizes and frame counts. Always frames, height, width."""

import math
from typing import NamedTuple

VAE_STRIDE_T = 4  # pixel frames a latent frame, after the first (AutoencoderKLWan.config.scale_factor_temporal)
VAE_STRIDE_S = 8  # pixels a latent pixel, each side (AutoencoderKLWan.config.scale_factor_spatial)
SIZE_MULTIPLE = 16  # VAE stride 8 times the transformer's patch of 2


class LatentShape(NamedTuple):
    """A video in the VAE's latent space; channels are the VAE's z_dim and stand in front."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Transformer tokens at Wan's patch (1, 2, 2)."""
        return self.frames * (self.height // 2) * (self.width // 2)


class VideoShape(NamedTuple):
    """A video in pixels."""

    frames: int
    height: int
    width: int

    def latent(self) -> LatentShape:
        """The shape after the causal VAE: the first frame alone, then four a latent frame.

        Raises:
            ValueError: frames is not 4k + 1, or a side is not a multiple of 8.
        """
        if not is_legal_frames(self.frames):
            raise ValueError(f"{self.frames} frames: {frames_advice(self.frames)}")
        if self.height % VAE_STRIDE_S or self.width % VAE_STRIDE_S:
            raise ValueError(f"{self.height}x{self.width}: sides must be multiples of {VAE_STRIDE_S}")
        return LatentShape(
            (self.frames - 1) // VAE_STRIDE_T + 1, self.height // VAE_STRIDE_S, self.width // VAE_STRIDE_S
        )


def is_legal_frames(frames: int) -> bool:
    """Whether the VAE maps this many frames without dropping one: 4k + 1."""
    return frames >= 1 and (frames - 1) % VAE_STRIDE_T == 0


def frames_advice(frames: int) -> str:
    """The sentence that refuses an illegal frame count."""
    below = max(1, (frames - 1) // VAE_STRIDE_T * VAE_STRIDE_T + 1)
    return f"must be 4k + 1; the nearest are {below} and {below + VAE_STRIDE_T}"


def clip_lengths(frames: int, clips: int, overlap: int) -> tuple[int, ...]:
    """Divide a film of `frames` into `clips` of about equal length, the longer ones first; each is 4k + 1.

    Every clip but the first begins on the anchor's frame and the `overlap` frames of the clip before.
    """
    groups = (frames + (1 + overlap) * (clips - 1) - clips) // VAE_STRIDE_T
    return tuple(1 + VAE_STRIDE_T * (groups // clips + (i < groups % clips)) for i in range(clips))


def fit_area(aspect: float, max_area: int, multiple: int = SIZE_MULTIPLE) -> tuple[int, int]:
    """The (height, width) on the grid of `multiple` with width / height nearest to `aspect` and area <= max_area.

    Each side is the exact one rounded down or up, never below one multiple: of the four pairs, those that fit the
    area compete by aspect, then by area.
    """
    height_down, width_down = (
        max(multiple, int(side // multiple) * multiple)
        for side in ((max_area / aspect) ** 0.5, (max_area * aspect) ** 0.5)
    )
    pairs = [
        (height, width)
        for height in (height_down, height_down + multiple)
        for width in (width_down, width_down + multiple)
        if height * width <= max_area or (height, width) == (height_down, width_down)
    ]
    return min(pairs, key=lambda pair: (abs(math.log(pair[1] / pair[0] / aspect)), -pair[0] * pair[1]))
