"""The levers in their order: what is narrowed, how it multiplies, and what a CPU leaves out."""

import os
import subprocess
import sys
import threading
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from engine import attention, image_kernels, linear8_check, speed, waking, widening
from engine.attention import WanProcessor
from engine.compiling import PATIENCE_S, CompiledBlocks
from engine.experts import RollingExperts
from engine.geometry import LatentShape
from engine.proof import Proof
from engine.settings import IMAGE_KERNELS, ROOT
from engine.speed import Levers, accelerate, narrow, precision_of, prove_ahead
from tests.engine.compiled_wan import Gate
from tests.engine.tiny_wan import make_wan, wan_inputs


@pytest.fixture
def hopper(monkeypatch):
    """A card whose 8-bit kernels pass."""
    monkeypatch.setattr(linear8_check, "problem", lambda _device, _kind: None)


@pytest.fixture
def turing(monkeypatch):
    """A card without 8-bit kernels."""
    monkeypatch.setattr(linear8_check, "problem", lambda _device, _kind: "too old")


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_narrow_leaves_a_model_as_loaded(precision):
    model = make_wan(0)
    assert narrow(model, precision, "cpu") == ()
    assert precision_of(model) == "float32"


def test_precision_is_that_of_most_weights():
    model = make_wan(0).to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()  # first of all, and fp32 in the real models
    assert precision_of(model) == "bfloat16"


@pytest.mark.usefixtures("hopper")
def test_narrow_uses_the_fast_kernel_where_it_passed():
    model = make_wan(0)
    assert narrow(model, "int8", "cuda") == ()
    assert precision_of(model) == "int8"


@pytest.mark.usefixtures("turing")
def test_narrow_widens_the_weights_where_no_kernel_passed_and_says_so():
    model = make_wan(0)
    assert narrow(model, "fp8", "cuda") == ("8-bit kernel fp8 is not used: too old",)
    assert precision_of(model) == "fp8-weights"


@pytest.mark.usefixtures("hopper")
def test_narrow_keeps_the_format_of_a_bake(monkeypatch):
    model = make_wan(0)
    narrow(model, "fp8", "cuda")
    monkeypatch.setattr(linear8_check, "problem", lambda _device, kind: f"no {kind}")
    assert narrow(model, None, "cuda") == ("8-bit kernel fp8 is not used: no fp8",)
    assert precision_of(model) == "fp8-weights"
    with pytest.raises(ValueError, match="baked in fp8"):
        narrow(model, "int8", "cuda")


def test_accelerate_on_a_cpu_chooses_native_and_compiles_nothing():
    model = make_wan(0)
    done = accelerate([model], "cpu", Levers())
    assert (done.attention, done.blocks, done.notes) == ("native", None, ())
    assert {type(processor) for processor in model.attn_processors.values()} == {WanProcessor}
    done.expect([LatentShape(2, 4, 4)])
    done.end_job()
    done.finish()
    assert done.account is None


def test_finish_waits_for_what_is_being_compiled():
    gate, model = Gate(), make_wan(0)
    done = speed.Accelerated("native", CompiledBlocks([model], backend=gate, patience_s=None), (), model)
    done.compile_for([LatentShape(2, 4, 4)])
    threading.Timer(0.2, gate.is_open.set).start()
    assert done.blocks.ready == 0
    done.finish()
    assert done.blocks.ready == 1


def test_question_what_blocks_are_called_with_is_put_once_a_size(monkeypatch):
    asked, told = [], []

    def block_inputs(_model, latent, device, image_tokens):
        asked.append((latent, image_tokens))
        return latent, device

    monkeypatch.setattr(speed, "block_inputs", block_inputs)
    blocks = SimpleNamespace(
        device=torch.device("cpu"), patience_s=1.0, begin_job=lambda: told.append("job"), expect=told.append
    )
    done = speed.Accelerated("native", blocks, (), make_wan(0))
    small, large = LatentShape(2, 4, 4), LatentShape(3, 4, 4)
    for latents in ([small], [large, small, large], [small]):
        done.expect(latents)
    done.expect([small], 257)
    assert asked == [(small, 0), (large, 0), (small, 257)]
    cpu = torch.device("cpu")
    jobs = [["job", (small, cpu)], ["job", (large, cpu), (small, cpu)], ["job", (small, cpu)], ["job", (small, cpu)]]
    assert told == [word for job in jobs for word in job]


@pytest.fixture
def workers(monkeypatch):
    """Devices whose compiler's workers were started, and a card that is none."""
    started = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(speed, "start_workers", started.append)
    monkeypatch.setattr(attention, "choose", lambda *_, **__: attention.Choice("native", (), "native"))
    monkeypatch.setattr(speed.rounding, "problem", lambda _device: None)
    monkeypatch.setattr(speed.text_attention, "problem", lambda _device: None)
    return started


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("problem", [None, "they fail"])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_nobody_waits_for_a_graph_of_blocks_that_are_fused_by_hand(workers, precision, problem, monkeypatch):
    monkeypatch.setattr(speed.rounding, "problem", lambda _device: problem)
    models = [make_wan(0), make_wan(1)]
    for model in models:
        narrow(model, precision, "cuda")
    done = accelerate(models, "cuda", Levers())
    fits, is_fused = precision == "fp8", precision == "fp8" and problem is None
    assert workers == ([] if fits else [torch.device("cuda")])
    assert done.blocks.patience_s == (None if is_fused else PATIENCE_S)
    asked = []
    monkeypatch.setattr(done.blocks, "expect", asked.append)
    done.expect([LatentShape(2, 4, 4)])
    assert len(asked) == (0 if is_fused else 1)
    done.compile_for([LatentShape(2, 4, 4)])
    assert len(asked) == (1 if is_fused else 2)


@pytest.mark.usefixtures("hopper")
def test_order_of_the_levers_ends_in_experts_that_still_run():
    models = {"high": make_wan(0), "low": make_wan(1)}
    for model in models.values():
        narrow(model, "fp8", "cpu")
    with torch.inference_mode():
        expected = {name: model(**wan_inputs()).sample for name, model in models.items()}
        experts = RollingExperts(models, "cpu")
        accelerate([experts.model], "cpu", Levers())
        for name in ("high", "low", "high"):
            with experts.use(name) as model:
                assert torch.equal(model(**wan_inputs()).sample, expected[name])


def test_kernels_are_kept_beside_the_graphs_only_where_a_folder_is_set(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(waking, "keep_kernels", kept.append)
    for folder in (None, tmp_path):
        accelerate([make_wan(0)], "cpu", Levers(None, True, folder))
    assert kept == [tmp_path]


@pytest.mark.parametrize("can_be_written", [True, False])
def test_folder_that_keeps_kernels_gets_the_images_before_any_is_asked_for(
    begun, can_be_written, tmp_path, monkeypatch
):
    done = []
    monkeypatch.setattr(waking, "keep_kernels", lambda _folder: can_be_written)
    monkeypatch.setattr(image_kernels, "lend", lambda image, folder: done.append((image, folder, list(begun))))
    monkeypatch.setattr(attention, "choose", lambda *_, **__: done.append("chosen") or attention.Choice("native", ()))
    prove_ahead("fp8", "cuda", Levers(None, True, tmp_path))
    begun.clear()
    accelerate([make_wan(0)], "cpu", Levers(None, True, tmp_path))
    lent = [(IMAGE_KERNELS, tmp_path, [])] if can_be_written else []
    assert done == [*lent, *lent, "chosen"]


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


@pytest.fixture
def begun(monkeypatch):
    """What is begun ahead for a Hopper whose Triton does nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(waking, "import_triton", lambda: None)
    asked = []
    for module in (linear8_check, speed.rounding, speed.text_attention, widening):
        proof = Proof(module.problem.__wrapped__)
        monkeypatch.setattr(proof, "begin", lambda *of, name=module.__name__: asked.append((name, *of)))
        monkeypatch.setattr(module, "problem", proof)
    return asked


def test_tests_of_the_precision_are_begun_by_what_they_will_be_asked(begun, monkeypatch):
    prove_ahead("int8", "cuda:0", Levers())
    assert begun == [
        ("engine.linear8_check", "cuda:0", "int8"),
        ("engine.widening", torch.device("cuda:0"), torch.int8),
    ]
    begun.clear()
    prove_ahead("fp8", "cuda", Levers())
    assert begun == [
        ("engine.linear8_check", "cuda", "fp8"),
        ("engine.widening", torch.device("cuda:1"), torch.float8_e4m3fn),
        ("engine.rounding", "cuda"),
        ("engine.text_attention", "cuda"),
    ]
    begun.clear()
    prove_ahead("bf16", "cuda", Levers())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    prove_ahead("fp8", "cuda", Levers())
    assert begun == []


def test_kernels_of_tests_that_are_begun_are_kept_too(begun, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(waking, "keep_kernels", lambda folder: kept.append((folder, list(begun))))
    prove_ahead("fp8", "cuda", Levers(None, True, tmp_path))
    assert kept == [(tmp_path, [])]


def test_no_test_of_tritons_kernels_is_begun_where_triton_cannot_be_had(begun, monkeypatch):
    monkeypatch.setattr(waking, "import_triton", lambda: import_module("no_such_package"))
    prove_ahead("fp8", "cuda", Levers())
    assert begun == [("engine.linear8_check", "cuda", "fp8")]


@pytest.mark.gpu
def test_tests_beside_each_other_find_what_they_do_alone(tmp_path):
    """In a new process, where nothing is compiled."""
    code = """
import torch
from engine.card import Levers
from engine.namesake import import_diffusers
import_diffusers()
from engine import rounding, speed, text_attention, widening
speed.prove_ahead("fp8", "cuda", Levers(None, True, None))
torch.ones(8, device="cuda").sum().item()
print(rounding.problem("cuda"), text_attention.problem("cuda"))
print(widening.problem(torch.zeros(0, device="cuda").device, torch.float8_e4m3fn), len(widening.problem._answers))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["None", "None", "None", "1"], done.stderr
