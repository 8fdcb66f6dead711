"""What this worker would do on this card, for a person: `handler.py --plan`, and the log of a start.

For every profile that is baked: where its parts are, why not something faster, and the longest clip of each usual
size, which says what would be refused.
"""

from collections.abc import Iterator
from contextlib import suppress

from engine import weights
from engine.activations import usual_shape
from engine.admission import Gate, Limits
from engine.demand import Demand
from engine.geometry import VAE_STRIDE_T, VideoShape
from engine.profiles import PROFILES, Profile
from engine.residency import GIB, plan
from engine.settings import Settings
from schemas.errors import RequestTooLarge, WeightsMissing

SIZES = ((480, 832), (720, 1280), (1280, 1280))  # height, width
PICTURES = ((1024, 1024), (2048, 2048), (4096, 4096))
MOST_FRAMES = 161  # that `video` takes; the other modes' clips have their profile's length
MOST_PICTURES = 4


class NothingFits(Exception):
    """A baked profile has no placement on this card and host, or none is baked. The text is the whole report."""


def report(settings: Settings, limits: Limits, capability: tuple[int, int] | None) -> str:
    """The plan of every profile that is baked. `capability`: of the card, None where there is none.

    Raises:
        NothingFits: a profile cannot run here, or there is none.
        WeightsCorrupt: a bake is damaged.
    """
    found = list(_baked(settings))
    whose = "this card" if capability else "no card here; as on one"
    host = "" if limits.host_bytes is None else f", and {limits.host_bytes / GIB:.2f} GiB of host memory for weights"
    lines = [f"{whose} with {limits.budget_bytes / GIB:.2f} GiB{host}"]
    is_well = bool(found)
    for profile, usual in found:
        try:
            made = plan(
                profile,
                limits.budget_bytes,
                precision=limits.precision,
                capability=capability,
                shape=usual,
                host_bytes=limits.host_bytes,
            )
            lines += ["", made.table(), *_limits(Gate(profile, limits))]
        except RequestTooLarge as error:
            is_well = False
            lines += ["", f"{profile.name}: {error.sentence}", *_limits(Gate(profile, limits))]
    text = "\n".join(lines if found else [*lines, "no profile is baked where this worker looks"])
    if not is_well:
        raise NothingFits(text)
    return text


def _baked(settings: Settings) -> Iterator[tuple[Profile, VideoShape]]:
    """One profile a bake, since those that differ only in how they run share a placement, and its usual size.

    A twin's is that of the model it stands for: the plan is the one of the real weights.
    """
    seen = set()
    for row in PROFILES.values():
        with suppress(WeightsMissing):
            profile = weights.locate(row, settings).profile
            if profile.folder not in seen:
                seen.add(profile.folder)
                yield profile, usual_shape(row)


def _limits(gate: Gate) -> Iterator[str]:
    is_video = gate.profile.max_frames > 1
    most_frames = MOST_FRAMES if "video" in gate.profile.modes else gate.profile.max_frames
    for height, width in SIZES if is_video else PICTURES:
        if is_video:
            counts = range(most_frames, 0, -VAE_STRIDE_T)
            fitting = next((n for n in counts if gate.fits(Demand(VideoShape(n, height, width), 0))), 0)
            what, most = "frames a clip", most_frames
        else:
            pictures = range(MOST_PICTURES, 0, -1)
            fitting = next((n for n in pictures if gate.fits(Demand(VideoShape(1, height, width), 0, images=n))), 0)
            what, most = "pictures at once", MOST_PICTURES
        fate = f"up to {fitting} {what}" + ("" if fitting == most else ", more is refused")
        yield f"  {width}x{height}: {fate if fitting else 'refused'}"
