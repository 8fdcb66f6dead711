"""What a video transformer hands to its blocks, known before it has run.

A job's size is known when it begins; its first forward comes seconds later, when weights and prompt are there. The
time between is enough to compile the blocks, if one knows what they will be called with. The model itself is asked:
its shadow (see `shadow`) runs on fake tensors as far as the first block.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.geometry import LatentShape
from engine.shadow import Spec, Specs, describe, shadow
from engine.text import MAX_TOKENS

CPU = torch.device("cpu")


class _Reached(BaseException):
    """Leaves a forward at its first block. No library code catches it on the way."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args_of_block = args


class _FirstBlock(nn.Module):
    def forward(self, *args: Any) -> None:
        raise _Reached(args)


def block_inputs(
    model: nn.Module, latent: LatentShape, device: torch.device, image_tokens: int = 0
) -> tuple[Specs, ...]:
    """The arguments of each block of a Wan transformer in a forward on `device` over one latent of this shape.

    `image_tokens`: of the picture's embedding, for a model that takes one. The question is put to a shadow on the CPU,
    which needs no card to answer it.

    Raises:
        ValueError: the model takes a picture's embedding and `image_tokens` is 0, or the other way round.
    """
    with FakeTensorMode():
        whole = shadow(model, CPU, {"blocks": nn.ModuleList([_FirstBlock()])})
        try:
            whole(**model_inputs(model, latent, CPU, image_tokens))
        except _Reached as reached:
            return tuple(_on(device, describe(arg)) for arg in reached.args_of_block)
    raise ValueError(f"{type(model).__name__} never calls its blocks")


def model_inputs(
    model: nn.Module, latent: LatentShape, device: torch.device, image_tokens: int = 0
) -> dict[str, torch.Tensor]:
    """What a sampler calls the model with: one latent, one timestep, one prompt and, if any, one picture. All zeros.

    Raises:
        ValueError: the model takes a picture's embedding and `image_tokens` is 0, or the other way round.
    """
    config: Any = model.config
    dtype: Any = model.dtype
    if (config.image_dim is not None) != (image_tokens > 0):
        raise ValueError(f"image_dim is {config.image_dim}, and {image_tokens} image tokens are announced")
    inputs = {
        "hidden_states": torch.zeros(1, config.in_channels, *latent, dtype=dtype, device=device),
        "timestep": torch.zeros(1, device=device),
        "encoder_hidden_states": torch.zeros(1, MAX_TOKENS, config.text_dim, dtype=dtype, device=device),
    }
    if image_tokens:
        shape = (1, image_tokens, config.image_dim)
        inputs["encoder_hidden_states_image"] = torch.zeros(shape, dtype=dtype, device=device)
    return inputs


def _on(device: torch.device, specs: Specs) -> Specs:
    if isinstance(specs, Spec):
        return specs._replace(device=device)
    return tuple(_on(device, item) for item in specs)
