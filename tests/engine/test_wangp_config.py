"""The two published JSON model definitions become our two rows, field by field."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.profiles import PROFILES
from engine.wangp_config import import_config
from schemas.errors import InvalidInput

FILES = Path(__file__).parent / "wangp"
BASE = PROFILES["wan22_i2v_svi"]
SVI_3_3 = "wan_2_2_i2v_lightning_svi_3_3"
ENDFRAME = "wan_2_2_i2v_lightning_svi_endframe"


def imported(name: str, **changes):
    """Import a published file with some dotted fields replaced; None removes one."""
    config = json.loads((FILES / f"{name}.json").read_text())
    for field, value in changes.items():
        *path, last = field.split("__")
        place = config
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return import_config(json.dumps(config), name, BASE)


def without_corrections(profile):
    return replace(profile, settings={k: v for k, v in profile.settings.items() if k != "corrections"})


def test_import_config_gives_the_row_of_the_table_for_svi_3_3():
    profile = imported(SVI_3_3)
    assert profile == PROFILES[SVI_3_3]
    assert "corrections" not in profile.settings


def test_import_config_gives_the_row_of_the_table_for_endframe():
    assert without_corrections(imported(ENDFRAME)) == without_corrections(PROFILES[ENDFRAME])


def test_import_config_places_every_number():
    """Literal values, so that the table and the importer cannot be wrong together."""
    profile = imported(ENDFRAME)
    assert (profile.layout, profile.frames, profile.backend) == ("flf", 81, "wan_svi")
    assert (profile.schedule.solver, profile.schedule.steps) == ("euler", 6)
    assert (profile.schedule.flow_shift, profile.schedule.switch_threshold) == (5.0, 883.0)
    assert [(phase.expert, phase.guidance_scale) for phase in profile.phases] == [("high", 3.0), ("low", 1.0)]
    assert [(lora.expert, lora.strength) for lora in profile.loras] == [
        ("high", 1.0),
        ("low", 1.0),
        ("high", 1.2),
        ("low", 1.0),
    ]
    assert profile.settings["seed"] == 12345
    assert imported(SVI_3_3).layout == "svi_latent"


def test_import_config_corrects_the_switch_phase_and_says_so():
    profile = imported(ENDFRAME)
    assert profile.settings["model_switch_phase"] == 1
    assert profile.settings["corrections"] == (
        "model_switch_phase 2 was read as 1: with 2 phases, 2 means that the low-noise expert never runs and "
        "the low-noise LoRAs go to the high-noise expert",
    )


def test_import_config_takes_other_numbers():
    profile = imported(
        SVI_3_3, num_inference_steps=8, flow_shift=8, switch_threshold=900, guidance_scale=3.5, video_length=77
    )
    assert (profile.schedule.steps, profile.schedule.flow_shift, profile.schedule.switch_threshold) == (8, 8, 900)
    assert (profile.phases[0].guidance_scale, profile.frames) == (3.5, 77)
    assert PROFILES[SVI_3_3].schedule.steps == 6


def test_import_config_keeps_the_order_of_the_files_loras():
    loras = json.loads((FILES / f"{SVI_3_3}.json").read_text())["model"]["loras"]
    profile = imported(SVI_3_3, model__loras=loras[::-1], model__loras_multipliers=["0;1", "1.2;0", "0;1", "1;0"])
    assert profile.loras == PROFILES[SVI_3_3].loras[::-1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__modules": ["x"]}, "model.modules: is not a field that this worker knows"),
        ({"guidance3_scale": 1}, "guidance3_scale: is not a field that this worker knows"),
        ({"flow_shift": None}, "flow_shift: is missing"),
        ({"model__loras": None}, "model.loras: is missing"),
        ({"guidance_phases": 3}, "guidance_phases: Input should be 2"),
        ({"model_switch_phase": 3}, "model_switch_phase: Input should be 1 or 2"),
        ({"model__architecture": "i2v"}, "model.architecture: Input should be 'i2v_2_2'"),
        ({"model__URLs2": "t2v_2_2"}, "model.URLs2: Input should be 'i2v_2_2'"),
        ({"sample_solver": "unipc"}, "sample_solver: Input should be 'euler'"),
        ({"num_inference_steps": True}, "num_inference_steps: Input should be a valid integer"),
        ({"num_inference_steps": "6"}, "num_inference_steps: Input should be a valid integer"),
        ({"model__svi2pro": 1}, "model.svi2pro: Input should be a valid boolean"),
        ({"guidance_scale": 0.5}, "guidance_scale: Input should be greater than or equal to 1"),
        ({"video_length": 80}, "video_length: must be 4k + 1; the nearest are 77 and 81"),
        ({"video_length": 85}, "video_length: must be at most 81; longer films are chains"),
        (
            {"model__loras_multipliers": ["1;0", "0;1"]},
            "model.loras_multipliers: has 2 entries; this profile has 4 LoRAs",
        ),
        (
            {"model__loras_multipliers": ["1;0", "0;1", "0.75;0", "0;1"]},
            'model.loras_multipliers[2]: must be "1.2;0", which the bake merged; '
            "a request can ask for others by loras_multipliers",
        ),
        (
            {"model__loras_multipliers": ["1", "0;1", "1.2;0", "0;1"]},
            'model.loras_multipliers[0]: must be "1;0", which the bake merged; '
            "a request can ask for others by loras_multipliers",
        ),
    ],
)
def test_import_config_refuses_what_it_would_have_to_drop_or_guess(changes, sentence):
    with pytest.raises(InvalidInput) as caught:
        imported(SVI_3_3, **changes)
    assert caught.value.sentence == sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e400, 10**400])
@pytest.mark.parametrize("field", ["guidance_scale", "flow_shift", "switch_threshold", "seed", "video_length"])
def test_import_config_refuses_what_is_no_finite_number(field, value):
    with pytest.raises(InvalidInput):
        imported(SVI_3_3, **{field: value})


def test_import_config_refuses_loras_that_are_not_baked():
    loras = json.loads((FILES / f"{SVI_3_3}.json").read_text())["model"]["loras"]
    other = copy.copy(loras)
    other[2] = "https://example.com/other_high.safetensors"
    with pytest.raises(InvalidInput) as caught:
        imported(SVI_3_3, model__loras=other)
    assert caught.value.sentence == (
        "model.loras: wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors is baked in and must be named; "
        "other_high.safetensors is not baked into wan22_i2v_svi"
    )
    with pytest.raises(InvalidInput, match="names a file twice"):
        imported(SVI_3_3, model__loras=[*loras, loras[0]])


def test_import_config_lists_every_problem_at_once():
    with pytest.raises(InvalidInput) as caught:
        imported(SVI_3_3, seed=-1, extra=1, flow_shift=None)
    assert sorted(problem.field for problem in caught.value.problems) == ["extra", "flow_shift", "seed"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"model": 3}'])
def test_import_config_refuses_what_is_no_config(text):
    with pytest.raises(InvalidInput):
        import_config(text, "name", BASE)
