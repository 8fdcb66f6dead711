"""Which classes have a form in 8 bits, what of them stays wide, and why.

A transformer works on tens of thousands of tokens, six times a clip and more: its activations are rounded too, where
the card multiplies 8-bit numbers faster. A text encoder works on 512 tokens once a prompt: there is no time to win,
T5's activations have outliers that one scale a token cannot hold, and all that 8 bits are wanted for is room. Its
weights are rounded, its activations never.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from engine.linear8 import KEEP, Replaced, replace_linears
from engine.profile import Component

KEEP_UMT5: Mapping[str, str] = MappingProxyType(
    {
        r"(^|\.)(shared|embed_tokens)(\.|$)": "the table of words: rows are looked up, and no product would be faster",
        r"(^|\.)relative_attention_bias(\.|$)": "added to every attention score of its layer, and 4 kB",
        r"(^|\.)(final_)?layer_norm(\.|$)": "one factor a channel, and T5's outliers live in some of them",
    }
)
"""What of the text encoder stays in its own type: pattern over the dotted name -> reason. None of it is a linear
layer; all that are linear are rounded."""


@dataclass(frozen=True)
class Form:
    """How a class is in 8 bits. `rounds_activations`: whether its layers may use the card's 8-bit product."""

    keep: Mapping[str, str]
    rounds_activations: bool

    def kind(self, precision: str) -> str:
        """The kind of linear8 for `precision`, fp8 or int8."""
        return precision if self.rounds_activations else f"{precision}-weights"


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "WanTransformer3DModel": Form(KEEP, rounds_activations=True),
        "UMT5EncoderModel": Form(KEEP_UMT5, rounds_activations=False),
    }
)
"""Class name -> its form. A component of a class that is not here has no 8-bit form."""


def to_eight_bits(model: nn.Module, component: Component, precision: str, device: str | None = None) -> Replaced:
    """Round the linear layers of `model` itself; on the meta device it becomes the empty frame of an 8-bit bake.

    `precision`: fp8 or int8. `device`: where each layer is rounded and stays; None: where it is.

    Raises:
        KeyError: the component's class has no 8-bit form.
    """
    form = FORMS[component.class_name]
    return replace_linears(model, form.kind(precision), form.keep, device)
