"""Random full-size parts are the published models with drawn values."""

from pathlib import Path

import pytest
import torch

from bench import random_parts
from bench.jobs import JOBS, as_real, located
from bench.random_parts import RandomParts
from bench.watch import Watch, WatchedParts
from engine.parts import empty_model, read_config
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.settings import Settings
from engine.weights import locate
from model_handler import ModelHandler

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
    assert vae.decoder.conv_out.weight.std().item() == pytest.approx(0.02, rel=0.05)  # only Wan's is smaller
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


@pytest.fixture
def tiny(twins: Path, monkeypatch: pytest.MonkeyPatch) -> RandomParts:
    """Drawn parts of the two-expert profile, in the twin's sizes."""
    rest = located("svi_endframe", twins)[1]
    sized = {component.name: read_config(component, rest.folders[component.name]) for component in _models(rest)}
    monkeypatch.setattr(random_parts, "published_model", lambda part: empty_model(part, sized[part.name]))
    return RandomParts(rest.profile, rest)


def _models(parts):
    return [component for component in parts.profile.components if component.dtype]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_worker_takes_drawn_parts_as_it_takes_baked_ones(tiny: RandomParts, twins, tmp_path, precision) -> None:
    job, watch = JOBS["svi_endframe"], Watch()
    models = ModelHandler(Settings(weights_dir=twins, precision=precision))
    task = job.task(tiny.profile, 1, job.small)
    made = models.generate(task, WatchedParts(tiny, watch), tmp_path, Progress())
    assert made.files[0].frames == 13
    assert {name: len(calls) for name, calls in watch.take().items() if name.startswith("transformer")} == {
        "transformer": 2, "transformer_2": 4,
    }  # fmt: skip
    models.unload_all()


def test_only_the_convolution_that_makes_the_film_is_drawn_smaller(tiny: RandomParts) -> None:
    weights = {name: tensor for name, tensor in tiny.load("vae").state_dict().items() if tensor.numel() > 300}
    smaller = weights.pop("decoder.conv_out.weight").std().item()
    assert smaller == pytest.approx(0.0025, rel=0.2)  # of 324 numbers
    assert [name for name, tensor in weights.items() if tensor.std().item() != pytest.approx(0.02, rel=0.2)] == []


def test_shallower_model_has_fewer_blocks_and_nothing_else_changed(tiny: RandomParts) -> None:
    whole, cut = tiny.load("transformer"), RandomParts(tiny.profile, tiny.rest, blocks=1).load("transformer")
    assert len(whole.blocks) > 1
    assert len(cut.blocks) == 1
    assert cut.state_dict().keys() == {name for name in whole.state_dict() if not _is_later_block(name)}


def _is_later_block(name: str) -> bool:
    return name.startswith("blocks.") and not name.startswith("blocks.0.")


def test_twin_passes_for_the_real_profile_where_it_is_asked_to(twins, tmp_path) -> None:
    profile = PROFILES["wan22_i2v_svi"]
    settings = Settings(weights_dir=as_real(profile, twins, tmp_path))
    assert (locate(profile, settings).profile.is_twin, located("svi_endframe", twins)[1].profile.is_twin) == (
        False,
        True,
    )
