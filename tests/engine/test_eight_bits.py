"""What goes into 8 bits and what does not, by class; and the bytes that a bake is then, counted tensor by tensor."""

import re

import pytest
from torch import nn

from engine.eight_bits import FORMS, KEEP_UMT5, to_eight_bits
from engine.linear8 import Linear8
from engine.parts import frame, stored_dtype
from engine.profile import Component, Profile
from engine.profiles import PROFILES
from engine.published import published_model

SDXL, WAN21, SVI = (PROFILES[name] for name in ("sdxl", "wan21_i2v_480p", "wan22_i2v_svi"))
ENCODER = SVI.component("text_encoder")


def counted_bytes(component: Component) -> int:
    """All tensors of the full-size model in the types that the bake writes, from the meta device."""
    state = frame(component, published_model(component)).state_dict()
    tied = dict(component.tied)
    return sum(
        tensor.numel() * stored_dtype(component, name).itemsize for name, tensor in state.items() if name not in tied
    )


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("folder", "name", "size_bytes"),
    [
        ("wan22_i2v_svi", "transformer", 14_594_836_608),
        ("wan22_i2v_svi", "transformer_2", 14_594_836_608),
        ("wan21_i2v_480p", "transformer", 16_711_303_808),
        ("wan22_i2v_svi", "text_encoder", 6_735_241_216),
    ],
)
def test_row_counts_every_tensor_of_the_8_bit_bake(folder: str, name: str, size_bytes: int, precision: str) -> None:
    component = PROFILES[folder].baked_in(precision).component(name)
    assert counted_bytes(component) == component.size_bytes == size_bytes


@pytest.mark.parametrize(
    ("profile", "precision", "size_bytes"),
    [
        (SVI, "fp8", 36_432_484_556),  # two experts, the encoder and the fp32 VAE
        (SVI, "int8", 36_432_484_556),
        (WAN21, "fp8", 26_477_179_468),  # one transformer, the encoder, the VAE, and the picture encoder in fp32
        (SVI, "bf16", 69_141_731_532),
    ],
)
def test_bake_in_8_bits_is_about_half(profile: Profile, precision: str, size_bytes: int) -> None:
    assert profile.baked_in(precision).size_bytes == size_bytes


def test_every_linear_layer_of_the_encoder_is_rounded_and_all_else_has_a_reason() -> None:
    model = published_model(ENCODER)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert to_eight_bits(model, ENCODER, "fp8").names == tuple(linears)
    assert len(linears) == 24 * 7  # q, k, v, o; two ways in and one out of the feed-forward
    wide = [name for name in model.state_dict() if not name.endswith(("weight_q", "weight_scale"))]
    reasons = {name: [why for pattern, why in KEEP_UMT5.items() if re.search(pattern, name)] for name in wide}
    assert [name for name, why in reasons.items() if len(why) != 1] == []
    assert {why for found in reasons.values() for why in found} == set(KEEP_UMT5.values())


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_encoder_rounds_weights_alone_and_transformers_their_activations_too(precision: str) -> None:
    kinds = {}
    for name in ("transformer", "text_encoder"):
        component = SVI.baked_in(precision).component(name)
        layers = frame(component, published_model(component)).modules()
        kinds[name] = {layer.kind for layer in layers if isinstance(layer, Linear8)}
    assert kinds == {"transformer": {precision}, "text_encoder": {f"{precision}-weights"}}


def test_only_classes_with_a_form_have_bytes_in_8_bits() -> None:
    parts = [part for profile in (SDXL, WAN21, SVI) for part in profile.components]
    assert {part.class_name for part in parts if part.narrow_size_bytes} == set(FORMS)
    assert [part.name for part in parts if part.class_name in FORMS and not part.narrow_size_bytes] == []


def test_component_without_a_form_is_refused() -> None:
    with pytest.raises(KeyError, match="AutoencoderKLWan"):
        to_eight_bits(nn.Linear(16, 16), SVI.component("vae"), "fp8")


def test_baked_in_gives_rounded_components_folders_of_their_own() -> None:
    folders = {part.name: part.folder for part in SVI.baked_in("fp8").components}
    assert folders == {
        "tokenizer": "shared/umt5_tokenizer",
        "text_encoder": "shared/umt5_xxl-fp8",
        "vae": "shared/wan_vae",
        "transformer": "wan22_i2v_svi-fp8/transformer",
        "transformer_2": "wan22_i2v_svi-fp8/transformer_2",
        "scheduler": "wan22_i2v_svi/scheduler",
    }
    assert SVI.baked_in("fp8").folder == "wan22_i2v_svi-fp8"


def test_baked_in_leaves_alone_what_is_baked_one_way_only() -> None:
    assert SVI.baked_in("bf16") is SVI
    assert SDXL.baked_in("fp8") is SDXL
    assert SVI.baked_in("fp8").baked_in("int8").folder == "wan22_i2v_svi-fp8"


@pytest.mark.parametrize(("profile", "precision"), [(SDXL, "fp16"), (SVI, "bf16"), (SVI.baked_in("int8"), "int8")])
def test_precision_is_that_of_the_largest_component(profile: Profile, precision: str) -> None:
    assert profile.precision == precision
