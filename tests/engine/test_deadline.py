"""A job that cannot finish in time is answered before the platform ends it, not one step after."""

from types import SimpleNamespace

import pytest

from engine.progress import Progress
from schemas.errors import JobTimeout


class Clock:
    """Time that only passes when a test says so."""

    now = 100.0

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("engine.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def run_steps(clock: Clock, deadline_s: float, steps_s: list[float]) -> int:
    """Run a stage of steps that last so long; returns how many were done when the deadline stopped the job."""
    done = 0
    progress = Progress(deadline_s=deadline_s)
    with pytest.raises(JobTimeout), progress.stage("denoise", len(steps_s)) as step:
        for seconds in steps_s:
            clock.pass_s(seconds)
            done += 1
            step()
    return done


def test_step_that_would_pass_the_deadline_is_not_begun(clock: Clock) -> None:
    assert run_steps(clock, 2.5, [1.0] * 10) == 2  # the third would end at 3


def test_without_looking_ahead_the_same_job_overruns(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Progress.check
    monkeypatch.setattr(Progress, "check", lambda self, _ahead_s=0.0: check(self))
    assert run_steps(clock, 2.5, [1.0] * 10) == 3


def test_slow_first_step_does_not_stop_a_job_that_can_finish(clock: Clock) -> None:
    progress = Progress(deadline_s=1.0)
    with progress.stage("denoise", 3) as step:
        for seconds in (0.75, 0.125, 0.125):  # the first one compiles
            clock.pass_s(seconds)
            step()
    assert progress.timings_s["denoise"] == 1.0


def test_last_step_of_a_stage_is_not_held_against_the_next_stage(clock: Clock) -> None:
    progress = Progress(deadline_s=1.5)
    with progress.stage("denoise", 1) as step:
        clock.pass_s(1.0)
        step()
    with progress.stage("decode"):
        pass
