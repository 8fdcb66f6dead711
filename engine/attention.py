"""Which attention kernel a video transformer uses, and the proof that it works on this card.

Why. Self-attention is half of a forward at 832x480x81 and three quarters at 1280x720x81, and kernels differ by a
factor of two. On an H200, at 32,760 tokens, 40 heads of 128, bf16: flash-attn-4 675 TFLOP/s, cuDNN 574, SageAttention
441, FlashAttention-2 359, and our own `attention16` a tenth more than the first. Packages for other builds of torch or
other cards fail in every way there is, from ImportError to black frames. So a kernel is chosen by a table and then has
to prove itself: it is compared with float32 at few and at the real number of heads, self- and cross-attention, before
anything is generated with it. The table is tried in its order and left at the first that passes, so nobody waits for
kernels that nobody will use.

How. Packages are called through one custom operator with a shape function, so that a compiled block holds no graph
break. The kernel belongs to the model: a processor of our own carries it. diffusers' set_attention_backend would also
set a default for every other model of the process.

Kinds. All kernels compute the same mathematics in another order, apart from `attention8` (engine.attention8) and
`sage`, which round queries and keys to 8 bits. Those two are never chosen unless they are asked for, and then for
self-attention: to the few keys of a text or a picture there is nothing to gain.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import attention8, attention16
from engine.attention_reach import WIDTH
from engine.linear8 import Rounded, project
from engine.operators import operator
from schemas.errors import SettingsError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query (b, n, heads, d), key and value (b, m, heads, d) -> (b, n, heads, d)."""

TEXT_TOKENS = 512  # of UMT5 in Wan; image tokens stand before them (WanAttnProcessor in transformer_wan.py)
HEAD_WIDTH = 128  # the 14B models' own
# Self-attention small and with the real heads, and cross-attention to the text: (tokens, keys, heads, d). One head
# size, the models' own: flash-attn-4 is compiled for each that it meets, 1.6 s apiece.
SHAPES = ((64, 64, 2, HEAD_WIDTH), (1024, 1024, 40, HEAD_WIDTH), (1024, TEXT_TOKENS, 40, HEAD_WIDTH))


@dataclass(frozen=True)
class Kernel:
    """One implementation. `capabilities`: from, and below, the card's compute capability; None: any device.

    `tolerance`: largest relative error against float32. bf16 kernels err by 0.003; twice that is a wrong one.
    """

    attend: Attend
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None
    tolerance: float = 0.01
    rounds: bool = False
    """It rounds queries and keys."""
    width: int | None = None
    """Of a head, where it takes no other."""
    problem: Callable[[str], str | None] = lambda _device: None
    """What this kernel alone is tested for on a device: a sentence, or None."""


def _native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _native(query, key, value)


# name -> (module, function, keyword arguments). All take (b, n, heads, d); some also return the log-sum-exp.
PACKAGES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "flash4": ("flash_attn.cute", "flash_attn_func", {}),
    # The package's own choice for Hopper is 128 x 128. 192 x 128 moves less through shared memory: 1.8 % faster there,
    # and the same bits.
    "flash4_wide": ("flash_attn.cute.interface", "_flash_attn_fwd", {"tile_mn": (192, 128), "mma_pv_is_rs": False}),
    "flash2": ("flash_attn", "flash_attn_func", {}),
    "sage": ("sageattention", "sageattn", {"tensor_layout": "NHD"}),
    "xformers": ("xformers.ops", "memory_efficient_attention", {}),
}


@cache
def _package_function(package: str) -> Callable[..., Any]:
    module, name, _ = PACKAGES[package]
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


@operator("attend", lambda _package, query, *_: query.new_empty(query.shape))
def _attend_with(package: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _package_function(package)(query, key, value, **PACKAGES[package][2])
    return (out[0] if isinstance(out, tuple) else out).contiguous()


def _package(name: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend_with(name, query, key, value)

    return attend


AMPERE, HOPPER, BLACKWELL, BEYOND = (8, 0), (9, 0), (10, 0), (13, 0)

KERNELS: Mapping[str, Kernel] = {
    "attention16": Kernel(attention16.attend16, (HOPPER, BLACKWELL), width=WIDTH, problem=attention16.problem),
    "flash4_wide": Kernel(_package("flash4_wide"), (HOPPER, BLACKWELL)),
    "flash4": Kernel(_package("flash4"), (AMPERE, BEYOND)),
    "cudnn": Kernel(_cudnn, (AMPERE, BEYOND)),
    "flash2": Kernel(_package("flash2"), (AMPERE, BLACKWELL)),
    "attention8": Kernel(
        attention8.attend8,
        (HOPPER, BLACKWELL),
        tolerance=0.05,
        rounds=True,
        width=WIDTH,
        problem=attention8.problem,
    ),
    "sage": Kernel(_package("sage"), (AMPERE, BEYOND), tolerance=0.05, rounds=True),
    "xformers": Kernel(_package("xformers"), ((7, 0), BEYOND)),
    "native": Kernel(_native, None),
}

# By the card's major version, fastest first. 9: measured (above). 8: torch's own kernel is FlashAttention-2,
# nothing else has been measured there. 10 and 12: the kernels' own reports.
ORDER: Mapping[int, tuple[str, ...]] = {
    8: ("native",),
    9: ("attention16", "flash4_wide", "flash4", "cudnn", "flash2", "native"),
    10: ("flash4", "cudnn", "native"),
    12: ("flash4", "cudnn", "native"),
}


@dataclass(frozen=True)
class Choice:
    """The kernel of self-attention, and a sentence for each faster or wanted one that is not used."""

    name: str
    notes: tuple[str, ...] = ()
    few: str = ""
    """The kernel of attention to few keys, a text's or a picture's; empty: the same."""


def choose(
    device: str, wanted: str | None = None, kernels: Mapping[str, Kernel] = KERNELS, width: int = HEAD_WIDTH
) -> Choice:
    """The first kernel that passes its self-test: `wanted`, then the table's order for this card, then native.

    `width`: of the heads that it will be used for.

    Raises:
        SettingsError: `wanted` is no kernel at all.
    """
    if wanted is not None and wanted not in kernels:
        raise SettingsError(f"WORKER_ATTENTION is {wanted!r}, not one of {', '.join(kernels)}")
    capability = torch.cuda.get_device_capability(device) if torch.device(device).type == "cuda" else None
    order = ORDER.get(capability[0], ("native",)) if capability else ("native",)
    notes: list[str] = []

    def passing() -> Iterator[str]:
        """Those that pass, each tested when it is asked for; of the others `notes` gets a sentence."""
        for name in dict.fromkeys([wanted, *order] if wanted else order):
            problem = _problem(kernels[name], device, capability, width)
            if problem is None:
                yield name
            else:
                notes.append(f"attention kernel {name} is not used: {problem}")

    found = passing()
    name, few = next(found, "native"), ""
    if kernels[name].rounds:
        few = next((other for other in found if not kernels[other].rounds), "native")
    return Choice(name, tuple(notes), few)


def _problem(kernel: Kernel, device: str, capability: tuple[int, int] | None, width: int) -> str | None:
    if kernel.capabilities is None:
        return None  # torch's own kernel is what would be left in any case
    if capability is None:
        return "the device is no CUDA card"
    first, beyond = kernel.capabilities
    if not first <= capability < beyond:
        return f"compute capability {capability[0]}.{capability[1]} is not supported"
    if kernel.width not in (None, width):
        return f"it takes heads of {kernel.width} numbers, not {width}"
    try:
        worst = max(relative_error(kernel.attend, device, *shape) for shape in SHAPES)
        own = kernel.problem(device)
    except Exception as error:  # noqa: BLE001 a foreign package may raise anything while it is imported or compiled
        said, *_ = str(error).partition("\n")
        return f"it fails ({type(error).__name__}: {said})"
    return own if worst <= kernel.tolerance else f"its result is off (relative error {worst:.3f})"


def relative_error(attend: Attend, device: str, tokens: int, keys: int, heads: int, width: int) -> float:
    """The `deviation` of a bf16 kernel on drawn numbers."""
    generator = torch.Generator(device).manual_seed(4)  # drawn where it is used: 15 million numbers take a CPU 0.2 s
    sizes = (tokens, keys, keys)
    # Twice the usual spread gives a peaked softmax: a kernel that mixes rows up is far off, not a little.
    query, key, value = (
        (2 * torch.randn(1, n, heads, width, generator=generator, device=device)).to(torch.bfloat16) for n in sizes
    )
    return deviation(attend(query, key, value), query, key, value)


def deviation(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    """|out - reference| / |reference|, the reference in float32; infinite if anything is not finite."""
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    weights = torch.softmax(q @ k.transpose(2, 3) / query.shape[3] ** 0.5, dim=-1)
    reference = (weights @ v).transpose(1, 2).double()
    error = (out.double() - reference).norm() / reference.norm()
    return float(error) if torch.isfinite(error) else float("inf")


class WanProcessor:
    """Attention of a Wan block with one kernel. The arithmetic around it is that of diffusers' WanAttnProcessor."""

    def __init__(self, kernel: str, few: str = "") -> None:
        """`few`: the kernel where there are few keys; empty: the same."""
        self.kernel, self.few = kernel, few or kernel
        self._attend = KERNELS[kernel].attend
        self._attend_text = self._attend_picture = KERNELS[self.few].attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor | Rounded,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(b, n, dim) -> (b, n, dim). Context, if any: (b, image tokens + 512, dim).

        Raises:
            ValueError: a mask. Wan uses none, and not every kernel could honour one.
        """
        if attention_mask is not None:
            raise ValueError("Wan attention takes no mask")
        image, text = None, encoder_hidden_states
        if text is not None and attn.add_k_proj is not None:
            image, text = text[:, :-TEXT_TOKENS], text[:, -TEXT_TOKENS:]
        if text is None:
            query, key, value = project(hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        else:
            query, (key, value) = _query(attn.to_q, hidden_states), project(text, (attn.to_k, attn.to_v))
        query = self._norm(attn.norm_q, query, attn.heads, rotary_emb)
        key = self._norm(attn.norm_k, key, attn.heads, rotary_emb)
        value = value.unflatten(2, (attn.heads, -1))
        attend = self._attend if text is None else self._attend_text
        out = attend(query, key, value).flatten(2, 3).type_as(query)
        if image is not None:
            image_key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
            image_value = attn.add_v_proj(image).unflatten(2, (attn.heads, -1))
            out = out + self._attend_picture(query, image_key, image_value).flatten(2, 3).type_as(query)
        projected: Tensor = attn.to_out[1](self._project_out(attn.to_out[0], out))
        return projected

    def _norm(self, norm: Any, x: Tensor, heads: int, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
        """(b, n, dim) -> (b, n, heads, d): a query or key, normed over all heads and turned where it has a place."""
        normed: Tensor = norm(x).unflatten(2, (heads, -1))
        return normed if rotary_emb is None else rotate(normed, *rotary_emb)

    def _project_out(self, layer: Any, out: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim): what the heads have found, mixed."""
        projected: Tensor = layer(out)
        return projected


def _query(layer: nn.Module, hidden_states: Tensor | Rounded) -> Tensor:
    if isinstance(hidden_states, Rounded):
        return project(hidden_states, (layer,))[0]
    query: Tensor = layer(hidden_states)
    return query


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its angle. x: (..., n, heads, d); cos, sin: (..., n, 1, d), each angle twice.

    (a, b) -> (a cos - b sin, b cos + a sin), written without slices: one pass over x when it is compiled, where
    diffusers' even and odd halves are written apart. The same products and sums, so the same bits.
    """
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1
    return (x * cos + partner * (sin * sign)).type_as(x)


def install(transformer: nn.Module, name: str, few: str = "") -> int:
    """Make `transformer`, and no other model, use the kernels of a Choice; returns how many layers that are.

    Raises:
        ValueError: it has no Wan attention.
    """
    layers = _layers(transformer)
    for layer in layers:
        layer.set_processor(WanProcessor(name, few))
    return len(layers)


def head_width(transformer: nn.Module) -> int:
    """Numbers of one of its heads.

    Raises:
        ValueError: it has no Wan attention.
    """
    layer = _layers(transformer)[0]
    return int(layer.inner_dim // layer.heads)


def _layers(transformer: nn.Module) -> list[Any]:
    layers = [module for module in transformer.modules() if isinstance(module, WanAttention)]
    if not layers:
        raise ValueError(f"{type(transformer).__name__} has no attention layer that this kernel could go into")
    return layers
