"""A Wan2.2 transformer of a few thousand random parameters, and an input for it."""

import torch
from diffusers import WanTransformer3DModel


def make_wan(seed: int, layers: int = 4, ffn_dim: int = 64) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=36, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=ffn_dim, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def wan_inputs(height: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 36, 2, height, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
    }
