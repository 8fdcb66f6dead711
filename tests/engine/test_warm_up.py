"""Compiling ahead: for which sizes, of what, and that a later process's job finds it."""

from dataclasses import replace

import pytest
import torch

from engine import waking
from engine.artefacts import Artefacts
from engine.card import Card, Levers
from engine.compiling import CompiledBlocks, graph_count
from engine.geometry import LatentShape
from engine.linear8 import Linear8
from engine.profiles import PROFILES
from engine.speed import Accelerated
from engine.warm_up import compile_ahead, image_tokens, one_block, usual_latents, warm_up
from schemas.errors import SettingsError
from tests.engine.tiny_wan import make_wan, wan_inputs

SVI = PROFILES["wan_2_2_i2v_lightning_svi_3_3"]
VIDEO = PROFILES["wan21_i2v_480p"]
SIZES = (LatentShape(2, 4, 4), LatentShape(2, 8, 4))


class Kept(Artefacts):
    """Says it has everything that was ever saved, and remembers what that is."""

    saved: list = []  # noqa: RUF012 shared by the copies that `of` makes

    def load(self) -> bool:
        return self.path in self.saved

    def save(self) -> bool:
        self.saved.append(self.path)
        return True


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    Kept.saved.clear()


def accelerated(tmp_path, seed: int = 0, layers: int = 1, patience_s: float | None = 120.0) -> Accelerated:
    model = make_wan(seed, layers)
    blocks = CompiledBlocks([model], Kept(tmp_path, "test"), backend="eager", patience_s=patience_s)
    return Accelerated("native", blocks, (), model)


@pytest.mark.parametrize("patience_s", [120.0, 0.0, None])
def test_each_size_is_compiled_run_and_kept_once_also_where_no_job_would_wait(tmp_path, patience_s):
    account = compile_ahead(accelerated(tmp_path, patience_s=patience_s), SIZES)
    assert graph_count() == 2
    assert len(set(Kept.saved)) == 2
    assert account[2:] == (0.0, 2.0)


def test_one_block_ahead_is_what_a_job_on_all_blocks_looks_for(tmp_path):
    """The file of a size is that of any number of blocks, of other weights."""
    compile_ahead(accelerated(tmp_path), SIZES[:1])
    whole = accelerated(tmp_path, seed=1, layers=4)
    with torch.inference_mode():
        whole.model(**wan_inputs())
    assert not whole.blocks.save()  # nothing is new
    with torch.inference_mode():
        whole.model(**wan_inputs(height=8))
    assert whole.blocks.save()


def test_size_that_cannot_be_compiled_is_an_error(tmp_path):
    def broken(graph, inputs):
        raise NotImplementedError("no such instruction")

    model = make_wan(0, layers=1)
    blocks = CompiledBlocks([model], Kept(tmp_path, "test"), backend=broken)
    with pytest.raises(SettingsError, match="no such instruction"):
        compile_ahead(Accelerated("native", blocks, (), model), SIZES[:1])
    assert Kept.saved == []


def test_compiled_and_not_kept_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Kept, "save", lambda _self: False)
    with pytest.raises(SettingsError, match="could not be written to WORKER_CACHE_DIR"):
        compile_ahead(accelerated(tmp_path), SIZES)


def test_compiling_ahead_again_finds_all_of_it_and_is_no_error(tmp_path):
    compile_ahead(accelerated(tmp_path), SIZES)
    before = len(Kept.saved)
    compile_ahead(accelerated(tmp_path), SIZES)
    assert len(Kept.saved) == before


def test_warm_up_without_a_card_or_a_folder_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="WORKER_CACHE_DIR"):
        warm_up(SVI, Card("cpu", 0), ())
    with pytest.raises(SettingsError, match="needs the card"):
        compile_ahead(Accelerated("native", None, (), make_wan(0, layers=1)), SIZES)


@pytest.mark.parametrize(
    ("profile", "latents", "tokens"),
    [(SVI, [(22, 60, 104), (21, 60, 104)], 0), (VIDEO, [(21, 60, 104)], 257)],
    ids=["svi", "video"],
)
def test_usual_sizes_are_those_of_a_request_that_says_nothing(profile, latents, tokens):
    assert [*usual_latents(profile)] == latents
    assert image_tokens(profile) == tokens


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_one_block_has_the_published_size_in_the_precision_that_is_served(precision):
    component = SVI.component("transformer")
    model = one_block(component, precision, "meta")
    assert len(model.blocks) == 1
    layer = model.blocks[0].ffn.net[2]
    assert (layer.in_features, layer.out_features) == (13824, 5120)
    assert isinstance(layer, Linear8) is (precision == "fp8")
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.patch_embedding.weight.dtype == torch.bfloat16


def test_one_block_of_an_8_bit_bake_is_in_8_bits():
    component = replace(SVI.component("transformer"), dtype="fp8")
    layer = one_block(component, "fp8", "meta").blocks[0].ffn.net[2]
    assert isinstance(layer, Linear8)
    assert layer.weight_q.dtype == torch.float8_e4m3fn


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_warm_up_on_a_card_leaves_a_file_for_each_size(tmp_path, monkeypatch):
    monkeypatch.setattr(waking, "keep_kernels", lambda _: None)  # the environment is that of all tests
    card = Card("cuda", 40 * 2**30, "fp8", Levers(cache_dir=tmp_path))
    account = warm_up(SVI, card, usual_latents(SVI))
    assert len(list(tmp_path.glob("compiled-*.bin"))) == 2
    assert account.eager_forwards == 0.0
