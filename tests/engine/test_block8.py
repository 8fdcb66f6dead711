"""Block8: diffusers' block with the rounding fused in, close to it, under the same names."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from engine import attention, block8, text_attention
from engine.attention import WanProcessor
from engine.block8 import Block8, OnePassProcessor, TextProcessor, install
from engine.linear8 import replace_linears
from engine.linear8_check import snr_db

DIM, HEADS, TOKENS = 64, 2, 24
PLACES = [
    "attn1.to_q", "attn1.norm_q", "attn1.norm_k", "attn1.to_out.0", "attn1.to_out.1", "attn2.to_q", "attn2.norm_q",
    "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
]  # fmt: skip


class Holder(torch.nn.Module):
    """A model of two blocks."""

    def __init__(self, kind: str | None, image_dim: int | None) -> None:
        super().__init__()
        made = [
            WanTransformerBlock(DIM, 160, HEADS, cross_attn_norm=True, added_kv_proj_dim=image_dim) for _ in range(2)
        ]
        self.blocks = torch.nn.ModuleList(made)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        self.to(torch.bfloat16).requires_grad_(False).eval()
        for block in self.blocks:
            block.scale_shift_table.data = block.scale_shift_table.float()
            block.norm2.float()
        if kind is not None:
            replace_linears(self, kind)
        attention.install(self, "native")


@pytest.fixture(autouse=True)
def a_card_that_passes(monkeypatch):
    monkeypatch.setattr(block8.rounding, "problem", lambda _device: None)
    monkeypatch.setattr(block8.text_attention, "problem", lambda _device: None)


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, 512 + 7, DIM, generator=generator).to(torch.bfloat16)
    angles = torch.randn(1, TOKENS, 1, DIM // HEADS // 2, generator=generator).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": torch.randn(1, TOKENS, DIM, generator=generator).to(torch.bfloat16),
        "encoder_hidden_states": context,
        "temb": torch.randn(1, 6, DIM, generator=generator),
        "rotary_emb": (angles.cos(), angles.sin()),
    }


@pytest.mark.parametrize("image_dim", [None, DIM])
def test_block_gives_what_the_stock_block_gives_but_for_roundings_less(given, image_dim):
    model = Holder("fp8", image_dim)
    stock = model.blocks[0](**given)
    assert install(model, "cuda") == ()
    assert type(model.blocks[0]) is Block8
    assert snr_db(stock, model.blocks[0](**given)) > 25  # both are 30 dB from the unrounded block


def test_block_is_as_near_to_the_wide_block_as_the_stock_one(given):
    wide = Holder(None, None).blocks[0](**given)
    model = Holder("fp8", None)
    stock = snr_db(wide, model.blocks[0](**given))
    install(model, "cuda")
    assert snr_db(wide, model.blocks[0](**given)) > stock - 1


def test_install_keeps_every_tensor_where_it_is_under_its_name():
    model = Holder("fp8", None)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    install(model, "cuda")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def processors(model):
    return [attn.processor for block in model.blocks for attn in (block.attn1, block.attn2)]


def test_install_keeps_the_kernel_of_each_attention():
    model = Holder("fp8", None)
    install(model, "cuda")
    assert [(type(one), isinstance(one, WanProcessor), one.kernel) for one in processors(model)] == [
        (OnePassProcessor, True, "native"),
        (TextProcessor, True, "native"),
    ] * 2


@pytest.mark.parametrize(("image_dim", "to_text"), [(None, "attend_text_round"), (DIM, "plain_round")])
def test_block_norms_and_turns_and_rounds_for_to_out_and_ends_in_one_pass_each(given, image_dim, to_text, monkeypatch):
    model = Holder("fp8", image_dim)
    install(model, "cuda")
    called = []
    for name in ("norm_rotate", "plain_round", "attend_text_round", "add_gated"):
        one_pass = getattr(block8, name)
        monkeypatch.setattr(block8, name, lambda *args, n=name, f=one_pass: called.append(n) or f(*args))
    model.blocks[0](**given)
    assert called == ["norm_rotate", "norm_rotate", "plain_round", to_text, "add_gated"]


@pytest.mark.parametrize("place", PLACES)
def test_block_lets_a_hook_on_a_layer_add_to_it(given, place):
    model = Holder("fp8", None)
    install(model, "cuda")
    block = model.blocks[0]
    without = block(**given)
    hook = block.get_submodule(place).register_forward_hook(lambda _module, _args, out: out + 1)
    assert not torch.equal(block(**given), without)
    hook.remove()
    assert torch.equal(block(**given), without)


@pytest.mark.parametrize("place", ["attn1.norm_q", "attn1.norm_k", "attn1.to_out.0", "attn2.norm_q", "attn2.to_out.0"])
def test_hooked_block_runs_as_the_stock_block(given, place):
    model = Holder("fp8", None)
    model.blocks[0].get_submodule(place).register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    stock = model.blocks[0](**given)
    install(model, "cuda")
    assert torch.equal(model.blocks[0](**given), stock)


def test_block_of_two_videos_at_once_runs_as_the_stock_block(given):
    model = Holder("fp8", None)
    twice = {name: value if name == "rotary_emb" else torch.cat([value, value]) for name, value in given.items()}
    stock = model.blocks[0](**twice)
    install(model, "cuda")
    assert torch.equal(model.blocks[0](**twice), stock)


@pytest.mark.parametrize("kind", [None, "int8", "fp8-weights"])
def test_install_leaves_other_kinds_alone(kind):
    model = Holder(kind, None)
    assert install(model, "cuda") == ()
    assert type(model.blocks[0]) is WanTransformerBlock
    assert {type(one) for one in processors(model)} == {WanProcessor}


def test_install_leaves_a_model_alone_when_there_is_no_card():
    model = Holder("fp8", None)
    assert install(model, "cpu") == ()
    assert type(model.blocks[0]) is WanTransformerBlock
    assert {type(one) for one in processors(model)} == {WanProcessor}


def test_kernel_that_is_installed_later_is_the_one_that_blocks_use(given):
    model = Holder("fp8", None)
    assert install(model, "cuda") == ()
    attention.install(model, "flash4", "cudnn")
    assert install(model, "cuda") == ()
    own, other = processors(model)[:2]
    assert (type(own), type(other)) == (OnePassProcessor, TextProcessor)
    assert {(one.kernel, one.few) for one in processors(model)} == {("flash4", "cudnn")}
    assert own._attend is attention.KERNELS["flash4"].attend


def calls(model, given, monkeypatch):
    """How many keys each attention of the first block had: to the text's kernels, and to the one that was chosen."""
    to_text, chosen = [], []
    rounded = text_attention.attend_text_round
    monkeypatch.setattr(
        block8, "attend_text_round", lambda q, w, k, v, eps: to_text.append(k.shape[1]) or rounded(q, w, k, v, eps)
    )
    for one in processors(model):
        right, text = one._attend, one._attend_text
        one._attend = lambda q, k, v, f=right: chosen.append(k.shape[1]) or f(q, k, v)
        one._attend_picture = one._attend
        if text is text_attention.attend_text:
            one._attend_text = lambda q, k, v, f=text: to_text.append(k.shape[1]) or f(q, k, v)
        else:
            one._attend_text = one._attend
    model.blocks[0](**given)
    return to_text, chosen


@pytest.mark.parametrize(("image_dim", "own_and_image"), [(None, [TOKENS]), (DIM, [TOKENS, 7])])
def test_block_attends_to_the_text_alone_with_the_texts_kernels(given, image_dim, own_and_image, monkeypatch):
    if image_dim is None:
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, 7:]
    model = Holder("fp8", image_dim)
    install(model, "cuda")
    assert calls(model, given, monkeypatch) == ([512], own_and_image)


@pytest.mark.parametrize("image_dim", [None, DIM])
@pytest.mark.parametrize("real", [1, 12, 512])
def test_block_is_as_near_to_the_wide_block_as_with_plain_attention_to_the_text(given, real, image_dim, monkeypatch):
    context = given["encoder_hidden_states"] = given["encoder_hidden_states"][:, 0 if image_dim else 7 :]
    context[:, context.shape[1] - 512 + real :] = context[:, -1:].clone()
    with_text, plain = Holder("fp8", image_dim), Holder("fp8", image_dim)
    install(with_text, "cuda")
    monkeypatch.setattr(block8.text_attention, "problem", lambda _device: "a reason")
    install(plain, "cuda")
    wide = Holder(None, image_dim).blocks[0](**given)
    assert snr_db(wide, with_text.blocks[0](**given)) > snr_db(wide, plain.blocks[0](**given)) - 0.5


def test_hooked_block_attends_to_the_text_as_the_stock_block(given, monkeypatch):
    model = Holder("fp8", None)
    install(model, "cuda")
    model.blocks[0].attn1.norm_q.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    assert calls(model, given, monkeypatch)[0] == []


def test_attention_to_the_text_takes_no_mask(given):
    model = Holder("fp8", None)
    install(model, "cuda")
    attn = model.blocks[0].attn2
    rows = block8.Rounded(*block8.plain_round(given["hidden_states"][0]), torch.bfloat16)
    rounded = block8._batch(rows.values, rows.scale, given["hidden_states"])
    with pytest.raises(ValueError, match="takes no mask"):
        attn(rounded, given["encoder_hidden_states"], torch.ones(1, 512 + 7, dtype=torch.bool), None)


def test_install_says_why_when_only_the_texts_kernel_fails_and_keeps_the_chosen_one(given, monkeypatch):
    monkeypatch.setattr(block8.text_attention, "problem", lambda _device: "its result is off (relative error 0.100)")
    model = Holder("fp8", None)
    said = install(model, "cuda")
    assert said == ("the text attention kernels are not used: its result is off (relative error 0.100)",)
    assert type(model.blocks[0]) is Block8
    assert calls(model, given, monkeypatch) == ([], [TOKENS, 512 + 7])


def test_install_says_why_when_the_card_fails_and_leaves_the_model_alone(monkeypatch):
    monkeypatch.setattr(block8.rounding, "problem", lambda _device: "a result is off (SNR 3.0 dB)")
    model = Holder("fp8", None)
    assert install(model, "cuda") == ("the one-pass rounding kernels are not used: a result is off (SNR 3.0 dB)",)
    assert type(model.blocks[0]) is WanTransformerBlock
    assert {type(one) for one in processors(model)} == {WanProcessor}


def test_block_is_one_graph_for_all_blocks(given):
    torch._dynamo.reset()
    model = Holder("fp8", None)
    install(model, "cuda")
    compiled = torch.compile(Block8.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for block in model.blocks:
            compiled(block, given["hidden_states"], given["encoder_hidden_states"], given["temb"], given["rotary_emb"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
