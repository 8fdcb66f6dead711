"""One table of distances for all layers of a text encoder, and the same bits."""

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from engine.position_buckets import shared_buckets
from tests.engine.operators import Operators

LAYERS = 3
LOGARITHM = torch.ops.aten.log.default  # sorting into buckets takes one, nothing else in the encoder does


@pytest.fixture
def encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": LAYERS, "vocab_size": 50}
    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


def embed(encoder: UMT5EncoderModel, tokens: int) -> torch.Tensor:
    ids = torch.arange(tokens)[None] % 50
    with torch.inference_mode():
        return encoder(ids, (ids < 40).long()).last_hidden_state


@pytest.mark.parametrize("tokens", [7, 512])
def test_layers_share_a_table_and_find_the_same_bits(encoder: UMT5EncoderModel, tokens: int) -> None:
    with Operators() as apart:
        wanted = embed(encoder, tokens)
    with Operators() as shared, shared_buckets(encoder):
        found = embed(encoder, tokens)
    assert torch.equal(found, wanted)
    assert (apart.called[LOGARITHM], shared.called[LOGARITHM]) == (LAYERS, 1)


def test_the_next_call_has_a_table_of_its_own_length(encoder: UMT5EncoderModel) -> None:
    wanted = embed(encoder, 100)
    for tokens in (9, 100):
        with shared_buckets(encoder):
            found = embed(encoder, tokens)
    assert torch.equal(found, wanted)


def test_a_call_that_fails_leaves_the_encoder_as_it_was(encoder: UMT5EncoderModel) -> None:
    wanted = embed(encoder, 100)
    with pytest.raises(RuntimeError), shared_buckets(encoder):
        embed(encoder, 9)
        raise RuntimeError
    assert torch.equal(embed(encoder, 100), wanted)
