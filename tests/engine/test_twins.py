"""The twins are the published models in small: classes, keys, files, tokenizers; and they make pictures of a sort."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from engine.convert import stored_shapes
from engine.lora import load_lora
from engine.profile import Component
from engine.profiles import BAKES, PROFILES
from engine.published import published_model, published_values
from engine.settings import Settings
from engine.tensorfile import TensorFiles
from engine.twins import lora_tensors, twin_values, write_upstream
from engine.weights import Parts, locate

MODELS = {part.folder: part for name in BAKES for part in PROFILES[name].components if part.dtype is not None}
SVI = PROFILES["wan22_i2v_svi"]


def parts_of(name: str, twins: Path) -> Parts:
    return locate(PROFILES[name], Settings(weights_dir=twins)).parts()


def patterns(names: Any) -> set[str]:
    """Tensor names without their block numbers."""
    return {re.sub(r"\d+", "#", name) for name in names}


@pytest.mark.parametrize("folder", MODELS)
def test_twin_is_published_under_the_names_of_the_real_model(folder: str, upstream: Path) -> None:
    component = MODELS[folder]
    files = TensorFiles(upstream / component.source.repo / component.subfolder, component.variant)
    real = patterns(stored_shapes(component, published_model(component)))
    names = patterns(name.removeprefix(component.prefix) for name in files.names())
    assert names <= real | {name.removeprefix(component.prefix) for name in real}
    assert len(files.names()) >= 20
    if component.prefix:
        assert all(name.startswith(component.prefix) for name in files.names())


@pytest.mark.parametrize("folder", MODELS)
def test_twin_differs_from_the_published_configuration_in_sizes_only(folder: str) -> None:
    component = MODELS[folder]
    twin, real = twin_values(component), published_values(component)
    assert twin.keys() == real.keys()
    changed = {key for key in real if twin[key] != real[key]}
    assert not changed & {"patch_size", "in_channels", "out_channels", "z_dim", "latents_mean", "latents_std"}
    assert not changed & {
        "temperal_downsample",
        "dim_mult",
        "qk_norm",
        "cross_attn_norm",
        "prediction_type",
        "patch_size",
    }


def test_wan_twins_read_the_text_that_their_encoder_writes() -> None:
    width = twin_values(MODELS["shared/umt5_xxl"])["d_model"]
    for folder in ("wan21_i2v_480p/transformer", "wan22_i2v_svi/transformer"):
        assert twin_values(MODELS[folder])["text_dim"] == width


def test_wan_twins_split_their_heads_over_three_axes() -> None:
    """Rope gives height and width 2 * (d // 6) each and time the rest; every axis must get a pair."""
    size = twin_values(MODELS["wan22_i2v_svi/transformer"])["attention_head_dim"]
    side = 2 * (size // 6)
    assert side >= 2 and size - 2 * side >= 2


def test_upstream_is_the_same_each_time(upstream: Path, tmp_path: Path) -> None:
    for name in BAKES:
        write_upstream(PROFILES[name], tmp_path)
    paths = sorted(path.relative_to(upstream) for path in upstream.rglob("*") if path.is_file())
    assert len(paths) > 40
    assert [path for path in paths if (tmp_path / path).read_bytes() != (upstream / path).read_bytes()] == []


def test_building_a_twin_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_upstream(PROFILES["sdxl"], tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_twins_are_small(twins: Path) -> None:
    assert sum(path.stat().st_size for path in twins.rglob("*") if path.is_file()) < 20_000_000


def test_experts_of_the_twin_differ(twins: Path) -> None:
    parts = parts_of("wan22_i2v_svi", twins)
    high, low = (parts.load(name).state_dict() for name in ("transformer", "transformer_2"))
    assert not torch.equal(high["blocks.0.attn1.to_q.weight"], low["blocks.0.attn1.to_q.weight"])


@pytest.mark.parametrize(("first", "second"), [("svi", "kijai"), ("svi", "lightx2v"), ("kijai", "lightx2v")])
def test_lora_twins_of_three_styles_are_one_lora(first: str, second: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    deltas = []
    for style in (first, second):
        path = tmp_path / f"high_{style}.safetensors"
        save_file(lora_tensors(SVI.loras[0], style), path)
        deltas.append({name: delta.dense() for name, delta in load_lora(path).deltas.items()})
    assert deltas[0].keys() == deltas[1].keys()
    assert len(deltas[0]) == 30
    factors = [0.5 if style == "lightx2v" else 1.0 for style in (first, second)]  # alpha is half the rank
    for name in deltas[0]:
        # fp16 factors: 2**-11 of each, and four of them are summed
        assert torch.allclose(deltas[0][name] / factors[0], deltas[1][name] / factors[1], rtol=2e-2, atol=1e-4)


def test_lora_twins_have_the_published_key_styles() -> None:
    keys = {style: sorted(lora_tensors(SVI.loras[0], style))[0] for style in ("svi", "kijai", "lightx2v")}
    assert keys == {
        "svi": "blocks.0.cross_attn.k.lora_A.default.weight",
        "kijai": "diffusion_model.blocks.0.cross_attn.k.lora_A.weight",
        "lightx2v": "diffusion_model.blocks.0.cross_attn.k.alpha",
    }


def test_bake_takes_both_styles_that_the_profile_names(upstream: Path) -> None:
    keys = []
    for lora in SVI.loras:
        with safe_open(upstream / lora.source.repo / lora.file, framework="pt") as file:
            keys.append(".default." in next(iter(file.keys())))
    assert keys == [True, True, False, False]


@pytest.mark.parametrize(
    ("profile", "name"), [("sdxl", "tokenizer"), ("sdxl", "tokenizer_2"), ("wan21_i2v_480p", "tokenizer")]
)
def test_tokenizer_is_a_real_one(profile: str, name: str, twins: Path) -> None:
    tokenizer = parts_of(profile, twins).load(name)
    prompts = ["a red fox runs", "a red fox walks", "zebra", "", "a red fox runs slowly in the snow"]
    ids = [tuple(tokenizer(prompt).input_ids) for prompt in prompts]
    assert len(set(ids)) == len(prompts)
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a red fox runs"
    padded = tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    assert padded.input_ids.shape == (5, 24)


def test_clip_tokenizers_end_with_the_highest_id_and_pad_as_published(twins: Path) -> None:
    """CLIP's text model finds the end by argmax over the ids when its configuration says eos_token_id 2."""
    first, second = (parts_of("sdxl", twins).load(name) for name in ("tokenizer", "tokenizer_2"))
    assert first.eos_token_id == len(first) - 1
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert (first.model_max_length, first("snow").input_ids[0]) == (77, first.bos_token_id)


def test_umt5_tokenizer_has_the_published_special_ids(twins: Path) -> None:
    tokenizer = parts_of("wan21_i2v_480p", twins).load("tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_vocabularies_fit_their_encoders(twins: Path) -> None:
    pairs = [
        ("sdxl", "tokenizer", "text_encoder"),
        ("sdxl", "tokenizer_2", "text_encoder_2"),
        ("wan21_i2v_480p", "tokenizer", "text_encoder"),
    ]
    for profile, tokenizer, encoder in pairs:
        parts = parts_of(profile, twins)
        assert len(parts.load(tokenizer)) == parts.load(encoder).config.vocab_size


@pytest.mark.parametrize("name", ["wan21_i2v_480p", "wan22_i2v_svi"])
def test_wan_twin_runs_diffusers_pipeline_and_makes_no_constant(name: str, twins: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    from tests.conftest import photo

    parts = parts_of(name, twins)
    boundary = 0.9 if name == "wan22_i2v_svi" else None
    components = {part.name: parts.load(part.name) for part in parts.profile.components}
    pipeline = WanImageToVideoPipeline(**components, boundary_ratio=boundary)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        photo(64, 64), "a red fox", height=64, width=64, num_frames=9, num_inference_steps=3,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames[0]  # fmt: skip
    assert frames.shape == (9, 3, 64, 64)
    assert torch.isfinite(frames).all()
    assert frames.std() > 0.02


def test_wan_vae_twin_keeps_time_as_the_real_one(twins: Path) -> None:
    vae = parts_of("wan22_i2v_svi", twins).load("vae")
    with torch.inference_mode():
        latents = vae.encode(torch.zeros(1, 3, 17, 32, 48)).latent_dist.mode()
        assert latents.shape == (1, 16, 5, 4, 6)
        assert vae.decode(latents).sample.shape == (1, 3, 17, 32, 48)


def test_image_encoder_twin_gives_257_tokens(twins: Path) -> None:
    """The Wan2.1 transformer splits its context at the 257 picture tokens."""
    encoder = parts_of("wan21_i2v_480p", twins).load("image_encoder")
    states = encoder(torch.zeros(1, 3, 224, 224), output_hidden_states=True).hidden_states
    assert states[-2].shape == (1, 257, 32)


def test_components_that_are_not_models_are_copied_as_published(twins: Path, upstream: Path) -> None:
    component: Component = PROFILES["sdxl"].component("tokenizer")
    source = upstream / component.source.repo / component.subfolder
    assert sorted(path.name for path in source.iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    assert all((twins / component.folder / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
