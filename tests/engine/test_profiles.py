"""The profile rows hold the published numbers, and a request finds its row."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from engine.profile import EXPERTS, Placement
from engine.profiles import BAKES, PROFILES, resolve
from schemas.errors import InvalidInput

SVI_3_3 = PROFILES["wan_2_2_i2v_lightning_svi_3_3"]
ENDFRAME = PROFILES["wan_2_2_i2v_lightning_svi_endframe"]
LIGHTNING = PROFILES["wan22_i2v_lightning"]


def request(mode: str, **fields: Any) -> Any:
    return SimpleNamespace(mode=mode, **fields)


@pytest.mark.parametrize(
    ("mode", "model_type", "name"),
    [
        ("image", None, "sdxl"),
        ("video", None, "wan21_i2v_480p"),
        ("video", "wan21_i2v_480p", "wan21_i2v_480p"),
        ("video", "wan22_i2v_lightning", "wan22_i2v_lightning"),
        ("svi_endframe", None, "wan_2_2_i2v_lightning_svi_3_3"),
        ("svi_endframe", "wan_2_2_i2v_lightning_svi_3_3", "wan_2_2_i2v_lightning_svi_3_3"),
        ("svi_endframe", "wan_2_2_i2v_lightning_svi_endframe", "wan_2_2_i2v_lightning_svi_endframe"),
    ],
)
def test_resolve_finds_the_row(mode: str, model_type: str | None, name: str) -> None:
    assert resolve(request(mode, model_type=model_type)).name == name


def test_resolve_takes_the_mode_alone_when_it_has_no_model_type() -> None:
    assert resolve(request("video")).name == "wan21_i2v_480p"


def test_resolve_names_the_nearest_row_for_a_typo() -> None:
    with pytest.raises(InvalidInput, match="did you mean wan_2_2_i2v_lightning_svi_3_3"):
        resolve(request("svi_endframe", model_type="wan_2_2_i2v_lightning_svi_33"))


def test_resolve_refuses_a_row_of_another_mode() -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve(request("svi_endframe", model_type="sdxl"))
    assert caught.value.problems[0].field == "model_type"


def test_bakes_are_the_four_folders() -> None:
    assert BAKES == ("sdxl", "wan21_i2v_480p", "wan22_i2v_svi", "wan22_i2v_lightning")
    assert {profile.folder for profile in PROFILES.values()} == set(BAKES)


def test_svi_3_3_has_the_published_numbers() -> None:
    schedule = SVI_3_3.schedule
    assert (schedule.solver, schedule.steps, schedule.flow_shift, schedule.switch_threshold) == ("euler", 6, 5.0, 883.0)
    assert [(phase.expert, phase.guidance_scale) for phase in SVI_3_3.phases] == [("high", 1.0), ("low", 1.0)]
    assert (SVI_3_3.frames, SVI_3_3.layout) == (81, "svi_latent")
    assert SVI_3_3.negative_prompt == "fading, breaking, shot cuts, jumpcuts, blurry, noise, distorted"
    assert dict(SVI_3_3.settings) == {
        "architecture": "i2v_2_2",
        "svi2pro": True,
        "loras_multipliers": ("1;0", "0;1", "1.2;0", "0;1"),
        "lock_guidance_phases": True,
        "group": "wan2_2",
        "guidance_phases": 2,
        "model_switch_phase": 1,
        "seed": 12345,
    }


def test_endframe_differs_in_layout_guidance_and_svi2pro_only() -> None:
    assert ENDFRAME.schedule == SVI_3_3.schedule
    assert [(phase.expert, phase.guidance_scale) for phase in ENDFRAME.phases] == [("high", 3.0), ("low", 1.0)]
    assert (ENDFRAME.layout, ENDFRAME.settings["svi2pro"]) == ("flf", False)
    assert ENDFRAME.settings["model_switch_phase"] == 1  # published as 2, which never reaches the low expert


def test_svi_loras_are_two_an_expert_at_the_published_strengths() -> None:
    assert [(lora.expert, lora.strength, "lightx2v" in lora.file) for lora in SVI_3_3.loras] == [
        ("high", 1.0, False), ("low", 1.0, False), ("high", 1.2, True), ("low", 1.0, True),
    ]  # fmt: skip
    low = SVI_3_3.component("transformer_2")
    assert ["low" in lora.file for lora in SVI_3_3.loras_of(low)] == [True, True]


def test_lightning_is_two_experts_with_lightx2v_alone_at_full_strength() -> None:
    schedule = LIGHTNING.schedule
    assert (schedule.solver, schedule.steps, schedule.flow_shift) == ("euler_distilled", 4, 5.0)
    assert schedule.switch_threshold == 900.0
    assert [(phase.expert, phase.guidance_scale) for phase in LIGHTNING.phases] == [("high", 1.0), ("low", 1.0)]
    assert [(lora.expert, lora.strength) for lora in LIGHTNING.loras] == [("high", 1.0), ("low", 1.0)]
    assert [lora.file for lora in LIGHTNING.loras] == [lora.file for lora in SVI_3_3.loras[2:]]
    assert [part.source for part in LIGHTNING.components] == [part.source for part in SVI_3_3.components]
    assert LIGHTNING.layout is None


@pytest.mark.parametrize("pair", list(combinations(("wan21_i2v_480p", "wan22_i2v_svi", "wan22_i2v_lightning"), 2)))
def test_wan_rows_share_encoder_tokenizer_and_vae(pair: tuple[str, str]) -> None:
    folders = [{part.folder for part in PROFILES[name].components} for name in pair]
    assert folders[0] & folders[1] == {"shared/umt5_xxl", "shared/umt5_tokenizer", "shared/wan_vae"}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_every_row_is_whole(profile: Any) -> None:
    names = [part.name for part in profile.components]
    assert len(names) == len(set(names))
    assert {row.component for row in profile.placement} == {part.name for part in profile.components if part.dtype}
    assert {EXPERTS[phase.expert] for phase in profile.phases} <= {*names, "transformer"}
    assert profile.height % profile.size_multiple == profile.width % profile.size_multiple == 0
    assert profile.height * profile.width == profile.max_area


@pytest.mark.parametrize(
    ("name", "gib"),
    [("sdxl", 14.86), ("wan21_i2v_480p", 41.65), ("wan22_i2v_svi", 37.72), ("wan22_i2v_lightning", 37.72)],
)
def test_placement_fits_a_48_gb_card(name: str, gib: float) -> None:
    assert PROFILES[name].vram_gib == pytest.approx(gib, abs=0.005)
    assert PROFILES[name].vram_gib < 44.5


def test_a_second_resident_expert_in_bf16_would_not_fit() -> None:
    """The control of the test above: the planner's sum notices what a 48 GB card cannot hold."""
    from dataclasses import replace

    both = tuple(Placement(row.component, "card") for row in SVI_3_3.placement)
    assert replace(SVI_3_3, placement=both).vram_gib > 44.5


def test_component_is_refused_when_the_row_has_none() -> None:
    with pytest.raises(KeyError, match="sdxl has no component transformer"):
        PROFILES["sdxl"].component("transformer")


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SVI_3_3.layout = "flf"
    with pytest.raises(TypeError):
        SVI_3_3.settings["svi2pro"] = False


def test_profiles_and_weights_import_without_torch() -> None:
    code = (
        "import sys, engine.profiles, engine.weights, engine.hub; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
