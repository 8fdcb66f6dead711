from dataclasses import replace

import pytest

from engine.denoise import PhaseRun
from engine.profiles import PROFILES
from engine.svi_schedule import Schedule, schedule_for
from schemas.input_schema import parse_request

SVI, FLF = (PROFILES[f"wan_2_2_i2v_lightning_svi_{name}"] for name in ("3_3", "endframe"))


def schedule(profile=SVI, **fields):
    payload = {"mode": "svi_endframe", "image_start": "data:,x", "image_end": "data:,x", **fields}
    return schedule_for(profile, parse_request(payload))


def test_profile_3_3_runs_two_high_and_four_low_steps_without_guidance():
    assert schedule() == Schedule(PhaseRun("high", 2, 1.0), PhaseRun("low", 4, 1.0), 5.0)


def test_profile_endframe_guides_the_high_phase():
    assert schedule(FLF) == Schedule(PhaseRun("high", 2, 3.0), PhaseRun("low", 4, 1.0), 5.0)


@pytest.mark.parametrize(
    ("fields", "high", "low", "shift"),
    [
        ({"guidance_scale": 0.0}, (2, 0.0), (4, 1.0), 5.0),
        ({"guidance2_scale": 2.5}, (2, 1.0), (4, 2.5), 5.0),
        ({"num_inference_steps": 8}, (3, 1.0), (5, 1.0), 5.0),
        ({"flow_shift": 3.0}, (2, 1.0), (4, 1.0), 3.0),
        ({"switch_threshold": 875.0}, (3, 1.0), (3, 1.0), 5.0),
        ({"high_steps": 4, "low_steps": 4}, (4, 1.0), (4, 1.0), 5.0),
    ],
)
def test_request_stands_in_the_profiles_place(fields, high, low, shift):
    assert schedule(**fields) == Schedule(PhaseRun("high", *high), PhaseRun("low", *low), shift)


@pytest.mark.parametrize(("guidance", "guided"), [((1.0, 1.0), False), ((1.1, 1.0), True), ((1.0, 3.0), True)])
def test_schedule_knows_whether_a_negative_prompt_counts(guidance, guided):
    made = schedule(guidance_scale=guidance[0], guidance2_scale=guidance[1])

    assert made.is_guided is guided
    assert made.steps == 6


def test_profile_of_another_solver_is_refused():
    other = replace(SVI, schedule=replace(SVI.schedule, solver="unipc"))

    with pytest.raises(ValueError, match="no two phases on the Euler grid"):
        schedule(other)
