"""A Wan block whose large 8-bit layers are handed rounded rows: norm, residual sum and GELU come with the rounding.

The arithmetic is that of diffusers' WanTransformerBlock, with one rounding to bf16 less before each 8-bit one and
between the norm of a query or key and its turning. Attention to the text counts its padding once, and hands on rounded
rows, where those kernels passed their self-test too. Used for fp8 blocks on a card whose kernels passed theirs; every
other block stays as it is.
"""

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from engine import rounding, text_attention
from engine.attention import WanProcessor
from engine.linear8 import Linear8, Rounded, project
from engine.rounding import add_gated, add_norm_round, gelu_round, norm_rotate, norm_round, plain_round
from engine.text_attention import attend_text_round


class Block8(WanTransformerBlock):
    """A block that is there already takes this class: its tensors stay where they are, under their names."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> Tensor:
        """hidden_states (1, tokens, dim) bf16, temb (1, 6, dim) -> (1, tokens, dim)."""
        if temb.shape[0] != 1 or temb.ndim != 3 or any(_is_watched(layer) for layer in _passed_by(self)):
            out: Tensor = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
            return out
        table = (self.scale_shift_table + temb.float())[0]
        shift, scale, gate, feed_shift, feed_scale, feed_gate = table.unbind(0)
        x = hidden_states[0]
        values, row_scale = norm_round(x, 1 + scale, shift, self.norm1.eps)
        seen = self.attn1(_batch(values, row_scale, x), None, None, rotary_emb)[0]
        norm2 = cast(nn.LayerNorm, self.norm2)
        x, values, row_scale = add_norm_round(x, seen, gate, norm2.weight.float(), norm2.bias.float(), norm2.eps)
        seen = self.attn2(_batch(values, row_scale, x), encoder_hidden_states, None, None)[0]
        x, values, row_scale = add_norm_round(x, seen, None, 1 + feed_scale, feed_shift, self.norm3.eps)
        fed = self._feed_forward(_batch(values, row_scale, x))[0]
        return add_gated(x, fed, feed_gate)[None]

    def _feed_forward(self, rounded: Rounded) -> Tensor:
        *_, widen, narrow = _rounded_layers(self)
        (wide,) = project(rounded, (widen,))
        values, row_scale = gelu_round(wide[0])
        (out,) = project(_batch(values, row_scale, wide), (narrow,))
        return out


class OnePassProcessor(WanProcessor):
    """Attention of a Block8. Activations that do not come rounded, from a block that runs as diffusers wrote it, go
    the way of the processor that was there before."""

    def __init__(self, before: WanProcessor) -> None:
        super().__init__(before.kernel, before.few)
        self._before = before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor | Rounded,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Rounded (1, n, dim) -> (1, n, dim); else as WanProcessor."""
        if not isinstance(hidden_states, Rounded):
            return self._before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is not None and attn.add_k_proj is None and attention_mask is None:
            return self._see_text(attn, hidden_states, encoder_hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def _see_text(self, attn: Any, x: Rounded, text: Tensor) -> Tensor:
        """x (1, n, dim), text (1, 512, dim) -> (1, n, dim), where there is no picture to be seen beside it."""
        return super().__call__(attn, x, text, None, None)

    def _norm(self, norm: Any, x: Tensor, heads: int, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
        if rotary_emb is None:
            return super()._norm(norm, x, heads, rotary_emb)
        cos, sin = (table[0, :, 0] for table in rotary_emb)
        return norm_rotate(x[0], norm.weight, cos, sin, norm.eps)[None].unflatten(2, (heads, -1))

    def _project_out(self, layer: Any, out: Tensor) -> Tensor:
        values, row_scale = plain_round(out[0])
        (projected,) = project(_batch(values, row_scale, out), (layer,))
        return projected


class TextProcessor(OnePassProcessor):
    """The same, to a text whose padding counts once; what is seen in it comes rounded.

    What is seen in a picture is added before the rounding, so beside one the text's part is not rounded here.
    """

    def __init__(self, before: WanProcessor) -> None:
        super().__init__(before)
        self._attend_text = text_attention.attend_text

    def _see_text(self, attn: Any, x: Rounded, text: Tensor) -> Tensor:
        (query,) = project(x, (attn.to_q,))
        key, value = project(text, (attn.to_k, attn.to_v))
        key = self._norm(attn.norm_k, key, attn.heads, None)
        value = value.unflatten(2, (attn.heads, -1))
        values, row_scale = attend_text_round(query[0], attn.norm_q.weight, key, value, attn.norm_q.eps)
        (out,) = project(_batch(values, row_scale, query), (attn.to_out[0],))
        projected: Tensor = attn.to_out[1](out)
        return projected


def _batch(values: Tensor, scale: Tensor, like: Tensor) -> Rounded:
    """As a batch of one, for a result of the type of `like`."""
    return Rounded(values[None], scale[None], like.dtype)


def install(model: nn.Module, device: str) -> tuple[str, ...]:
    """Make the model's fp8 blocks Block8 where the card can; returns what should be said.

    After another kernel was installed (engine.attention): again.
    """
    blocks: list[Any] = [block for block in model.modules() if _fits(block)]
    if not blocks or torch.device(device).type != "cuda":
        return ()
    problem = rounding.problem(device)
    if problem is not None:
        return (f"the one-pass rounding kernels are not used: {problem}",)
    problem = text_attention.problem(device)
    to_text = TextProcessor if problem is None else OnePassProcessor
    for block in blocks:
        block.__class__ = Block8
        block.attn1.set_processor(OnePassProcessor(block.attn1.processor))
        block.attn2.set_processor(to_text(block.attn2.processor))
    return () if problem is None else (f"the text attention kernels are not used: {problem}",)


def fits(model: nn.Module) -> bool:
    """Whether `install` would make all blocks of a transformer Block8 on a card whose kernels prove themselves."""
    return all(_fits(block) for block in model.get_submodule("blocks").children())


def is_installed(model: nn.Module) -> bool:
    """Whether all blocks of a transformer are Block8."""
    return all(isinstance(block, Block8) for block in model.get_submodule("blocks").children())


def _fits(block: nn.Module) -> bool:
    if not isinstance(block, WanTransformerBlock) or type(block) not in (WanTransformerBlock, Block8):
        return False
    if not isinstance(block.norm2, nn.LayerNorm):
        return False
    return all(isinstance(layer, Linear8) and layer.kind == "fp8" for layer in _rounded_layers(block))


def _rounded_layers(block: WanTransformerBlock) -> tuple[nn.Module, ...]:
    """Those that get rounded rows."""
    own, other = block.attn1, block.attn2
    widen, _, narrow = block.ffn.net
    outs = own.to_out[0], other.to_out[0]
    return own.to_q, own.to_k, own.to_v, other.to_q, *outs, widen.get_submodule("proj"), narrow


def _passed_by(block: WanTransformerBlock) -> tuple[nn.Module, ...]:
    """Those that are not called as layers. One that somebody hooked must be again."""
    return *_rounded_layers(block), block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
