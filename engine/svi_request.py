"""What a `svi_endframe` request comes to by itself, and what of it is refused before a weight is loaded.

The backend decides by the same functions. Nothing here imports torch until a request asks for what needs it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.chain_state import check_fits, motion_shape, unpack_state
from engine.geometry import VAE_STRIDE_S, VAE_STRIDE_T, LatentShape, fit_area
from engine.multipliers import parse_multipliers
from engine.namesake import import_diffusers
from engine.profile import Profile
from engine.published import published_values
from schemas.errors import InvalidInput, Problem
from schemas.svi_schema import SviEndframeRequest

PHASES: tuple[Literal["high", "low"], ...] = ("high", "low")


def check_inputs(request: SviEndframeRequest, profile: Profile, pictures: Mapping[str, Any]) -> None:
    """Refuse strengths and sizes that cannot run. Without torch.

    `pictures`: decoded, by field; empty before they are fetched, and then a size that follows them is not looked at.

    Raises:
        InvalidInput: as `asked_strengths` and `scene_size`.
    """
    if request.loras_multipliers is not None:
        asked_strengths(profile, request.loras_multipliers)
    if pictures or request.size is not None or request.state is not None:
        scene_size(request, pictures, profile)


def check_plan(request: SviEndframeRequest, profile: Profile) -> None:
    """Refuse a state, clips and steps that cannot run. What a request leaves to its profile is not looked at.

    Raises:
        InvalidInput: as `unpack_state`, `clips_for` and `schedule_for`.
    """
    if request.state is not None:
        unpack_state(request.state)  # its numbers; all else of it is told without torch
    if request.return_state:
        from engine.svi_clips import clips_for

        clips_for(request)
    if request.given("flow_shift", "switch_threshold"):  # any number of steps begins and ends at the same two
        import_diffusers()
        from engine.svi_schedule import schedule_for

        schedule_for(profile, request)


def asked_strengths(profile: Profile, multipliers: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Strengths as [LoRA][phase].

    Raises:
        InvalidInput: they do not fit the profile's LoRAs.
    """
    return parse_multipliers(multipliers, len(profile.loras), len(PHASES))


def scene_size(request: SviEndframeRequest, pictures: Mapping[str, Any], profile: Profile) -> tuple[int, int]:
    """(height, width): as asked, else the state's, else from the aspect of what the video starts on.

    Raises:
        InvalidInput: a side is smaller than the model draws; nothing is there to start on; the state is none, or of
            another size.
    """
    motion = None if request.state is None else motion_shape(request.state)
    if request.size is not None:
        height, width = request.size
    elif motion is not None:
        height, width = VAE_STRIDE_S * motion.latent.height, VAE_STRIDE_S * motion.latent.width
    else:
        first = frames_of(_opening(pictures))[0]
        height, width = fit_area(first.width / first.height, profile.max_area)
    if min(height, width) < profile.min_side:
        raise InvalidInput(
            [Problem("resolution", f"must have sides of at least {profile.min_side}, got {width}x{height}")]
        )
    if motion is not None:
        taken = LatentShape(request.overlap // VAE_STRIDE_T, height // VAE_STRIDE_S, width // VAE_STRIDE_S)
        check_fits(motion, taken, published_values(profile.component("vae"))["z_dim"])
    return height, width


def frames_of(value: Any) -> Sequence[Any]:
    """The pictures of a field that holds one or several."""
    return value if isinstance(value, Sequence) else [value]


def _opening(pictures: Mapping[str, Any]) -> Any:
    for name in ("image_start", "image_refs", "prefix_video"):
        if name in pictures:
            return pictures[name]
    raise InvalidInput([Problem("image_start", "is missing; give the start picture, or image_refs")])
