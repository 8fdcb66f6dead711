"""Tiny twins: repositories of the published shape with random weights, built without a network.

A twin has the classes, keys, files and tokenizers of the real model and few parameters. The whole path runs with
it on two CPU cores in seconds, the bake included. What it paints is no art, but the video twins do show what they
were given; see engine/twin_weights.py.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.parts import library_class
from engine.profile import Component, Lora, Profile
from engine.published import published_values
from engine.tensorfile import DTYPES
from engine.twin_tokenizers import CLIP_SIZE, UMT5_SIZE, write_clip, write_umt5
from engine.twin_weights import HEAD, WIDTH, carry_colours, follow_pictures

# What is smaller than published; all else is the same: strides, patch, latent statistics, schedule.
WAN = {
    "num_attention_heads": 2, "attention_head_dim": HEAD, "ffn_dim": 128, "freq_dim": 32, "num_layers": 3,
    "text_dim": 32,
}  # fmt: skip
CLIP_TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
    "projection_dim": 16, "vocab_size": CLIP_SIZE,
}  # fmt: skip
UNET = {"norm_num_groups": 4, "layers_per_block": 1, "addition_time_embed_dim": 8}
SMALLER: Mapping[str, Mapping[str, Any]] = {
    "wan21_i2v_transformer": {**WAN, "image_dim": 32, "added_kv_proj_dim": WIDTH},
    "wan22_i2v_transformer": WAN,
    "wan_vae": {"base_dim": 4, "num_res_blocks": 1},
    "umt5_xxl": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "vocab_size": UMT5_SIZE,
    },
    "wan21_image_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
        "projection_dim": 32,
    },
    "sdxl_text_encoder": CLIP_TEXT,
    "sdxl_text_encoder_2": CLIP_TEXT,
    "sdxl_unet": {
        **UNET, "block_out_channels": [8, 16, 16], "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 32, "transformer_layers_per_block": [1, 1, 1],
        "projection_class_embeddings_input_dim": 64,  # six numbers of 8 and the pooled text of 16
    },
    "sdxl_refiner_unet": {
        **UNET, "block_out_channels": [8, 16, 16, 16], "attention_head_dim": [1, 1, 2, 2],
        "cross_attention_dim": 16, "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 56,  # five numbers of 8 and the pooled text of 16
    },
    "sdxl_vae": {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
}  # fmt: skip

SHOWING: Mapping[str, Callable[[Any], None]] = {
    "AutoencoderKLWan": carry_colours,
    "WanTransformer3DModel": follow_pictures,
}
"""What is not left random: class -> the hand that sets its weights."""

LORA_RANK = 4
LORA_SIZE = 0.03  # of its factors: the product is as large as the random part of the weights
LORA_MODULES = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)
"""What the published files change in each block, by the original repository's names."""


def write_upstream(profile: Profile, root: Path) -> None:
    """Write the repositories that `profile` is fetched from, tiny, below `root` as <owner>/<name>/..."""
    for component in profile.components:
        folder = root / component.source.repo / component.subfolder
        folder.mkdir(parents=True, exist_ok=True)
        if component.dtype is not None:
            _write_model(component, folder)
        elif component.published is not None:
            _write_json(folder / _config_name(component), published_values(component))
        elif component.class_name == "CLIPTokenizer":
            write_clip(folder, pad="<|endoftext|>" if component.name == "tokenizer" else "!")
        else:
            write_umt5(folder)
    for lora in profile.loras:
        path = root / lora.source.repo / lora.file
        path.parent.mkdir(parents=True, exist_ok=True)
        style = "lightx2v" if "lightx2v" in lora.file else "svi"
        save_file(lora_tensors(lora, style), path)


def twin_values(component: Component) -> dict[str, Any]:
    """The twin's configuration: the published one with smaller sizes."""
    return {**published_values(component), **SMALLER[str(component.published)]}


def lora_tensors(lora: Lora, style: str) -> dict[str, torch.Tensor]:
    """A random LoRA of one seed for the Wan2.2 twin in one of the three published key styles.

    svi: no prefix, lora_A.default; kijai: diffusion_model. and lora_A; lightx2v: the same, lora_down, alpha.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(lora.file.encode()))
    sizes = {"ffn.0": (WAN["ffn_dim"], WIDTH), "ffn.2": (WIDTH, WAN["ffn_dim"])}
    tensors: dict[str, torch.Tensor] = {}
    for block in range(WAN["num_layers"]):
        for module in LORA_MODULES:
            rows, columns = sizes.get(module, (WIDTH, WIDTH))
            down = LORA_SIZE * torch.randn(LORA_RANK, columns, generator=generator)
            up = LORA_SIZE * torch.randn(rows, LORA_RANK, generator=generator)
            tensors |= _styled(f"blocks.{block}.{module}", down, up, style)
    return tensors


def _styled(module: str, down: torch.Tensor, up: torch.Tensor, style: str) -> dict[str, torch.Tensor]:
    if style == "svi":
        return {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
    if style == "kijai":
        key = f"diffusion_model.{module}"
        return {f"{key}.lora_A.weight": down.half(), f"{key}.lora_B.weight": up.half()}
    key = f"diffusion_model.{module}"
    alpha = torch.tensor(float(LORA_RANK // 2))
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def _write_model(component: Component, folder: Path) -> None:
    """Weights by the library's own initialisation, one seed a component, in files as published."""
    values = twin_values(component)
    _write_json(folder / "config.json", values)
    cls = library_class(component)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{component.source.repo}/{component.subfolder}".encode()))
        model = cls.from_config(values) if component.library == "diffusers" else cls(cls.config_class.from_dict(values))
        if component.class_name in SHOWING:
            SHOWING[component.class_name](model)
    tied = dict(component.tied)
    published = DTYPES["fp16" if component.variant == "fp16" else "fp32"]
    state = {
        _published_name(component, name): tensor.to(published).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    stem = "diffusion_pytorch_model" if component.library == "diffusers" else "model"
    if component.class_name in ("WanTransformer3DModel", "UMT5EncoderModel"):
        _write_shards(state, folder, stem)
    else:
        infix = f".{component.variant}" if component.variant else ""
        save_file(state, folder / f"{stem}{infix}.safetensors", metadata={"format": "pt"})


def _published_name(component: Component, name: str) -> str:
    return name if name.startswith(component.prefix) else component.prefix + name


def _write_shards(state: Mapping[str, torch.Tensor], folder: Path, stem: str) -> None:
    """Two shards and their index, as the big models are published."""
    names = list(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        shard = f"{stem}-{number:05}-of-{len(halves):05}.safetensors"
        save_file({name: state[name] for name in half}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    size = sum(tensor.nbytes for tensor in state.values())
    _write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _config_name(component: Component) -> str:
    return "preprocessor_config.json" if component.library == "transformers" else "scheduler_config.json"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
