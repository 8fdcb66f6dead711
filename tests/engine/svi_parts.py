"""Wan's classes with a few thousand seeded random parameters, and inputs for them."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return vae.eval().requires_grad_(False)


def tiny_transformer(seed: int = 0, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # far from zero, so that every input can be seen in the output
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):  # as from_pretrained keeps them
            parameter.data = parameter.to(dtype)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(words: str = "a red fox runs through deep snow") -> PreTrainedTokenizerFast:
    """One token a known word; T5's special tokens, its end token after each text."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def pixels(frames: int, seed: int = 0, height: int = 16, width: int = 16) -> torch.Tensor:
    """(1, 3, frames, height, width) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, 3, frames, height, width), generator=generator) * 2 - 1


def noise(frames: int, seed: int = 0, height: int = 2, width: int = 2) -> torch.Tensor:
    """Latents (1, 16, frames, height, width), fp32."""
    return torch.randn((1, 16, frames, height, width), generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, height: int = 16, width: int = 16) -> Image.Image:
    """An RGB picture of coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
