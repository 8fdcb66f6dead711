"""When a job counts as hung."""

import threading
from typing import Any

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


def test_a_beat_that_comes_while_the_loop_looks_is_not_mixed_with_the_last_one() -> None:
    """The first clip's steps are gone at the first beat of the second clip, and with them their median."""

    class Interrupting:
        step_factor, stage_s = 8.0, 900.0

        @property
        def step_s(self) -> float:
            pulse.beat(Update("denoise", 0, 6, 0.0, None))
            return 60.0

    limits: Any = Interrupting()
    clock = Clock()
    pulse = Pulse(limits, clock)
    for clock.now, step in ((0, 0), (2, 1)):
        pulse.beat(Update("denoise", step, 6, 0.0, None))
    clock.now = 4
    assert pulse.overdue() is None


def test_a_long_wait_for_another_machine_is_not_held_against_the_stage_that_follows() -> None:
    class Interrupting(float):
        def __sub__(self, other: float) -> float:
            waited_s = float(self) - other
            pulse.beat(Update("load", 0, 1, 0.0, None))
            return waited_s

    clock = Clock()
    pulse = pulse_at(clock, (0, "fetch", 0))
    clock.now = Interrupting(5000)
    assert pulse.overdue() is None


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
