"""Stages are timed, steps reported in order, and a cancel or deadline takes hold between two steps."""

import threading
import time

import pytest

from engine.progress import Progress, Update
from schemas.errors import Cancelled, JobTimeout


def run_job(progress: Progress, steps: int = 3) -> None:
    with progress.stage("load"):
        pass
    with progress.stage("denoise", steps) as step:
        for _ in range(steps):
            step()
    with progress.stage("upload"):
        pass


def test_updates_come_in_order_and_percent_never_falls() -> None:
    updates: list[Update] = []
    run_job(Progress(updates.append))
    assert [(u.stage, u.step, u.total) for u in updates] == [
        ("load", 0, 1), ("denoise", 0, 3), ("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3), ("upload", 0, 1),
    ]  # fmt: skip
    percents = [u.percent for u in updates]
    assert percents == sorted(percents)
    assert percents[-1] <= 100


def test_eta_is_known_only_once_a_step_was_measured() -> None:
    updates: list[Update] = []
    run_job(Progress(updates.append))
    denoise = [u for u in updates if u.stage == "denoise"]
    assert denoise[0].eta_s is None
    assert denoise[1].eta_s is not None
    assert denoise[3].eta_s == 0


def test_stages_are_timed_and_repeats_add_up() -> None:
    progress = Progress()
    run_job(progress)
    run_job(progress)
    assert set(progress.timings_s) == {"load", "denoise", "upload"}
    assert all(seconds >= 0 for seconds in progress.timings_s.values())


def test_cancel_stops_at_the_next_step() -> None:
    cancelled = threading.Event()
    progress = Progress(cancelled=cancelled)
    done = 0
    with pytest.raises(Cancelled), progress.stage("denoise", 5) as step:
        for _ in range(5):
            done += 1
            if done == 2:
                cancelled.set()
            step()
    assert done == 2


def test_cancelled_job_enters_no_further_stage() -> None:
    progress = Progress()
    progress.cancelled.set()
    with pytest.raises(Cancelled), progress.stage("upload"):
        pytest.fail("the stage was entered")


def test_deadline_ends_the_job_between_steps() -> None:
    progress = Progress(deadline_s=0.0)
    with pytest.raises(JobTimeout), progress.stage("denoise", 2) as step:
        step()


def test_time_of_a_failed_stage_is_kept() -> None:
    progress = Progress()
    with pytest.raises(RuntimeError), progress.stage("decode"):
        raise RuntimeError
    assert "decode" in progress.timings_s


def test_pause_ends_at_once_when_the_job_is_cancelled() -> None:
    progress = Progress()
    threading.Timer(0.05, progress.cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        progress.pause(60)
    assert time.monotonic() - started < 30


def test_pause_does_not_outlast_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(JobTimeout):
        Progress(deadline_s=0.05).pause(60)
    assert time.monotonic() - started < 30


def test_timed_counts_beside_its_stage() -> None:
    progress = Progress()
    with progress.stage("load"), progress.timed("load_import"):
        pass
    assert set(progress.timings_s) == {"load", "load_import"}
    assert progress.timings_s["load_import"] <= progress.timings_s["load"]


def test_added_seconds_are_summed_under_their_name() -> None:
    progress = Progress()
    progress.add("load_wait", 1.5)
    progress.add("load_wait", 2.0)
    assert progress.timings_s == {"load_wait": 3.5}
