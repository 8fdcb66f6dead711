"""Requests that ask for less than a given one, in one respect at a time, from the largest down.

Frames, size, pictures, steps, or the same film in more clips. Every one is a request that the schema takes; whether a
card does is for `admission` to say.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from engine.demand import Size
from engine.geometry import VAE_STRIDE_T
from engine.profile import Profile
from schemas.image_schema import ImageRequest
from schemas.request import Request
from schemas.svi_schema import SviEndframeRequest
from schemas.video_schema import VideoRequest

FEWEST_FRAMES = 5  # of the schema: two latent frames


class Ask(NamedTuple):
    """A request, and the size of the picture that it changes, where that counts and is known."""

    request: Request
    size: Size
    """In effect: as asked, or as large as a picture can make it."""
    given: Size | None = None

    def with_(self, **values: Any) -> "Ask":
        return self._replace(request=self.request.model_copy(update=values))

    def words(self) -> str:
        """Such as "832x480 with 81 frames"."""
        size = f"{self.size.width}x{self.size.height}"
        if isinstance(self.request, ImageRequest):
            count = self.request.num_images
            return f"1 picture of {size}" if count == 1 else f"{count} pictures of {size}"
        if isinstance(self.request, SviEndframeRequest) and self.request.segments is not None:
            return f"{size} with {self.request.total_frames} frames as {self.request.segments} clips"
        return f"{size} with {_frames(self.request)} frames"


Way = Callable[[Ask, Profile], Iterator[Ask]]


def fewer_frames(ask: Ask, _profile: Profile) -> Iterator[Ask]:
    field = "num_frames" if isinstance(ask.request, VideoRequest) else "video_length"
    for frames in range(_frames(ask.request) - VAE_STRIDE_T, FEWEST_FRAMES - 1, -VAE_STRIDE_T):
        yield ask.with_(**{field: frames})


def more_clips(ask: Ask, _profile: Profile) -> Iterator[Ask]:
    """The same film: shorter clips need less of the card at once."""
    if isinstance(ask.request, SviEndframeRequest):
        for clips in range(ask.request.clip_count + 1, ask.request.possible_clips[1] + 1):
            yield ask.with_(segments=clips, video_length=ask.request.total_frames)


def smaller_sizes(ask: Ask, profile: Profile) -> Iterator[Ask]:
    """Of about the same aspect, the longer side shrinking by the grid's step; not where a `state` fixes the size."""
    if isinstance(ask.request, SviEndframeRequest) and ask.request.state is not None:
        return
    multiple, longer = profile.size_multiple, max(ask.size)
    for side in range((longer - 1) // multiple * multiple, 0, -multiple):
        sides = [min(length, round(length * side / longer / multiple) * multiple) for length in ask.size]
        if min(sides) >= min(profile.min_side, *ask.size):
            yield _resized(ask, Size(*sides))


def fewer_pictures(ask: Ask, _profile: Profile) -> Iterator[Ask]:
    if isinstance(ask.request, ImageRequest):
        for count in range(ask.request.num_images - 1, 0, -1):
            yield ask.with_(num_images=count)


def fewer_steps(ask: Ask, profile: Profile) -> Iterator[Ask]:
    """Not where two fields share the steps."""
    field, steps = steps_of(ask.request, profile)
    fewest = 2 if isinstance(ask.request, SviEndframeRequest) else 1  # each expert has one
    for fewer in range(steps - 1, fewest - 1, -1):
        yield ask.with_(**{field: fewer})


def steps_of(request: Request, profile: Profile) -> tuple[str, int]:
    """The field that holds the request's steps, and how many; 0 where it cannot be told in one number."""
    if isinstance(request, ImageRequest) and request.image_url is not None:
        return "refiner_inference_steps", request.refiner_inference_steps
    if isinstance(request, SviEndframeRequest) and request.counted_steps is not None:
        return "high_steps", 0
    return "num_inference_steps", getattr(request, "num_inference_steps", None) or profile.schedule.steps


def _frames(request: Request) -> int:
    return request.total_frames if isinstance(request, VideoRequest | SviEndframeRequest) else 1


def _resized(ask: Ask, size: Size) -> Ask:
    fields: Mapping[str, Any] = {"height": size.height, "width": size.width}
    if isinstance(ask.request, SviEndframeRequest):
        fields = {"resolution": f"{size.width}x{size.height}"}
    if ask.given is not None:
        return ask._replace(size=size, given=size)
    return ask.with_(**fields)._replace(size=size)
