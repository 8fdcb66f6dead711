"""The request as it ran: what a caller posts to get the same frames again."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.fields import side_problems
from schemas.request import Request, is_media
from schemas.svi_schema import SviEndframeRequest
from schemas.video_schema import VideoRequest


def effective(request: Request, seed: int, picture_hashes: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    """The request as plain JSON: every value explicit, no alias, media elided to "sha256:...".

    `picture_hashes`: for every given field that holds a picture, video or latent, its hex digest or digests.
    Posted again with the media put back in, it is the same job.

    Raises:
        KeyError: a given media field has no hash.
    """
    values = request.explicit()
    for name, value in values.items():
        if value is not None and is_media(type(request), name):
            hashes = picture_hashes[name]
            values[name] = f"sha256:{hashes}" if isinstance(hashes, str) else [f"sha256:{one}" for one in hashes]
    return {**values, "seed": seed}


def as_run(request: Request, profile: Any, height: int, width: int) -> Request:
    """`request` with what it left open filled in: from the profile that ran and the finished file's size.

    `profile`: an engine.profile.Profile. A size that no request may ask for, which an extreme aspect makes,
    stays open; the same picture gives it again.
    """
    has_legal_size = not side_problems(height=height, width=width)
    if isinstance(request, VideoRequest):
        return request.filled({"height": height, "width": width} if has_legal_size else {})
    if isinstance(request, SviEndframeRequest):
        high, low = profile.phases
        return request.filled(
            {
                "resolution": f"{width}x{height}" if has_legal_size else None,
                "num_inference_steps": profile.schedule.steps,
                "flow_shift": profile.schedule.flow_shift,
                "switch_threshold": profile.schedule.switch_threshold,
                "guidance_scale": high.guidance_scale,
                "guidance2_scale": low.guidance_scale,
            }
        )
    return request
