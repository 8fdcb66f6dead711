"""Attention kernels: the processor equals diffusers', a bad kernel is found out, nothing leaks to other
models."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.work import ROUNDING
from engine import attention
from engine.attention import KERNELS, WanProcessor, choose, install, relative_error
from engine.namesake import namesake_hidden
from engine.settings import ROOT
from schemas.errors import SettingsError
from tests.engine.tiny_wan import make_wan, wan_inputs


def make_wan21() -> WanTransformer3DModel:
    """With image context: added key and value projections, as Wan2.1 has them."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=36, text_dim=32,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32, image_dim=32, added_kv_proj_dim=32,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processor_equals_diffusers(dtype):
    model = make_wan(0).to(dtype)
    inputs = {name: x.to(dtype) for name, x in wan_inputs().items()}
    with torch.inference_mode():
        expected = model(**inputs).sample
        assert install(model, "native") == 8
        assert torch.equal(model(**inputs).sample, expected)


def test_processor_equals_diffusers_with_image_context():
    model = make_wan21()
    inputs = {**wan_inputs(), "encoder_hidden_states_image": torch.randn(1, 257, 32)}
    with torch.inference_mode():
        expected = model(**inputs).sample
        install(model, "native")
        assert torch.equal(model(**inputs).sample, expected)


def test_install_changes_one_model_and_no_default():
    first, second = make_wan(0), make_wan(1)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    install(first, "native")
    assert {type(p) for p in first.attn_processors.values()} == {WanProcessor}
    assert WanProcessor not in {type(p) for p in second.attn_processors.values()}
    assert _AttentionBackendRegistry.get_active_backend()[0] == active


def test_install_refuses_a_model_without_wan_attention():
    with pytest.raises(ValueError, match="Linear"):
        install(torch.nn.Linear(2, 2), "native")


def test_processor_refuses_a_mask():
    block = make_wan(0).blocks[0]
    with pytest.raises(ValueError, match="mask"):
        WanProcessor("native")(block.attn1, torch.zeros(1, 4, 32), attention_mask=torch.zeros(1))


def test_native_passes_the_self_test_at_every_shape():
    assert max(relative_error(KERNELS["native"].attend, "cpu", *shape) for shape in attention.SHAPES) < 0.006


def test_self_test_finds_a_kernel_that_is_wrong():
    def shifted(query, key, value):
        return KERNELS["native"].attend(query, key, value.roll(1, dims=1))

    def scaled(query, key, value):
        return KERNELS["native"].attend(query * 1.05, key, value)

    def black(query, key, value):
        return torch.full_like(query, float("nan"))

    shape = attention.SHAPES[0]
    assert relative_error(shifted, "cpu", *shape) > 0.5
    assert relative_error(scaled, "cpu", *shape) > KERNELS["flash4"].tolerance
    assert relative_error(black, "cpu", *shape) == float("inf")


def test_choose_takes_native_on_a_cpu_without_a_word():
    assert choose("cpu") == attention.Choice("native")


def test_choose_says_why_a_wanted_kernel_is_not_used():
    assert choose("cpu", "flash4").notes == ("attention kernel flash4 is not used: the device is no CUDA card",)


def test_choose_refuses_an_unknown_name():
    with pytest.raises(SettingsError, match="'flash', not one of attention16, flash4_wide, flash4"):
        choose("cpu", "flash")


@pytest.fixture
def hopper(monkeypatch):
    """The choice as an H200 makes it, with the smallest self-test, computed on the CPU."""
    monkeypatch.setattr(attention, "SHAPES", attention.SHAPES[:1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    on_card = attention.relative_error
    monkeypatch.setattr(attention, "relative_error", lambda attend, _device, *shape: on_card(attend, "cpu", *shape))


def right_kernels():
    """All that are named, each computing as torch does and passing what it alone is tested for."""
    native = KERNELS["native"].attend
    return {name: replace(kernel, attend=native, problem=lambda _: None) for name, kernel in KERNELS.items()}


def test_choose_takes_the_fastest_that_passes(hopper):
    right = right_kernels()
    assert choose("cuda", kernels=right) == attention.Choice("attention16")
    assert choose("cuda", "cudnn", kernels=right) == attention.Choice("cudnn")


@pytest.mark.parametrize("name", ["attention8", "sage"])
def test_kernel_that_rounds_leaves_few_keys_to_the_fastest_exact_one(hopper, name):
    right = right_kernels()
    assert choose("cuda", name, kernels=right) == attention.Choice(name, (), "attention16")
    wrong = replace(right["attention16"], attend=lambda q, k, v: -KERNELS["native"].attend(q, k, v))
    chosen = choose("cuda", name, kernels={**right, "attention16": wrong})
    assert (chosen.name, chosen.few, len(chosen.notes)) == (name, "flash4_wide", 1)


def test_kernel_that_rounds_comes_into_self_attention_alone():
    model = make_wan21()
    used = {"self": [], "few": []}
    install(model, "native", "flash4")
    native = KERNELS["native"].attend
    for processor in model.attn_processors.values():
        assert (processor.kernel, processor.few) == ("native", "flash4")
        assert processor._attend_text is processor._attend_picture is KERNELS["flash4"].attend
        processor._attend = lambda q, k, v: used["self"].append(k.shape[1]) or native(q, k, v)
        processor._attend_text = lambda q, k, v: used["few"].append(k.shape[1]) or native(q, k, v)
        processor._attend_picture = processor._attend_text
    with torch.inference_mode():
        model(**wan_inputs(), encoder_hidden_states_image=torch.randn(1, 257, 32))
    tokens = used["self"][0]
    assert used == {"self": [tokens] * 2, "few": [512, 257] * 2}


def test_what_a_kernel_alone_is_tested_for_can_refuse_it(hopper):
    right = right_kernels()
    seen = []
    refused = replace(right["attention16"], problem=lambda device: seen.append(device) or "it hides a NaN")
    chosen = choose("cuda", kernels={**right, "attention16": refused})
    assert (chosen.name, seen) == ("flash4_wide", ["cuda"])
    assert chosen.notes == ("attention kernel attention16 is not used: it hides a NaN",)


def test_kernel_for_heads_of_one_width_is_not_used_for_others(hopper):
    right = right_kernels()
    chosen = choose("cuda", "attention8", kernels=right, width=16)
    assert (chosen.name, chosen.few) == ("flash4_wide", "")
    assert chosen.notes == tuple(
        f"attention kernel {name} is not used: it takes heads of 128 numbers, not 16"
        for name in ("attention8", "attention16")
    )
    assert choose("cuda", "attention8", kernels=right, width=128).name == "attention8"
    assert attention.head_width(make_wan21()) == 16


def test_benchmarks_take_no_kernel_that_rounds_as_a_ceiling():
    assert {name for name, kernel in KERNELS.items() if kernel.rounds} == ROUNDING


def test_choose_skips_a_kernel_whose_result_is_off(hopper):
    right = right_kernels()
    wrong = replace(right["attention16"], attend=lambda q, k, v: KERNELS["native"].attend(q, k, v) * 1.1)
    chosen = choose("cuda", kernels={**right, "attention16": wrong})
    assert chosen.name == "flash4_wide"
    assert chosen.notes == ("attention kernel attention16 is not used: its result is off (relative error 0.100)",)


EVERY = ["attention16", "flash4_wide", "flash4", "cudnn", "flash2", "attention8", "sage", "xformers", "native"]


def test_every_named_kernel_is_in_the_table_and_said_to_users():
    assert list(KERNELS) == EVERY
    said = (ROOT / "docs" / "performance.md").read_text().split("`WORKER_ATTENTION` takes ")[1].split(".")[0]
    exact, rounding = (re.findall(r"`(\w+)`", part) for part in said.split("which are exact"))
    assert (sorted(exact + rounding), set(rounding)) == (sorted(EVERY), ROUNDING)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "native"])
def test_each_kernel_that_is_wrong_is_skipped_and_said(hopper, name):
    """Wanted first, wrong in one row only; then the next of the table is asked."""

    def black_row(query, key, value):
        out = KERNELS["native"].attend(query, key, value)
        out[:, 0] = float("nan")
        return out

    right = right_kernels()
    chosen = choose("cuda", name, kernels={**right, name: replace(right[name], attend=black_row)})
    assert chosen.name == ("flash4_wide" if name == "attention16" else "attention16")
    assert chosen.notes == (f"attention kernel {name} is not used: its result is off (relative error inf)",)
    assert (choose("cuda", name, kernels=right).name, choose("cuda", name, kernels=right).notes) == (name, ())


def test_no_kernel_is_tested_after_one_that_passes(hopper):
    tried = []

    def remembering(name, is_right):
        def attend(query, key, value):
            tried.append(name)
            out = KERNELS["native"].attend(query, key, value)
            return out if is_right else -out

        return attend

    watched = {name: replace(kernel, attend=remembering(name, name == "cudnn")) for name, kernel in KERNELS.items()}
    assert choose("cuda", kernels=watched).name == "cudnn"
    assert tried == ["attention16", "flash4_wide", "flash4", "cudnn"]


def test_self_test_meets_one_head_size_that_is_the_models_own():
    assert {shape[3] for shape in attention.SHAPES} == {128}


def test_choose_skips_packages_that_are_missing(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    chosen = choose("cuda")  # attention16, which needs none for the common test, and cuDNN want a card
    assert chosen.name == "native"
    assert [note.split("(")[1].split(":")[0] for note in chosen.notes] == [
        "RuntimeError", "ModuleNotFoundError", "ModuleNotFoundError", "RuntimeError", "ModuleNotFoundError",
    ]  # fmt: skip


def test_choose_skips_what_the_card_is_too_old_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert choose("cuda", "flash4") == attention.Choice(
        "native", ("attention kernel flash4 is not used: compute capability 7.5 is not supported",)
    )


@pytest.mark.parametrize("name", ["flash4", "attention8", "attention16"])
def test_kernel_of_an_operator_traces_to_one_graph_without_package_or_card(name):
    torch._dynamo.reset()
    compiled = torch.compile(KERNELS[name].attend, backend="aot_eager", fullgraph=True, dynamic=False)
    with FakeTensorMode():
        x = torch.empty(1, 8, 2, attention.HEAD_WIDTH, dtype=torch.bfloat16, device="cuda")
        out = compiled(x, x, x)
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)


@pytest.fixture
def site(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("flash_attn_func = len\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_namesake_is_hidden_for_the_block_only(site):
    with namesake_hidden() as hidden:
        assert hidden
        with pytest.raises(ModuleNotFoundError):
            __import__("flash_attn")
    assert __import__("flash_attn.cute").cute.flash_attn_func is len


def test_real_flash_attention_2_is_not_hidden(site):
    (site / "flash_attn" / "__init__.py").write_text("__version__ = '2.8.3'\n")
    (site / "flash_attn" / "flash_attn_interface.py").write_text("")
    with namesake_hidden() as hidden:
        assert not hidden
        assert __import__("flash_attn").__version__ == "2.8.3"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("guard", "works"), [("import engine.namesake as n; n.import_diffusers();", True), ("", False)]
)
def test_diffusers_imports_beside_the_namesake(site, guard, works):
    """xformers, as others do, reads flash_attn's version as soon as the name is there."""
    (site / "xformers").mkdir()
    (site / "xformers" / "__init__.py").write_text("")
    (site / "xformers" / "ops.py").write_text(
        "try:\n    import flash_attn\n    flash_attn.__version__\nexcept ImportError:\n    pass\n"
    )
    (site / "xformers-0.0.35.dist-info").mkdir()
    (site / "xformers-0.0.35.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n"
    )
    code = f"import sys; sys.path.insert(0, {str(site)!r}); {guard} "
    code += "import diffusers.models.transformers.transformer_wan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is works, done.stderr
    if not works:
        assert "AttributeError" in done.stderr
