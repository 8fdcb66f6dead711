"""What a request asks of the card, in numbers: its size, how many frames or pictures at once, how many forwards.

Known from the request and its profile, without torch and before any file is fetched. Where the size follows a
picture's aspect, the largest that can come out counts. Only a picture that keeps its own size must be seen first.
"""

from dataclasses import dataclass
from typing import NamedTuple

from engine.chain_state import motion_shape
from engine.geometry import VAE_STRIDE_S, VideoShape, clip_lengths
from engine.profile import Profile
from schemas.image_schema import ImageRequest
from schemas.request import Request
from schemas.svi_rules import CLIP_FRAMES
from schemas.svi_schema import SviEndframeRequest
from schemas.video_schema import VideoRequest

GIGA = 1e9


class Size(NamedTuple):
    """In pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Demand:
    """One request. `shape`: the longest clip, which the card works on at once; 1 frame for pictures."""

    shape: VideoShape
    forwards: int
    """Of one clip, or of all pictures together: of the transformer, or of both UNets. A guided step is two."""
    frames: int = 1
    """Of all clips, those that repeat others included."""
    images: int = 1

    @property
    def work_gpx(self) -> float:
        """Gigapixels: the pixels of every frame or picture, counted once for each forward that works on it."""
        return self.images * self.frames * self.shape.height * self.shape.width * self.forwards / GIGA


def demand(request: Request, profile: Profile, given: Size | None = None) -> Demand | None:
    """What `request` asks for; None if that cannot be told yet, or for a mode that nobody has counted.

    `given`: size of the picture that an `image` request changes; None before it is fetched.

    Raises:
        InvalidInput: the request's `state` is none.
    """
    if isinstance(request, VideoRequest):
        height, width = _size(request.height, request.width, profile)
        passes = _passes(request.guidance_scale)
        shape = VideoShape(request.num_frames, height, width)
        return Demand(shape, request.num_inference_steps * passes, request.num_frames)
    if isinstance(request, SviEndframeRequest):
        return _of_clips(request, profile)
    if isinstance(request, ImageRequest):
        return _of_pictures(request, given)
    return None


def _of_clips(request: SviEndframeRequest, profile: Profile) -> Demand:
    height, width = request.size or (None, None)
    if request.size is None and request.state is not None:
        latent = motion_shape(request.state).latent
        height, width = VAE_STRIDE_S * latent.height, VAE_STRIDE_S * latent.width
    lengths = clip_lengths(request.total_frames, request.clip_count, request.overlap)
    # Undivided, 85 frames are two short clips. They count as the longest, so that more frames never need less.
    longest = min(request.total_frames, CLIP_FRAMES) if request.segments is None else lengths[0]
    shape = VideoShape(longest, *_size(height, width, profile))
    return Demand(shape, _two_phase_forwards(request, profile), sum(lengths))


def _two_phase_forwards(request: SviEndframeRequest, profile: Profile) -> int:
    """As the backend will run them: see engine.svi_schedule, which a test compares."""
    schedule = profile.schedule
    if request.high_steps is not None and request.low_steps is not None:
        counts = [request.high_steps, request.low_steps]
    else:
        steps = request.num_inference_steps or schedule.steps
        shift = request.flow_shift or schedule.flow_shift or 1.0
        threshold = schedule.switch_threshold if request.switch_threshold is None else request.switch_threshold
        sigmas = (1.0 - 0.999 * i / (steps - 1) for i in range(steps))  # linspace(1, 0.001, steps)
        high = sum(1000 * shift * s / (1 + (shift - 1) * s) > (threshold or 0.0) for s in sigmas)
        counts = [high, steps - high]
    asked = (request.guidance_scale, request.guidance2_scale)
    scales = [row.guidance_scale if scale is None else scale for scale, row in zip(asked, profile.phases, strict=True)]
    return sum(count * _passes(scale) for count, scale in zip(counts, scales, strict=True))


def _of_pictures(request: ImageRequest, given: Size | None) -> Demand | None:
    refiner_passes = _passes(request.refiner_guidance_scale)
    refined = int(request.refiner_inference_steps * request.strength)
    base = request.num_inference_steps
    if request.image_url is not None:
        if given is None:
            return None
        return Demand(VideoShape(1, *given), refined * refiner_passes, images=request.num_images)
    if request.splits and request.high_noise_frac is not None:
        base = round(base * request.high_noise_frac)
        refined = round(request.refiner_inference_steps * (1 - request.high_noise_frac))
    forwards = base * _passes(request.guidance_scale) + refined * refiner_passes
    return Demand(VideoShape(1, request.height, request.width), forwards, images=request.num_images)


def _size(height: int | None, width: int | None, profile: Profile) -> Size:
    """As asked; else the largest area that a picture's aspect can lead to."""
    if height is not None and width is not None:
        return Size(height, width)
    multiple = profile.size_multiple
    return Size(profile.height, -(-profile.max_area // (profile.height * multiple)) * multiple)


def _passes(guidance_scale: float) -> int:
    return 2 if guidance_scale > 1 else 1
