"""A job that cannot finish in time is answered before the platform ends it, not one step after."""

import time

import pytest

from engine.progress import Progress
from schemas.errors import JobTimeout

STEP_S = 0.2


def run_steps(progress: Progress, steps: int, began: float) -> float:
    """Run steps of STEP_S until the deadline stops the job; returns when it did."""
    with pytest.raises(JobTimeout), progress.stage("denoise", steps) as step:
        for _ in range(steps):
            time.sleep(STEP_S)
            step()
    return time.monotonic() - began


def test_step_that_would_pass_the_deadline_is_not_begun() -> None:
    began = time.monotonic()
    stopped_s = run_steps(Progress(deadline_s=2.5 * STEP_S), 10, began)
    assert stopped_s < 2.5 * STEP_S  # after the second step; the third would have ended at 3 steps


def test_without_looking_ahead_the_same_job_overruns(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Progress.check
    monkeypatch.setattr(Progress, "check", lambda self, _ahead_s=0.0: check(self))
    began = time.monotonic()
    assert run_steps(Progress(deadline_s=2.5 * STEP_S), 10, began) > 2.5 * STEP_S


def test_slow_first_step_does_not_stop_a_job_that_can_finish() -> None:
    progress = Progress(deadline_s=1.0)
    with progress.stage("denoise", 3) as step:
        time.sleep(0.7)  # compiles
        step()
        for _ in range(2):
            time.sleep(0.02)
            step()
    assert progress.timings_s["denoise"] < 1.0


def test_last_step_of_a_stage_is_not_held_against_the_next_stage() -> None:
    progress = Progress(deadline_s=1.5 * STEP_S)
    with progress.stage("denoise", 1) as step:
        time.sleep(STEP_S)
        step()
    with progress.stage("decode"):
        pass
