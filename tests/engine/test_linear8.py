"""8-bit linear layers: the arithmetic, the state, the guards, and that a compiled one is a single graph."""

import weakref

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from engine import linear8
from engine.linear8 import Linear8, project, quantise, replace_linears, set_kind

ALL_KINDS = ("fp8", "int8", "fp8-weights", "int8-weights")


def make_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(512, 256)


def tiny_wan(layers: int = 2) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=36, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
    }


def test_quantise_gives_hand_computed_int8_values():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    weight_q, scale = quantise(weight, "int8")
    assert weight_q.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]  # 127/2 = 63.5, rounded half to even
    assert scale[0].item() == pytest.approx(2 / 127)


def test_quantise_keeps_fp8_representable_rows_exactly():
    weight = torch.tensor([[448.0, 1.5, -0.25, 208.0]])  # amax 448 makes the scale 1
    weight_q, scale = quantise(weight, "fp8")
    assert weight_q.float().tolist() == [[448.0, 1.5, -0.25, 208.0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantise_refuses_a_weight_that_is_not_finite(value):
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, value]]), "fp8")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_state_is_three_plain_tensors(kind):
    state = Linear8.from_linear(make_linear(), kind).state_dict()
    assert {name: (tuple(t.shape), type(t)) for name, t in state.items()} == {
        "weight_q": ((256, 512), torch.Tensor),
        "weight_scale": ((256,), torch.Tensor),
        "bias": ((256,), torch.Tensor),
    }


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_keeps_type_and_leading_axes(kind, dtype):
    out = Linear8.from_linear(make_linear(), kind)(torch.randn(2, 3, 512).to(dtype))
    assert (out.shape, out.dtype) == ((2, 3, 256), dtype)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_project_equals_the_layers_one_by_one(kind):
    layers = [Linear8.from_linear(make_linear(), kind) for _ in range(3)]
    inputs = torch.randn(2, 4, 512)
    outs = project(inputs, layers)
    assert all(torch.equal(out, layer(inputs)) for out, layer in zip(outs, layers, strict=True))


def test_project_takes_plain_and_mixed_layers():
    layers = [make_linear(), Linear8.from_linear(make_linear(), "fp8"), Linear8.from_linear(make_linear(), "int8")]
    inputs = torch.randn(4, 512)
    outs = project(inputs, layers)
    assert all(torch.equal(out, layer(inputs)) for out, layer in zip(outs, layers, strict=True))


def test_project_rounds_the_input_once_for_layers_of_one_kind(monkeypatch):
    rounded = []
    round_rows = linear8.round_rows
    monkeypatch.setattr(linear8, "round_rows", lambda x, kind: rounded.append(1) or round_rows(x, kind))
    layers = [Linear8.from_linear(make_linear(), "fp8") for _ in range(3)]
    rounded.clear()
    project(torch.randn(4, 512), layers)
    assert len(rounded) == 1


def test_project_passes_no_hook_by():
    layers = [Linear8.from_linear(make_linear(), "fp8") for _ in range(2)]
    inputs = torch.randn(4, 512)
    expected = layers[1](inputs) + 1
    layers[1].register_forward_hook(lambda _module, _inputs, out: out + 1)
    assert torch.equal(project(inputs, layers)[1], expected)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_forward_leaves_its_input_as_it_was(kind):
    inputs = torch.randn(4, 512)
    before = inputs.clone()
    Linear8.from_linear(make_linear(), kind)(inputs)
    assert torch.equal(inputs, before)


def test_nan_activation_is_not_hidden():
    inputs = torch.randn(4, 512)
    inputs[2, 5] = float("nan")
    out = Linear8.from_linear(make_linear(), "int8-weights")(inputs)
    assert [bool(row.isnan().any()) for row in out] == [False, False, True, False]
    out = Linear8.from_linear(make_linear(), "fp8")(inputs)
    assert [bool(row.isnan().all()) for row in out] == [False, False, True, False]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_file_round_trip_into_a_meta_frame_gives_equal_output(kind, tmp_path):
    model = tiny_wan()
    replace_linears(model, kind)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        frame = WanTransformer3DModel.from_config(model.config).eval()
    replace_linears(frame, kind)
    frame.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True, assign=True)
    frame.rope = model.rope  # not persistent: made by the constructor, which ran on the meta device here
    inputs = wan_inputs()
    with torch.no_grad():
        assert torch.equal(frame(**inputs).sample, model(**inputs).sample)


class Made(TorchDispatchMode):
    """Keeps every tensor that is made inside the block."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors += out if isinstance(out, (tuple, list)) else [out]
        return out


@pytest.mark.parametrize("kind", ["fp8-weights", "int8-weights"])
def test_widened_weight_is_held_once_and_in_the_activations_type(kind):
    """Of T5's largest layer that is 84 MB; through fp32 it was 420."""
    layer, inputs = Linear8.from_linear(make_linear(), kind), torch.randn(64, 512).to(torch.bfloat16)
    with torch.no_grad(), Made() as made:
        layer(inputs)
    wide = {tensor.data_ptr(): tensor.dtype for tensor in made.tensors if tensor.numel() == 256 * 512}
    assert list(wide.values()) == [torch.bfloat16]


@pytest.mark.parametrize("kind", ["fp8-weights", "int8-weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened_weight_is_rounded_once(kind, dtype):
    layer, inputs = Linear8.from_linear(make_linear(), kind), torch.randn(4, 512).to(dtype)
    weight = (layer.weight_q.float() * layer.weight_scale.unsqueeze(-1)).to(dtype)
    assert torch.equal(layer(inputs), functional.linear(inputs, weight, layer.bias.to(dtype)))


def test_layer_has_no_wide_weight_for_t5_to_cast_its_input_to():
    """With a weight_q under that name T5's feed-forward would round its input to 8 bits, with no scale."""
    config = UMT5Config(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1, vocab_size=32)
    encoder = UMT5EncoderModel(config).to(torch.bfloat16).eval()
    replace_linears(encoder, "fp8-weights", {})
    seen = []
    wo = encoder.encoder.block[0].layer[1].DenseReluDense.wo
    wo.register_forward_pre_hook(lambda _module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        encoder(torch.arange(8)[None])
    assert seen == [torch.bfloat16]


def test_cast_of_the_model_leaves_the_stored_form_alone():
    layer = Linear8.from_linear(make_linear(), "fp8").to(torch.bfloat16)
    assert (layer.weight_q.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_replace_keeps_embedders_and_the_output_layer_with_a_reason():
    replaced = replace_linears(tiny_wan(), "fp8")
    assert sorted(replaced.kept) == [
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "proj_out",
    ]
    assert len(replaced.names) == 20  # two blocks of 8 projections and 2 feed-forward layers
    assert all(replaced.kept.values())


def test_replace_says_which_layers_the_kernel_would_refuse():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24))
    replaced = replace_linears(model, "fp8")
    assert replaced.names == ("0",)
    assert "multiple of 16" in replaced.kept["1"]


def test_replace_lets_each_wide_weight_go_before_the_next_one():
    """On a card of 48 GB a 29 GB model has no room for all its layers twice."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    seen = []
    quantise_one = linear8.quantise

    def watched(weight, kind):
        seen.append(sum(ref() is not None for ref in alive))
        return quantise_one(weight, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear8, "quantise", watched)
        replace_linears(model, "fp8")
    assert seen == [4, 3, 2, 1]


def test_replace_takes_each_layer_to_the_device_that_rounds_it_and_nothing_else():
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 24))
    replace_linears(model, "fp8", device="meta")
    assert {name: str(tensor.device) for name, tensor in model.state_dict().items()} == {
        "0.weight_q": "meta", "0.weight_scale": "meta", "0.bias": "meta",
        "1.weight": "cpu", "1.bias": "cpu", "2.weight": "cpu", "2.bias": "cpu",
    }  # fmt: skip


def test_replace_refuses_live_adapters():
    model = nn.ModuleDict({"to_q": nn.ModuleDict({"base_layer": nn.Linear(16, 16)})})
    with pytest.raises(ValueError, match="merge adapters"):
        replace_linears(model, "fp8")


def test_set_kind_switches_every_layer_to_widened_weights():
    model = tiny_wan()
    replace_linears(model, "fp8")
    assert set_kind(model, "fp8-weights") == 20


def test_set_kind_refuses_the_other_format():
    model = nn.Sequential(Linear8.from_linear(make_linear(), "fp8"))
    with pytest.raises(ValueError, match="int8"):
        set_kind(model, "int8")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_quantised_model_compiles_to_one_graph_and_stays_equal(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    linear = Linear8.from_linear(make_linear(), kind)
    inputs = torch.randn(32, 512).to(torch.bfloat16)
    compiled = torch.compile(linear, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.equal(compiled(inputs), linear(inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_int8_kernel_never_sees_fewer_rows_than_it_takes(monkeypatch):
    """torch._int_mm on a card refuses 16 rows and fewer; its shape function does not know that."""
    kernel, seen = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(len(a)) or kernel(a, b))
    with FakeTensorMode():
        layer = Linear8(512, 256, bias=True, kind="int8", device="cuda")
        for rows in (1, 16, 17, 64):
            out = layer(torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda"))
            assert out.shape == (rows, 256)
    assert seen == [17, 17, 17, 64]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("rows", [3, 17, 512])
def test_card_path_passes_the_kernels_own_shape_checks(kind, rows):
    """The kernels' own shape functions refuse what a card would refuse: layouts, scale shapes, types."""
    with FakeTensorMode():
        layer = Linear8(512, 256, bias=True, kind=kind, device="cuda")
        out = layer(torch.empty(1, rows, 512, dtype=torch.bfloat16, device="cuda"))
        assert (out.shape, out.dtype, out.device.type) == ((1, rows, 256), torch.bfloat16, "cuda")
