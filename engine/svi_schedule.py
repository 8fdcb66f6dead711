"""How the two experts run for one request: the profile's row, with the request's own choices in it."""

from dataclasses import dataclass

from engine.denoise import PhaseRun
from engine.profile import Profile
from engine.scheduler import reference_timesteps, split_at, split_counts
from schemas.svi_schema import SviEndframeRequest


@dataclass(frozen=True)
class Schedule:
    """The plan of one sampler run. A variation is another value of it: nothing shared is changed."""

    high: PhaseRun
    low: PhaseRun
    flow_shift: float

    @property
    def phases(self) -> tuple[PhaseRun, PhaseRun]:
        return self.high, self.low

    @property
    def steps(self) -> int:
        return self.high.steps + self.low.steps

    @property
    def is_guided(self) -> bool:
        return self.high.is_guided or self.low.is_guided


def schedule_for(profile: Profile, request: SviEndframeRequest) -> Schedule:
    """The schedule of `profile`, with what `request` says in its place.

    Raises:
        InvalidInput: one of the experts would not run.
        ValueError: the profile has no two phases on the Euler grid.
    """
    row = profile.schedule
    if row.solver != "euler" or row.flow_shift is None or row.switch_threshold is None:
        raise ValueError(f"{profile.name} has no two phases on the Euler grid")
    steps = row.steps if request.num_inference_steps is None else request.num_inference_steps
    flow_shift = _either(request.flow_shift, row.flow_shift)
    if request.high_steps is not None and request.low_steps is not None:
        split = split_counts(request.high_steps, request.low_steps)
    else:
        threshold = _either(request.switch_threshold, row.switch_threshold)
        split = split_at(reference_timesteps(steps, flow_shift), threshold)
    high, low = profile.phases
    return Schedule(
        PhaseRun("high", split.high, _either(request.guidance_scale, high.guidance_scale)),
        PhaseRun("low", split.low, _either(request.guidance2_scale, low.guidance_scale)),
        flow_shift,
    )


def _either(asked: float | None, otherwise: float) -> float:
    return otherwise if asked is None else asked
