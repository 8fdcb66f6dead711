"""The levers in their order: what is narrowed, how it multiplies, and what a CPU leaves out."""

import pytest
import torch

from engine import attention, speed
from engine.attention import WanProcessor
from engine.experts import RollingExperts
from engine.geometry import LatentShape
from engine.linear8_check import SelfTest
from engine.speed import Levers, accelerate, narrow, precision_of
from tests.engine.tiny_wan import make_wan, wan_inputs

HOPPER = SelfTest(("fp8", "int8"), ())
TURING = SelfTest((), ("8-bit kernel fp8 is not used: too old",))


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_narrow_leaves_a_model_as_loaded(precision):
    model = make_wan(0)
    assert narrow(model, precision, "cpu") == ()
    assert precision_of(model) == "float32"


def test_precision_is_that_of_most_weights():
    model = make_wan(0).to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()  # first of all, and fp32 in the real models
    assert precision_of(model) == "bfloat16"


def test_narrow_uses_the_fast_kernel_where_it_passed():
    model = make_wan(0)
    assert narrow(model, "int8", "cuda", HOPPER) == ()
    assert precision_of(model) == "int8"


def test_narrow_widens_the_weights_where_no_kernel_passed_and_says_so():
    model = make_wan(0)
    assert narrow(model, "fp8", "cuda", TURING) == TURING.notes
    assert precision_of(model) == "fp8-weights"


def test_narrow_keeps_the_format_of_a_bake():
    model = make_wan(0)
    narrow(model, "fp8", "cuda", HOPPER)
    narrow(model, None, "cuda", TURING)
    assert precision_of(model) == "fp8-weights"
    with pytest.raises(ValueError, match="baked in fp8"):
        narrow(model, "int8", "cuda", HOPPER)


def test_accelerate_on_a_cpu_chooses_native_and_compiles_nothing():
    model = make_wan(0)
    done = accelerate([model], "cpu", Levers())
    assert (done.attention, done.blocks, done.notes, done.save()) == ("native", None, (), False)
    assert {type(processor) for processor in model.attn_processors.values()} == {WanProcessor}
    done.expect([LatentShape(2, 4, 4)])
    assert done.account is None


def test_order_of_the_levers_ends_in_experts_that_still_run():
    models = {"high": make_wan(0), "low": make_wan(1)}
    for model in models.values():
        narrow(model, "fp8", "cpu", HOPPER)
    with torch.inference_mode():
        expected = {name: model(**wan_inputs()).sample for name, model in models.items()}
        experts = RollingExperts(models, "cpu")
        accelerate([experts.model], "cpu", Levers())
        for name in ("high", "low", "high"):
            with experts.use(name) as model:
                assert torch.equal(model(**wan_inputs()).sample, expected[name])


def test_kernels_are_kept_beside_the_graphs_only_where_a_folder_is_set(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(speed, "keep_kernels", kept.append)
    for folder in (None, tmp_path):
        accelerate([make_wan(0)], "cpu", Levers(None, True, folder))
    assert kept == [tmp_path]


def test_kernels_are_chosen_for_the_models_heads_and_both_are_installed(monkeypatch):
    asked = []

    def choose(device, wanted, width):
        asked.append((device, wanted, width))
        return attention.Choice("native", ("said",), "flash4")

    monkeypatch.setattr(attention, "choose", choose)
    model = make_wan(0)
    assert accelerate([model], "cpu", Levers("attention8")).notes == ("said",)
    assert asked == [("cpu", "attention8", attention.head_width(model))]
    assert {(one.kernel, one.few) for one in model.attn_processors.values()} == {("native", "flash4")}
