"""What stands between the products of an 8-bit UMT5, one operator where the library has six and eight.

Python launches a prompt's 1,350 operators one after the other while the card waits for them: two norms of six and a
GELU of eight a layer are a third. Each rounds once where the library rounds after every step, so an encoder in 16 bits,
whose results must be the library's to the last bit, keeps those.
"""

from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from engine.linear8 import Linear8


class OnePassNorm(UMT5LayerNorm):
    """x / sqrt(mean of x squared) * weight, rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def install(encoder: nn.Module) -> None:
    """Give an encoder with 8-bit weights its passes; leaves any other as it is."""
    if not any(isinstance(module, Linear8) for module in encoder.modules()):
        return
    for module in list(encoder.modules()):
        if type(module) is UMT5LayerNorm:
            module.__class__ = OnePassNorm  # no function of its own: it would hold the module, and so the card's memory
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
