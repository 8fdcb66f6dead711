"""An 8-bit text encoder with an operator where the library has six or eight: as near, and fewer launches."""

from copy import deepcopy

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from engine.eight_bits import KEEP_UMT5
from engine.linear8 import replace_linears
from engine.linear8_check import snr_db
from engine.umt5_passes import OnePassNorm, install
from tests.engine.operators import Operators

LAYERS = 6
IDS = torch.arange(40)[None]
# Of a norm the library has six, of GELU eight. Two norms a layer and one at the end.
SPARED = (6 - 1) * (2 * LAYERS + 1) + (8 - 1) * LAYERS


@pytest.fixture
def wide() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_ff": 320, "d_kv": 32, "num_heads": 4, "num_layers": LAYERS, "vocab_size": 50}
    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)).eval().to(torch.bfloat16)


@pytest.fixture
def narrow(wide: UMT5EncoderModel) -> UMT5EncoderModel:
    encoder = deepcopy(wide)
    replace_linears(encoder, "fp8-weights", KEEP_UMT5)
    return encoder


@torch.inference_mode()
def embed(encoder: UMT5EncoderModel) -> torch.Tensor:
    hidden: torch.Tensor = encoder(IDS).last_hidden_state.float()
    return hidden


def test_passes_are_no_further_from_float32_than_the_librarys(narrow: UMT5EncoderModel) -> None:
    float32 = embed(deepcopy(narrow).float())
    library = embed(narrow)
    install(narrow)
    ours = embed(narrow)
    assert not torch.equal(ours, library)
    assert snr_db(float32, ours) > snr_db(float32, library) - 0.5
    assert snr_db(float32, ours) > 30


def test_passes_are_exact_where_nothing_is_rounded(narrow: UMT5EncoderModel) -> None:
    encoder = narrow.float()
    wanted = embed(encoder)
    install(encoder)
    assert snr_db(wanted, embed(encoder)) > 100


def test_each_norm_and_gelu_is_one_operator(narrow: UMT5EncoderModel) -> None:
    with Operators() as before:
        embed(narrow)
    install(narrow)
    with Operators() as after:
        embed(narrow)
    assert sum(before.called.values()) - sum(after.called.values()) >= SPARED


def test_encoder_in_16_bits_keeps_the_librarys_bits(wide: UMT5EncoderModel) -> None:
    wanted = embed(wide)
    install(wide)
    assert not any(isinstance(module, OnePassNorm) for module in wide.modules())
    assert torch.equal(embed(wide), wanted)
