"""LoRA strengths of one request: the same effective weights as a bake, and no trace afterwards."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from engine.linear8 import replace_linears
from engine.lora import LoraWeights, load_lora, merge
from engine.lora_live import live_adapters, strength_changes
from schemas.errors import Cancelled, InvalidInput, WeightsCorrupt

WIDTH, FFN, BLOCKS = 32, 48, 2
MODULES = {
    **{f"{kind}.{letter}": (WIDTH, WIDTH) for kind in ("self_attn", "cross_attn") for letter in "qkvo"},
    "ffn.0": (FFN, WIDTH),
    "ffn.2": (WIDTH, FFN),
}


def transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_layers=BLOCKS,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        ffn_dim=FFN,
        in_channels=36,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        cross_attn_norm=True,
    )
    return model.eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 6, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
    }


def run(model: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(**inputs(dtype), return_dict=False)[0]


def saved(path, seed: int, extra: dict[str, torch.Tensor] | None = None) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for block in range(BLOCKS):
        for module, (out, width) in MODULES.items():
            key = f"diffusion_model.blocks.{block}.{module}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) / 6
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator) / 6
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return load_lora(path)


@pytest.fixture
def loras(tmp_path) -> list[LoraWeights]:
    return [saved(tmp_path / "svi_high.safetensors", 1), saved(tmp_path / "light_high.safetensors", 2)]


def baked(model: WanTransformer3DModel, loras: list[LoraWeights], strengths: list[float]) -> WanTransformer3DModel:
    model = copy.deepcopy(model)
    pairs = list(zip(loras, strengths, strict=True))
    model.load_state_dict({name: merge(weight, name, pairs) for name, weight in model.state_dict().items()})
    return model


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_strength_changes_lists_only_what_differs_from_the_bake(loras):
    assert strength_changes(loras, asked=[1.0, 0.5], baked=[1.0, 1.25]) == [(loras[1], -0.75)]
    assert strength_changes(loras, asked=[1.0, 1.25], baked=[1.0, 1.25]) == []


def test_live_adapters_equal_a_bake_at_the_asked_strengths(loras):
    model = transformer(0)
    worker = baked(model, loras, [1.0, 1.2])
    changes = strength_changes(loras, asked=[0.4, 0.0], baked=[1.0, 1.2])
    with live_adapters({"high": worker}, {"high": changes}, torch.float32):
        live = run(worker)
    torch.testing.assert_close(live, run(baked(model, loras, [0.4, 0.0])), rtol=1e-4, atol=1e-5)  # fp32 re-association
    assert (live - run(worker)).abs().max() > 0.05  # the strengths did matter


def test_live_adapters_equal_a_bake_in_bf16(loras):
    model = transformer(0).to(torch.bfloat16)
    worker = baked(model, loras, [1.0, 1.2])
    changes = strength_changes(loras, asked=[0.4, 0.0], baked=[1.0, 1.2])
    with live_adapters({"high": worker}, {"high": changes}, torch.bfloat16):
        live = run(worker, torch.bfloat16).float()
    asked = run(baked(model, loras, [0.4, 0.0]), torch.bfloat16).float()
    unchanged = run(worker, torch.bfloat16).float()
    assert (live - asked).abs().mean() < 0.1 * (unchanged - asked).abs().mean()


@pytest.mark.parametrize("kind", ["int8-weights", "fp8", "int8"])
def test_live_adapters_work_on_8_bit_layers(loras, kind):
    """The correction is as exact as on wide weights; what remains is the rounding of the weights themselves."""
    model = transformer(0)
    worker = baked(model, loras, [1.0, 1.2])
    replace_linears(worker, kind)
    before = run(worker)
    changes = strength_changes(loras, asked=[0.4, 0.0], baked=[1.0, 1.2])
    with live_adapters({"high": worker}, {"high": changes}, torch.float32):
        live = run(worker)
    asked = run(baked(model, loras, [0.4, 0.0]))
    assert (live - asked).abs().mean() < 0.15 * (before - asked).abs().mean()
    assert torch.equal(run(worker), before)


def test_live_adapters_leave_no_trace(loras):
    worker = baked(transformer(0), loras, [1.0, 1.2])
    before, output = state(worker), run(worker)
    with live_adapters({"high": worker}, {"high": [(loras[0], -1.0)]}, torch.float32):
        assert hooks(worker) == 20
        run(worker)
    assert hooks(worker) == 0
    assert torch.equal(run(worker), output)
    assert all(torch.equal(before[name], tensor) for name, tensor in worker.state_dict().items())


def test_live_adapters_leave_no_trace_after_a_failure_midway(loras):
    worker = baked(transformer(0), loras, [1.0, 1.2])
    before, output = state(worker), run(worker)
    with (
        pytest.raises(Cancelled),
        live_adapters({"high": worker}, {"high": [(loras[0], 1.0)]}, torch.float32),
    ):
        run(worker)
        raise Cancelled("the job was cancelled")
    assert hooks(worker) == 0
    assert torch.equal(run(worker), output)
    assert all(torch.equal(before[name], tensor) for name, tensor in worker.state_dict().items())


def test_live_adapters_leave_no_trace_when_they_cannot_be_set(loras, tmp_path):
    """The second expert is refused after the first got its hooks."""
    high, low = transformer(0), transformer(1)
    extra = {"diffusion_model.blocks.1.self_attn.norm_q.diff": torch.ones(WIDTH)}
    odd = saved(tmp_path / "odd_low.safetensors", 4, extra)
    changes = {"high": [(loras[0], 1.0)], "low": [(odd, 1.0)]}
    with pytest.raises(InvalidInput), live_adapters({"high": high, "low": low}, changes, torch.float32):
        pytest.fail("entered")
    assert hooks(high) == hooks(low) == 0


def test_live_adapters_change_each_expert_by_its_own(loras):
    high, low = transformer(0), transformer(1)
    changes = {"high": [(loras[0], 1.0)], "low": [(loras[1], 0.5)]}
    with live_adapters({"high": high, "low": low}, changes, torch.float32):
        outputs = run(high), run(low)
    torch.testing.assert_close(outputs[0], run(baked(high, loras, [1.0, 0.0])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1], run(baked(low, loras, [0.0, 0.5])), rtol=1e-4, atol=1e-5)


def test_live_adapters_without_a_change_set_nothing(loras):
    model = transformer(0)
    with live_adapters({"high": model}, {"high": []}, torch.float32):
        assert hooks(model) == 0


def test_live_adapters_apply_whole_deltas_of_linear_layers(tmp_path):
    extra = {
        "diffusion_model.blocks.1.ffn.0.diff_b": torch.linspace(-1, 1, FFN),
        "diffusion_model.head.head.diff": torch.linspace(-1, 1, 64 * WIDTH).reshape(64, WIDTH),
    }
    lora = saved(tmp_path / "high.safetensors", 5, extra)
    model = transformer(0)
    with live_adapters({"high": model}, {"high": [(lora, 0.5)]}, torch.float32):
        live = run(model)
    torch.testing.assert_close(live, run(baked(model, [lora], [0.5])), rtol=1e-4, atol=1e-5)


def test_live_adapters_reach_compiled_blocks(loras):
    """A compiled block ignores a hook that was set after it; the second half is the control that shows it."""
    model = transformer(0)
    expected = run(baked(model, loras, [1.0, 0.0]))
    for block in model.blocks:
        block.compile(backend="eager")
    plain = run(model)
    with live_adapters({"high": model}, {"high": [(loras[0], 1.0)]}, torch.float32):
        live = run(model)
    torch.testing.assert_close(live, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(model), plain)

    handle = model.blocks[0].attn1.to_q.register_forward_hook(lambda _module, _args, output: output + 100)
    assert torch.equal(run(model), plain)
    handle.remove()


def test_live_adapters_notice_a_module_that_is_never_called(loras):
    model = transformer(0)
    last = model.blocks[1]
    with (
        pytest.raises(RuntimeError, match="10 modules ran past their LoRA correction"),
        live_adapters({"high": model}, {"high": [(loras[0], 1.0)]}, torch.float32),
    ):
        model.blocks[1] = model.blocks[0]
        run(model)
    assert hooks(model) == hooks(last) == 0


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.norm3.diff_b",
        "blocks.0.self_attn.norm_q.diff",
        "blocks.0.modulation.diff",
        "patch_embedding.diff",
    ],
)
def test_live_adapters_refuse_what_only_the_bake_can_change(tmp_path, key):
    lora = saved(tmp_path / "high.safetensors", 6, {f"diffusion_model.{key}": torch.ones(WIDTH)})
    model = transformer(0)
    with (
        pytest.raises(InvalidInput, match="its strength is fixed at bake"),
        live_adapters({"high": model}, {"high": [(lora, 1.0)]}, torch.float32),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH + 1), (WIDTH + 1, WIDTH)])
def test_live_adapters_refuse_a_delta_of_another_shape(tmp_path, shape):
    save_file({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(shape)}, tmp_path / "high.safetensors")
    lora = load_lora(tmp_path / "high.safetensors")
    model = transformer(0)
    with (
        pytest.raises(WeightsCorrupt, match=r"not \(48, 32\)"),
        live_adapters({"high": model}, {"high": [(lora, 1.0)]}, torch.float32),
    ):
        pytest.fail("entered")


def test_live_adapters_refuse_a_module_that_is_not_there(tmp_path):
    save_file({"blocks.9.ffn.0.diff": torch.ones(FFN, WIDTH)}, tmp_path / "high.safetensors")
    model = transformer(0)
    with (
        pytest.raises(WeightsCorrupt, match=r"blocks\.9\.ffn\.net\.0\.proj, which the model does not have"),
        live_adapters({"high": model}, {"high": [(load_lora(tmp_path / "high.safetensors"), 1.0)]}, torch.float32),
    ):
        pytest.fail("entered")
