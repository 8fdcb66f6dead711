"""What a `svi_endframe` request is refused for by itself: before torch, before a picture, before a weight."""

import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from engine.chain_state import ChainState, pack_state
from engine.profiles import PROFILES
from engine.svi_request import check_inputs, check_plan, scene_size
from engine.svi_schedule import schedule_for
from schemas.errors import InvalidInput
from schemas.input_schema import parse_request
from tests.conftest import ROOT
from tests.engine.svi_parts import noise

SVI = PROFILES["wan_2_2_i2v_lightning_svi_3_3"]
PROFILE = replace(SVI, min_side=32)
GREY = Image.new("RGB", (64, 64), (128, 128, 128))
STATE = pack_state(ChainState(noise(1, height=8, width=12), 0, 1, bytes(32)))
PAYLOAD = {"mode": "svi_endframe", "image_start": "data:,x", "image_end": "data:,x"}


def request(**fields):
    return parse_request({**PAYLOAD, **fields})


@pytest.mark.parametrize(
    ("fields", "pictures", "size"),
    [
        ({"resolution": "96x64"}, {"image_start": GREY}, (64, 96)),
        ({}, {"image_start": Image.new("RGB", (1664, 960))}, (480, 832)),
        ({}, {"image_start": Image.new("RGB", (960, 1664))}, (832, 480)),
        ({}, {"image_refs": [GREY]}, (624, 624)),
        ({}, {"prefix_video": [GREY] * 9}, (624, 624)),
        ({"state": STATE}, {"image_start": GREY}, (64, 96)),
    ],
)
def test_size_is_as_asked_or_the_states_or_from_the_aspect_of_what_comes_first(fields, pictures, size):
    assert scene_size(request(**fields), pictures, PROFILE) == size


def test_size_of_another_state_is_refused():
    with pytest.raises(InvalidInput, match="state: holds 1 latents of 96x64; this job goes on from 1 latents of 32x32"):
        scene_size(request(resolution="32x32", state=STATE), {}, PROFILE)


def test_size_of_nothing_to_start_on_is_refused():
    with pytest.raises(InvalidInput, match="image_start: is missing"):
        scene_size(request(), {}, PROFILE)


@pytest.mark.parametrize("threshold", [None, 883.0, 10.0])
def test_any_number_of_steps_leaves_both_experts_a_step_where_the_threshold_does(threshold):
    """So a request that says no more of the schedule is not looked at."""
    split = {} if threshold is None else {"switch_threshold": threshold}
    runs = [schedule_for(SVI, request(num_inference_steps=steps, **split)) for steps in range(2, 101)]
    assert all(run.high.steps and run.low.steps for run in runs)


@pytest.mark.parametrize("fields", [{}, {"num_inference_steps": 8}, {"high_steps": 1, "low_steps": 1}])
def test_check_plan_passes_what_leaves_the_split_to_the_profile(fields):
    check_plan(request(**fields), SVI)


def test_check_inputs_refuses_without_torch():
    payloads = [
        {**PAYLOAD, "loras_multipliers": "1;0 0;1"},
        {**PAYLOAD, "resolution": "96x64"},
        {**PAYLOAD, "resolution": "256x256", "state": STATE},
    ]
    code = (
        "import sys; from engine.svi_request import check_inputs; from engine.profiles import resolve;"
        "from schemas.errors import InvalidInput; from schemas.input_schema import parse_request\n"
        f"for payload in {payloads!r}:\n"
        "    request = parse_request(payload)\n"
        "    try: check_inputs(request, resolve(request), {})\n"
        "    except InvalidInput as error: print(error.problems[0].field)\n"
        "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["loras_multipliers", "resolution", "state", "[]"]


def test_check_inputs_leaves_a_size_that_follows_a_picture_until_it_is_there():
    check_inputs(request(), SVI, {})
    with pytest.raises(InvalidInput, match="resolution: must have sides of at least 256, got 3984x96"):
        check_inputs(request(), SVI, {"image_start": Image.new("RGB", (4000, 100))})
