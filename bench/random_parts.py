"""The full-size models with random weights, built on the card: for measuring where no real weights are.

The same rows, published configurations, classes and dtypes as the bake's; only the values are drawn. Tokenizers,
image processors and schedulers come from the tiny twins.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from engine.parts import fill, run_dtype
from engine.profile import Component, Profile
from engine.published import published_model
from engine.residency import is_transformer
from engine.weights import Parts

DEVIATION = 0.02  # of every matrix and convolution: keeps forty blocks finite in bf16
# Of the convolution that makes Wan's pixels. With DEVIATION the film is noise at full contrast, 14.5 MB at 832x480x81
# in a trial on a CPU, and a job's end would be x264's time for noise. So it is 4.3 MB, about what a generated film is
# taken to have, and a contrast of 10 levels, in bf16 as in fp32.
FILM_DEVIATION = 0.0025


def deviation(component: Component, name: str) -> float:
    """Of the tensor `name`, where it is neither a norm nor a bias."""
    makes_film = component.class_name == "AutoencoderKLWan" and name == "decoder.conv_out.weight"
    return FILM_DEVIATION if makes_film else DEVIATION


@dataclass(frozen=True)
class RandomParts:
    """The Parts of `profile`, drawn from `seed`. `rest`: where what holds no tensors comes from.

    `blocks`: of each transformer, fewer than published; every block is of its full size.
    """

    profile: Profile
    rest: Parts
    seed: int = 0
    blocks: int | None = None

    def load(self, name: str, device: str = "cpu") -> Any:
        """The component `name`; see engine.weights.Parts. The same seed gives the same weights on one device."""
        component = self.profile.component(name)
        if component.dtype is None:
            return self.rest.load(name, device)
        model = published_model(component)
        if self.blocks is not None and is_transformer(name):
            del model.blocks[self.blocks :]
        generator = torch.Generator(device).manual_seed(self.seed + zlib.crc32(component.folder.encode()))
        tied = dict(component.tied)
        state = {
            key: _draw(component, key, empty.shape, device, generator)
            for key, empty in model.state_dict().items()
            if key not in tied
        }
        return fill(model, component, state, device)


def _draw(component: Component, name: str, shape: torch.Size, device: str, generator: torch.Generator) -> torch.Tensor:
    """Norms are 1, biases 0, all else is normal; nothing is ever held in a wider dtype than it runs in."""
    tensor = torch.empty(shape, dtype=run_dtype(component, name, device), device=device)
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        return tensor.zero_()
    if kind == "gamma" or "norm" in module.rpartition(".")[2]:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, deviation(component, name), generator=generator)
