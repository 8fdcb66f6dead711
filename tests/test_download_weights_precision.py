"""Twins in 8 bits, end to end on a CPU: baked by the command line, run by handler.run, compared frame by frame."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import handler
from download_weights import main
from engine.bake import bake
from engine.hub import FolderHub
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.settings import Settings
from engine.twins import write_upstream
from handler import Worker
from model_handler import ModelHandler
from tests.conftest import data_uri, decode_video, photo

SVI = PROFILES["wan22_i2v_svi"]
REQUEST = {
    "mode": "svi_endframe",
    "prompt": "a fox",
    "image_start": data_uri(photo(64, 64)),
    "image_end": data_uri(photo(64, 64, seed=1)),
    "video_length": 9,
    "seed": 1,
}


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories in which rounding to 8 bits from the fp32 merge and from its bf16 is the same.

    Published values are values of bf16, and the LoRAs add nothing: their second factor is zero.
    """
    root = tmp_path_factory.mktemp("agreeing")
    write_upstream(SVI, root)
    loras = {root / lora.source.repo / lora.file for lora in SVI.loras}
    for path in root.rglob("*.safetensors"):
        tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
        if path in loras:
            tensors = {
                name: tensor * (0 if "lora_B" in name or "up" in name else 1) for name, tensor in tensors.items()
            }
        save_file(tensors, path)
    return root


def baked(precision: str, upstream: Path, root: Path) -> Path:
    bake(SVI.baked_in(precision), FolderHub(upstream), root, twin=True)
    return root


def run(weights_dir: Path, precision: str | None, output: Path) -> dict[str, Any]:
    settings = Settings(weights_dir=weights_dir, output_dir=output, outbox_dir=output / "outbox", precision=precision)
    worker = Worker(settings, ModelHandler(settings))
    try:
        return handler.run(REQUEST, job_id="job", worker=worker, progress=Progress())
    finally:
        worker.models.unload_all()


def frames(weights_dir: Path, precision: str | None, output: Path) -> np.ndarray:
    return decode_video(run(weights_dir, precision, output)["video_url"])


@pytest.mark.parametrize("precision", ["fp8", pytest.param("int8", marks=pytest.mark.soak)])
def test_baked_in_8_bits_and_rounded_at_load_make_the_same_frames(
    precision: str, agreeing: Path, tmp_path: Path
) -> None:
    wide = baked("bf16", agreeing, tmp_path / "wide")
    narrow = baked(precision, agreeing, tmp_path / "narrow")
    from_bake = frames(narrow, None, tmp_path / "a")
    at_load = frames(wide, precision, tmp_path / "b")
    assert np.array_equal(from_bake, at_load)
    assert not np.array_equal(from_bake, frames(wide, None, tmp_path / "c"))  # 8 bits do change the pixels


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=pytest.mark.soak)])
def test_tiny_bake_in_8_bits_runs_from_the_command_line_to_a_video(precision: str, tmp_path: Path) -> None:
    options = ["--tiny", "--precision", precision, "--profiles", "wan22_i2v_svi", "--output", str(tmp_path / "w")]
    assert main(options) == 0
    response = run(tmp_path / "w", precision, tmp_path / "out")
    assert response["profile"] == "tiny/wan_2_2_i2v_lightning_svi_3_3"
    assert decode_video(response["video_url"]).shape == (9, response["height"], response["width"], 3)


def test_every_linear_layer_of_a_loaded_8_bit_twin_is_in_8_bits(agreeing: Path, tmp_path: Path) -> None:
    from engine.linear8 import Linear8
    from engine.weights import locate

    found = locate(SVI, Settings(weights_dir=baked("fp8", agreeing, tmp_path)))
    model = found.parts().load("transformer_2")
    kinds = {type(model.get_submodule(f"blocks.2.{name}")) for name in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2")}
    assert kinds == {Linear8}
    assert type(model.proj_out) is torch.nn.Linear
