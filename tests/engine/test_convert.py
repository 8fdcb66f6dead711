"""Converting one component: the published files must be the class's tensors, all of them, finite."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.convert import compare_with_published, convert
from engine.hub import BakeFailed
from engine.profile import Component
from engine.profiles import PROFILES
from engine.published import published_values

SDXL, SVI = PROFILES["sdxl"], PROFILES["wan22_i2v_svi"]
VAE = SDXL.component("vae")
STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def spoilt(upstream: Path, tmp_path: Path) -> Path:
    """Repositories that a test may change."""
    return Path(shutil.copytree(upstream, tmp_path / "upstream"))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def converted(component: Component, spoilt: Path, target: Path) -> dict[str, torch.Tensor]:
    target.mkdir()
    return load_file(convert(component, spoilt / component.source.repo / component.subfolder, target, []))


def test_convert_refuses_a_missing_tensor(spoilt: Path, tmp_path: Path) -> None:
    change(spoilt / VAE.source.repo / STEM, lambda tensors: tensors.pop("decoder.conv_in.bias"))
    with pytest.raises(BakeFailed, match=r"1 tensors are missing and 0 unknown: decoder\.conv_in\.bias"):
        converted(VAE, spoilt, tmp_path / "out")


def test_convert_refuses_a_tensor_that_the_class_does_not_know(spoilt: Path, tmp_path: Path) -> None:
    change(spoilt / VAE.source.repo / STEM, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(BakeFailed, match="0 tensors are missing and 1 unknown: extra"):
        converted(VAE, spoilt, tmp_path / "out")


def test_convert_refuses_another_shape(spoilt: Path, tmp_path: Path) -> None:
    change(spoilt / VAE.source.repo / STEM, lambda tensors: tensors.update({"decoder.conv_in.bias": torch.zeros(3)}))
    with pytest.raises(BakeFailed, match=r"decoder\.conv_in\.bias is \(3,\), not \(8,\)"):
        converted(VAE, spoilt, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), 1e6], ids=["not a number", "too large for fp16"])
def test_convert_refuses_what_is_not_finite_after_the_cast(spoilt: Path, tmp_path: Path, value: float) -> None:
    change(spoilt / VAE.source.repo / STEM, lambda tensors: tensors["decoder.conv_in.bias"].fill_(value))
    with pytest.raises(BakeFailed, match=r"decoder\.conv_in\.bias is not finite in torch\.float16"):
        converted(VAE, spoilt, tmp_path / "out")


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_convert_refuses_what_no_8_bit_scale_can_carry(spoilt: Path, tmp_path: Path, precision: str) -> None:
    component = SVI.baked_in(precision).component("text_encoder")
    folder = spoilt / component.source.repo / "text_encoder"
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    change(folder / index["weight_map"][name], lambda tensors: tensors[name][3, 5].fill_(float("inf")))
    with pytest.raises(
        BakeFailed, match=rf"wo\.weight is not finite in torch\.{'float8' if precision == 'fp8' else 'int8'}"
    ):
        converted(component, spoilt, tmp_path / "out")


def test_convert_takes_no_notice_of_position_ids(spoilt: Path, tmp_path: Path) -> None:
    component = SDXL.component("text_encoder")
    path = spoilt / component.source.repo / "text_encoder/model.fp16.safetensors"
    change(path, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    assert "text_model.embeddings.position_ids" not in converted(component, spoilt, tmp_path / "out")


@pytest.mark.parametrize("same", [True, False])
def test_convert_stores_a_tied_tensor_once_if_its_copy_is_equal(spoilt: Path, tmp_path: Path, same: bool) -> None:
    component = SVI.component("text_encoder")
    folder = spoilt / component.source.repo / "text_encoder"
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    shard = index["weight_map"]["shared.weight"]
    change(
        folder / shard,
        lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"] + (not same)}),
    )
    index["weight_map"]["encoder.embed_tokens.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if same:
        assert "encoder.embed_tokens.weight" not in converted(component, spoilt, tmp_path / "out")
    else:
        with pytest.raises(BakeFailed, match="should be one tensor and differ"):
            converted(component, spoilt, tmp_path / "out")


def test_compare_says_what_is_published_differently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**published_values(VAE), "scaling_factor": 0.5}))
    compare_with_published(VAE, tmp_path)
    assert "sdxl/vae: published differently than kept here: scaling_factor: 0.13025 -> 0.5" in caplog.text
