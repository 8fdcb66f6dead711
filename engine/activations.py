"""How much of the card a request needs besides the weights: the larger of a forward and the VAE.

A profile's own figure is measured once, at REFERENCE. From there a forward grows with its tokens, frames and area
alike. The VAE works on four frames at a time: it grows with the area, and only the pixels it is given, and the noise
and condition around it, grow with the frames. A UNet and its VAE take all pictures of a request at once.

The estimate never falls when frames, height, width or the number of pictures grow: whatever is smaller than an
admitted request is admitted.
"""

from engine.geometry import VAE_STRIDE_T, VideoShape
from engine.profile import Profile

REFERENCE = VideoShape(81, 480, 832)  # where work_bytes and narrow_work_bytes of the video profiles were measured
REFERENCE_PICTURE = VideoShape(1, 1024, 1024)  # the same of those that make pictures

FORWARD_BYTES = 6_000_000_000
"""A bf16 forward at REFERENCE, eager. Counted from the block's tensors, an upper bound: the card's peak at that size
is the fp32 VAE's, so it was never seen by itself."""

WHOLE_VIDEO_SHARE = 0.11
"""Of the VAE's bytes at REFERENCE, those that hold every frame at once: three fp32 copies of the pixels."""

FIXED_PICTURE_SHARE = 0.2
"""Of a picture profile's bytes at REFERENCE_PICTURE, those that do not grow: 0.9 GB of workspaces."""


def work_bytes(profile: Profile, shape: VideoShape, images: int = 1, *, is_narrow: bool = False) -> int:
    """Bytes for one clip of `shape`, or for `images` pictures of that size at once.

    `is_narrow`: beside transformers in 8 bits.
    """
    at_reference = profile.narrow_work_bytes if is_narrow else profile.work_bytes
    area = shape.height * shape.width
    if profile.max_frames == 1:
        pixels = images * area / (REFERENCE_PICTURE.height * REFERENCE_PICTURE.width)
        return round(at_reference * (FIXED_PICTURE_SHARE + (1 - FIXED_PICTURE_SHARE) * pixels))
    areas = area / (REFERENCE.height * REFERENCE.width)
    forward_bytes = at_reference if is_narrow else min(FORWARD_BYTES, at_reference)
    forward = forward_bytes * areas * _latent_frames(shape.frames) / _latent_frames(REFERENCE.frames)
    films = areas * shape.frames / REFERENCE.frames
    vae = at_reference * ((1 - WHOLE_VIDEO_SHARE) * areas + WHOLE_VIDEO_SHARE * films)
    return round(max(forward, vae))


def usual_shape(profile: Profile) -> VideoShape:
    """What the profile makes where a request says nothing."""
    return VideoShape(profile.frames, profile.height, profile.width)


def _latent_frames(frames: int) -> int:
    return (frames - 1) // VAE_STRIDE_T + 1
