"""Components that come to the card for a while: same output, nothing copied back, nothing left behind."""

import pytest
import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from engine.visitor import Visitor

TOKENS = torch.tensor([[5, 9, 2, 1]])


@pytest.fixture
def encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def addresses(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


def encode(module: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return module(TOKENS).last_hidden_state


def test_visitor_computes_the_same_and_returns_to_its_host_copy(encoder):
    expected = encode(encoder)
    visitor = Visitor(encoder, "cpu")
    at_home = addresses(encoder)
    with torch.inference_mode():
        for _ in range(2):
            with visitor.on_card() as module:
                assert torch.equal(encode(module), expected)
                assert not addresses(module) & at_home
            assert addresses(encoder) == at_home


def test_visit_moves_each_byte_once_and_none_back(encoder):
    size_bytes = sum(t.numel() * t.element_size() for t in encoder.parameters())
    visitor = Visitor(encoder, "cpu")
    with visitor.on_card():
        pass
    assert size_bytes <= visitor.bytes_moved <= size_bytes * 1.05  # the pieces' alignment
    moved = visitor.bytes_moved
    with visitor.on_card():
        pass
    assert visitor.bytes_moved == 2 * moved


def test_tied_weights_stay_one_parameter(encoder):
    visitor = Visitor(encoder, "cpu")
    with visitor.on_card() as module:
        assert module.shared.weight is module.encoder.embed_tokens.weight


def test_failure_during_a_visit_sends_it_home(encoder):
    visitor = Visitor(encoder, "cpu")
    at_home = addresses(encoder)
    with pytest.raises(MemoryError), visitor.on_card():
        raise MemoryError
    assert addresses(encoder) == at_home


def test_change_made_on_the_card_does_not_come_home(encoder):
    expected = encode(encoder)
    visitor = Visitor(encoder, "cpu")
    with visitor.on_card() as module:
        module.shared.weight.data.zero_()
    assert torch.equal(encode(encoder), expected)


def test_unload_leaves_no_storage(encoder):
    Visitor(encoder, "cpu").unload()
    assert {tensor.device.type for tensor in encoder.parameters()} == {"meta"}


def test_unload_waits_for_copies_before_what_they_read_from_goes(encoder, monkeypatch):
    visitor, order = Visitor(encoder, "cpu"), []
    visitor._device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("copies are done"))
    monkeypatch.setattr(visitor._host, "release", lambda: order.append("source is gone"))
    visitor.unload()
    assert order == ["copies are done", "source is gone"]
