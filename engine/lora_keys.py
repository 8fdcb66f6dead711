"""Names in a published Wan LoRA file -> parameter names of diffusers' WanTransformer3DModel.

Three styles circulate: bare names with PEFT's adapter inside (the SVI authors), the ComfyUI prefix
with lora_A/lora_B (conversions of these), that prefix with lora_down/lora_up/alpha (LightX2V). All name
modules as the original Wan code does. A key that fits none of this is the caller's to refuse, never to drop.
"""

import re
from typing import NamedTuple

PREFIX = "diffusion_model."

_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj",
    "norm_q": "norm_q", "norm_k": "norm_k", "norm_k_img": "norm_added_k",
}  # fmt: skip
_BLOCK = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
_TOP = {
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A(?:\.default)?\.weight|lora_down\.weight)|"
    r"(?P<up>lora_B(?:\.default)?\.weight|lora_up\.weight)|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<bias>diff_b))"
)


class Target(NamedTuple):
    """What one key of a file is: a part of the delta of one parameter."""

    parameter: str
    part: str
    """down, up and alpha make a low-rank delta; diff and bias are a whole one."""


def target(key: str) -> Target | None:
    """The parameter that a file's key changes, or None for a key that this model has no place for."""
    match = _KEY.fullmatch(key.removeprefix(PREFIX))
    if match is None:
        return None
    part = str(match.lastgroup)
    module = match["module"]
    table = _table(module)
    if table is not None:  # a parameter of its own, so nothing but a whole delta can change it
        return Target(table, part) if part == "diff" else None
    name = _module(module)
    if name is None:
        return None
    return Target(f"{name}.bias" if part == "bias" else f"{name}.weight", part)


def _module(original: str) -> str | None:
    if original in _TOP:
        return _TOP[original]
    match = re.fullmatch(r"(blocks\.\d+)\.(?:(self_attn|cross_attn)\.(\w+)|(\w+(?:\.\d)?))", original)
    if match is None:
        return None
    block, attention, projection, other = match.groups()
    inside = _BLOCK.get(other) if attention is None else _PROJECTION.get(projection)
    if inside is None:
        return None
    return f"{block}.{inside}" if attention is None else f"{block}.{_ATTENTION[attention]}.{inside}"


def _table(original: str) -> str | None:
    """The modulation tables have no module of their own, so their names end without `.weight`."""
    match = re.fullmatch(r"(?:(blocks\.\d+)|head)\.modulation", original)
    if match is None:
        return None
    return f"{match[1]}.scale_shift_table" if match[1] else "scale_shift_table"
