"""Random full-size parts are the published models with drawn values."""

from pathlib import Path

import pytest
import torch

from bench.random_parts import RandomParts
from engine.profiles import PROFILES
from engine.settings import Settings
from engine.weights import locate

SDXL = PROFILES["sdxl"]


@pytest.fixture(scope="module")
def parts(twins: Path) -> RandomParts:
    return RandomParts(SDXL, locate(SDXL, Settings(weights_dir=twins)).parts())


def test_random_part_is_the_published_model(parts: RandomParts) -> None:
    vae = parts.load("vae")
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}  # fp16 on a card
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert vae.config.scaling_factor == 0.13025


def test_random_part_has_sane_values(parts: RandomParts) -> None:
    vae = parts.load("vae")
    assert vae.encoder.conv_norm_out.weight.unique().tolist() == [1.0]
    assert vae.encoder.conv_in.bias.unique().tolist() == [0.0]
    assert vae.decoder.conv_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
    picture = vae.decode(torch.randn(1, 4, 8, 8)).sample
    assert torch.isfinite(picture).all()
    assert picture.std() > 0


def test_random_part_follows_the_seed(parts: RandomParts) -> None:
    other = RandomParts(SDXL, parts.rest, seed=1).load("text_encoder").state_dict()
    first, again = (parts.load("text_encoder").state_dict() for _ in range(2))
    name = next(key for key in first if key.endswith("layers.0.mlp.fc1.weight"))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_rest_comes_from_the_twin(parts: RandomParts) -> None:
    assert parts.load("tokenizer").model_max_length == 77
    assert parts.load("scheduler").config.beta_start == 0.00085
