"""When a job counts as hung."""

import threading

from apps.runpod_watch import Limits, Pulse, stacks
from engine.progress import Update

LIMITS = Limits(step_s=60, step_factor=8, stage_s=900)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pulse_at(clock: Clock, *beats: tuple[float, str, int]) -> Pulse:
    """A pulse that got these (time, stage, step)."""
    pulse = Pulse(LIMITS, clock)
    for at, stage, step in beats:
        clock.now = at
        pulse.beat(Update(stage, step, 6, 0.0, None))
    return pulse


def limit_s(clock: Clock, pulse: Pulse) -> float | None:
    """The first whole second since the last beat at which the pulse is overdue, within two hours."""
    last = clock.now
    for waited_s in range(7200):
        clock.now = last + waited_s
        if pulse.overdue():
            return waited_s - 1
    return None


def test_fast_steps_may_take_a_minute() -> None:
    clock = Clock()
    assert limit_s(clock, pulse_at(clock, (0, "denoise", 0), (2, "denoise", 1), (4, "denoise", 2))) == 60


def test_slow_steps_may_take_eight_times_their_median() -> None:
    clock = Clock()
    beats = [(0, "denoise", 0), (100, "denoise", 1), (120, "denoise", 2), (140, "denoise", 3)]
    assert limit_s(clock, pulse_at(clock, *beats)) == 160


def test_the_first_step_of_a_stage_may_load_and_compile() -> None:
    clock = Clock()
    assert limit_s(clock, pulse_at(clock, (0, "denoise", 0), (2, "denoise", 1), (3, "decode", 0))) == 900


def test_a_second_clip_starts_with_a_first_step_again() -> None:
    clock = Clock()
    assert limit_s(clock, pulse_at(clock, (0, "denoise", 0), (2, "denoise", 1), (3, "denoise", 0))) == 900


def test_before_any_stage_the_stage_limit_holds() -> None:
    clock = Clock()
    assert limit_s(clock, pulse_at(clock)) == 900


def test_waiting_for_other_machines_is_not_hanging() -> None:
    clock = Clock()
    assert limit_s(clock, pulse_at(clock, (0, "upload", 0))) is None
    clock = Clock()
    assert limit_s(clock, pulse_at(clock, (0, "fetch", 0))) is None


def test_overdue_says_where() -> None:
    clock = Clock()
    pulse = pulse_at(clock, (0, "denoise", 0), (2, "denoise", 1))
    clock.now = 70
    assert pulse.overdue() == "no step for 68.0 s in stage denoise after 1 steps"


def test_stacks_show_where_each_thread_stands() -> None:
    release = threading.Event()

    def wait_in_a_named_place() -> None:
        release.wait()

    thread = threading.Thread(target=wait_in_a_named_place, name="card_7")
    thread.start()
    text = stacks()
    release.set()
    thread.join()
    assert "thread card_7:" in text
    assert "wait_in_a_named_place" in text
