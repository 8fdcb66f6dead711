"""The full-size models, built from the published configurations on the meta device: counts, sizes, names."""

import json
from functools import cache
from typing import Any

import pytest

from engine.convert import execution_order, stored_shapes
from engine.parts import library_class, stored_dtype
from engine.profile import Component
from engine.profiles import PROFILES
from engine.published import FOLDER, differences, published_model, published_values

MODELS = {part.folder: part for profile in PROFILES.values() for part in profile.components if part.dtype is not None}


@cache
def model(folder: str) -> Any:
    return published_model(MODELS[folder])


def parameters(folder: str) -> int:
    shapes = stored_shapes(MODELS[folder], model(folder))
    return sum(_volume(shape) for shape in shapes.values())


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume


@pytest.mark.parametrize(
    ("folder", "billions"),
    [
        ("wan21_i2v_480p/transformer", 16.395),
        ("wan22_i2v_svi/transformer", 14.289),
        ("wan22_i2v_svi/transformer_2", 14.289),
        ("shared/umt5_xxl", 5.681),
        ("wan21_i2v_480p/image_encoder", 0.631),
        ("shared/wan_vae", 0.127),
        ("sdxl/unet", 2.567),
        ("sdxl/refiner_unet", 2.260),
        ("sdxl/vae", 0.084),
        ("sdxl/text_encoder", 0.123),
        ("sdxl/text_encoder_2", 0.695),
    ],
)
def test_published_model_has_the_published_parameter_count(folder: str, billions: float) -> None:
    assert parameters(folder) / 1e9 == pytest.approx(billions, abs=0.0005)


@pytest.mark.parametrize("folder", MODELS)
def test_row_states_the_bytes_that_the_bake_writes(folder: str) -> None:
    component = MODELS[folder]
    shapes = stored_shapes(component, model(folder))
    size = sum(_volume(shape) * stored_dtype(component, name).itemsize for name, shape in shapes.items())
    assert component.size_bytes == size


@pytest.mark.parametrize("folder", MODELS)
def test_row_keeps_in_fp32_what_the_library_keeps(folder: str) -> None:
    """transformers applies its list to fp16 only (`wo` of UMT5), and no such class of ours is in fp16."""
    component = MODELS[folder]
    if component.library == "diffusers":
        assert component.keep_fp32 == tuple(library_class(component)._keep_in_fp32_modules or ())


def test_wan_transformer_has_the_keys_that_the_loras_and_the_bake_name() -> None:
    shapes = stored_shapes(MODELS["wan22_i2v_svi/transformer"], model("wan22_i2v_svi/transformer"))
    assert len(shapes) == 1095
    assert shapes["patch_embedding.weight"] == (5120, 36, 1, 2, 2)
    assert shapes["blocks.39.attn1.to_q.weight"] == (5120, 5120)
    assert shapes["blocks.39.ffn.net.0.proj.weight"] == (13824, 5120)
    assert shapes["scale_shift_table"] == (1, 2, 5120)
    assert not [name for name in shapes if "add_k_proj" in name or "image_embedder" in name]


def test_wan21_transformer_has_image_keys() -> None:
    shapes = stored_shapes(MODELS["wan21_i2v_480p/transformer"], model("wan21_i2v_480p/transformer"))
    assert len(shapes) == 1303
    assert shapes["blocks.0.attn2.add_k_proj.weight"] == (5120, 5120)
    assert shapes["condition_embedder.image_embedder.ff.net.0.proj.weight"] == (1280, 1280)


def test_umt5_table_is_stored_once() -> None:
    shapes = stored_shapes(MODELS["shared/umt5_xxl"], model("shared/umt5_xxl"))
    assert shapes["shared.weight"] == (256384, 4096)
    assert "encoder.embed_tokens.weight" not in shapes


def test_execution_order_puts_blocks_in_order_and_the_head_last() -> None:
    folder = "wan22_i2v_svi/transformer"
    names = execution_order(list(stored_shapes(MODELS[folder], model(folder))))
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert blocks == sorted(blocks)
    assert names[0] == "patch_embedding.weight"
    assert names[-3:] == ["proj_out.weight", "proj_out.bias", "scale_shift_table"]


def test_execution_order_of_a_unet_goes_down_through_the_middle_and_up() -> None:
    names = execution_order(list(stored_shapes(MODELS["sdxl/unet"], model("sdxl/unet"))))
    sides = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert sides == [
        "conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks",
        "conv_norm_out", "conv_out",
    ]  # fmt: skip


def test_vae_statistics_are_the_class_defaults() -> None:
    """The repository publishes them; diffusers 0.42.1 repeats them as defaults of AutoencoderKLWan."""
    import inspect

    component = MODELS["shared/wan_vae"]
    values = published_values(component)
    defaults = inspect.signature(library_class(component).__init__).parameters
    assert len(values["latents_mean"]) == len(values["latents_std"]) == 16
    assert values["latents_mean"] == defaults["latents_mean"].default
    assert values["latents_std"] == defaults["latents_std"].default


def test_scheduler_is_built_from_its_published_values() -> None:
    component = PROFILES["wan21_i2v_480p"].component("scheduler")
    scheduler = library_class(component).from_config(published_values(component))
    assert (scheduler.config.flow_shift, scheduler.config.use_flow_sigmas) == (3.0, True)


def test_differences_says_what_moved_and_ignores_provenance() -> None:
    component = PROFILES["sdxl"].component("vae")
    found = {**published_values(component), "scaling_factor": 1.0, "_diffusers_version": "9"}
    assert differences(component, found) == ["scaling_factor: 0.13025 -> 1.0"]


def test_every_published_file_belongs_to_a_row() -> None:
    named = {part.published for profile in PROFILES.values() for part in profile.components if part.published}
    assert {path.stem for path in FOLDER.glob("*.json")} == named


def test_published_values_is_refused_for_a_tokenizer() -> None:
    component: Component = PROFILES["sdxl"].component("tokenizer")
    with pytest.raises(KeyError, match="tokenizer has no published configuration"):
        published_values(component)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_published_file_names_its_class(path: Any) -> None:
    values = json.loads(path.read_bytes())
    assert {"_class_name", "architectures", "image_processor_type"} & values.keys()
