"""Linear layers with 8-bit weights and 8-bit activations, as plain tensors.

Why. A 14B video transformer spends half of its arithmetic in linear layers, and the cards this worker is made for
multiply 8-bit numbers twice as fast as bfloat16. The larger gain is memory: both experts of the two-expert model fit
on one 48 GB card in 8 bits (29 GB) and do not in 16 (57 GB), so nothing has to move during a job.

How. A weight (out, in) is stored as `weight_q` with one scale an output row; the activations get one scale a token,
found as they arrive:

    x ~ x_q * x_scale[token],  w ~ w_q * w_scale[row],  y = (x_q @ w_q.T) * x_scale * w_scale + bias

Both scales are constant along the summed axis, so they come out of the sum and the product runs in 8 bits with a wide
accumulator. One scale for a whole tensor is not enough: Wan's feed-forward has outlier channels.

Plain tensors. Libraries wrap the pair in a tensor subclass; such a tensor cannot be written by safetensors, pinned,
copied into in place, or traced without a graph break, and this worker does all four. Here the pair is two buffers at
stable addresses. Under torch.compile the search for the row's maximum and the rounding fuse into what came before.

Kinds. `fp8` (e4m3, compute capability 8.9 and up) and `int8` (8.0 and up) use the card's own product. `fp8-weights`
and `int8-weights` hold the same tensors but widen them and multiply in the activations' type: slower than bfloat16,
right everywhere, and still half the memory. `linear8_check` decides at start which of them a card really has. On a
CPU the fast kinds compute the same rounded values with a float32 product.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST_AMAX = 1e-12  # a row of zeros must not divide by zero; far below any value a layer sees
INT8_MIN_ROWS = 17  # torch._int_mm on CUDA refuses 16 rows or fewer (aten/native/cuda/Blas.cpp)
SIDE_MULTIPLE = 16  # torch._scaled_mm needs both sides of the weight in 16-byte steps; _int_mm asks for 8
WIDE_BYTES = 2**28  # of float32 at a time while rounding eagerly: at 832x480x81 a feed-forward's would be 1.9 GB

KEEP: Mapping[str, str] = {
    r"(^|\.)condition_embedder\.": "time, text and picture embedders: run once a forward, steer all of it",
    r"(^|\.)proj_out$": "writes the velocity itself, and its 64 outputs cost nothing",
}
"""Layers that stay in their own type: pattern over the dotted name -> reason.

The patch embedding is a convolution, norms and modulation tables are no linear layers: none of them is
touched. The first and last blocks are quantised too: keeping them would add 1.4 GB for two experts, which
the card does not have.
"""


Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""x_q (tokens, in), x_scale (tokens, 1), weight_q (out, in), weight_scale (out,), bias, type -> (tokens, out)."""


@dataclass(frozen=True)
class Kind:
    """How to store and multiply."""

    dtype: torch.dtype
    limit: float  # the largest magnitude the format holds
    product: Product | None  # of 8-bit operands; None: the weight is widened and the activations are left alone
    capability: tuple[int, int] | None  # the card's least compute capability, None for any device


class Linear8(nn.Module):
    """A linear layer with an 8-bit weight. State: `weight_q` (out, in), `weight_scale` (out,) float32,
    `bias` (out,).

    `model.to(dtype)` changes the bias only: the weight and its scale are the stored form, not a computing type.
    """

    weight_q: Tensor
    weight_scale: Tensor
    weight: None = None
    """There is no wide weight. T5's feed-forward looks here for a type to cast its input to, and leaves it alone."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str, device: str | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kind = kind
        weight = torch.empty(out_features, in_features, dtype=KINDS[kind].dtype, device=device)
        self.register_buffer("weight_q", weight)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        empty = torch.empty(out_features, dtype=torch.bfloat16, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str) -> "Linear8":
        """Quantise a layer; one that is on the meta device gives an empty layer, to be filled from a file."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, kind, device="meta")
        if linear.weight.is_meta:
            return layer
        with torch.no_grad():
            layer.weight_q, layer.weight_scale = quantise(linear.weight.detach(), kind)
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) of any float type -> (..., out) of the same type."""
        (out,) = project(hidden_states, (self,))
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear8":
        stored = {id(self.weight_q), id(self.weight_scale)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps_type = id(tensor) not in stored or moved.dtype == tensor.dtype
            return moved if keeps_type else tensor.to(moved.device)

        return super()._apply(move, recurse)


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to 8 bits, one scale a row: -> weight_q (out, in), weight_scale (out,)
    float32.

    Raises:
        ValueError: the weight holds a NaN or an infinity; no scale can carry that.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds values that are not finite")
    weight_q, scale = round_rows(weight, KINDS[kind])
    return weight_q, scale.squeeze(-1)


def round_rows(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(rows, n) -> 8-bit (rows, n) and float32 scales (rows, 1). A NaN or infinity turns its row into NaN."""
    at_once = max(1, WIDE_BYTES // (4 * x.shape[-1]))
    if torch.compiler.is_compiling() or x.shape[0] <= at_once:
        return _round_rows(x, kind)  # compiled, nothing wide is ever written
    values = torch.empty(x.shape, dtype=kind.dtype, device=x.device)
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], at_once):
        rows = slice(start, start + at_once)
        values[rows], scale[rows] = _round_rows(x[rows], kind)
    return values, scale


def _round_rows(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    # Not "/ limit": a card multiplies by the inverse of a number anyway, and a bake's bits must be those of a load.
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST_AMAX) * (1 / kind.limit)
    scaled = x / scale  # one float32 buffer, worked on in place
    if kind.dtype is torch.int8:
        scaled.round_()
    return scaled.clamp_(-kind.limit, kind.limit).to(kind.dtype), scale


class Rounded(NamedTuple):
    """Activations that are in 8 bits already, for layers of the kind whose format that is."""

    values: Tensor
    """(..., in)"""
    scale: Tensor
    """(..., 1) float32"""
    dtype: torch.dtype
    """Of what a layer makes of them."""


def project(hidden_states: Tensor | Rounded, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of one input (..., in).

    8-bit layers of one fast kind share the rounding of the input; the compiler does not find that by itself. Layers
    of other sorts, and those that somebody hooked, are called one by one; they cannot take a Rounded.
    """
    if isinstance(hidden_states, Rounded):
        return _project_rounded(hidden_states, layers)
    first = layers[0]
    if len(layers) > 1 and not all(_shares_rounding(layer, first) for layer in layers):
        return tuple(layer(hidden_states) for layer in layers)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    assert isinstance(first, Linear8)
    kind = KINDS[first.kind]
    if kind.product is None:
        outs = [_widened_weight(rows, first.weight_q, first.weight_scale, first.bias)]
    else:
        x_q, x_scale = round_rows(rows, kind)
        outs = [
            kind.product(x_q, x_scale, layer.weight_q, layer.weight_scale, layer.bias, hidden_states.dtype)
            for layer in layers
            if isinstance(layer, Linear8)
        ]
    return tuple(out.reshape(*hidden_states.shape[:-1], out.shape[-1]) for out in outs)


def _project_rounded(x: Rounded, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    rows, scale = x.values.flatten(0, -2), x.scale.flatten(0, -2)
    outs = []
    for layer in layers:
        assert isinstance(layer, Linear8)
        product = KINDS[layer.kind].product
        assert product is not None and layer.weight_q.dtype == rows.dtype
        out = product(rows, scale, layer.weight_q, layer.weight_scale, layer.bias, x.dtype)
        outs.append(out.unflatten(0, x.values.shape[:-1]))
    return tuple(outs)


def _shares_rounding(layer: nn.Module, first: nn.Module) -> bool:
    return (
        isinstance(layer, Linear8)
        and isinstance(first, Linear8)
        and layer.kind == first.kind
        and KINDS[layer.kind].product is not None
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _fp8_rows(
    x_q: Tensor, x_scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if x_q.device.type == "cpu":
        return widened_product(x_q, x_scale, weight_q, weight_scale, bias, dtype)
    # Fast accumulation keeps fewer bits between the tensor core's steps; without it Hopper runs at about half rate.
    out = torch._scaled_mm(
        x_q,
        weight_q.t(),
        scale_a=x_scale,
        scale_b=weight_scale.unsqueeze(0),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only type the row-wise kernel writes
        use_fast_accum=True,
    )
    return out.to(dtype)


def _int8_rows(
    x_q: Tensor, x_scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if x_q.device.type == "cpu":
        return widened_product(x_q, x_scale, weight_q, weight_scale, bias, dtype)
    rows = x_q.shape[0]
    if rows < INT8_MIN_ROWS:
        x_q = functional.pad(x_q, (0, 0, 0, INT8_MIN_ROWS - rows))
    # int32: 127 * 127 * 13824 (Wan's longest row) stays under 2**31
    product = torch._int_mm(x_q, weight_q.t()).narrow(0, 0, rows)
    out = (product * x_scale).mul_(weight_scale)
    return (out if bias is None else out.add_(bias)).to(dtype)


def widened_product(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The value that the fast kernels approximate, computed in float32 from the same 8-bit numbers."""
    out = (x_q.float() @ weight_q.float().t()) * x_scale * weight_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def _widened_weight(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    from engine.widening import widened  # here, because the bake, which multiplies nothing, does without it

    weight = widened(weight_q, weight_scale, x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


KINDS: Mapping[str, Kind] = {
    "fp8": Kind(torch.float8_e4m3fn, 448.0, _fp8_rows, (8, 9)),
    "int8": Kind(torch.int8, 127.0, _int8_rows, (8, 0)),
    "fp8-weights": Kind(torch.float8_e4m3fn, 448.0, None, None),
    "int8-weights": Kind(torch.int8, 127.0, None, None),
}


@dataclass(frozen=True)
class Replaced:
    """What `replace_linears` did: names of the 8-bit layers, and of those kept with the reason."""

    names: tuple[str, ...]
    kept: Mapping[str, str]


def replace_linears(model: nn.Module, kind: str, keep: Mapping[str, str] = KEEP, device: str | None = None) -> Replaced:
    """Put a Linear8 in the place of every nn.Linear whose name no pattern of `keep` matches, in `model`
    itself.

    Weights that are there are quantised; a model on the meta device becomes an empty frame for a quantised file.
    `device`: where each layer is taken to be quantised, one wide weight at a time, and stays; None: where it is.

    Raises:
        ValueError: the model carries live LoRA adapters. They belong into the weight before it is rounded.
    """
    names, kept = [], {}
    # Of linear layers the names: each comes when it is its turn, for a list would keep every wide weight until the end.
    linears, others = list[str](), dict[str, nn.Module]()
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            linears.append(name)
        else:
            others[name] = module
    for name in linears:
        path, _, leaf = name.rpartition(".")
        linear = getattr(others[path], leaf)
        if name.endswith(".base_layer") or ".lora_" in name:
            raise ValueError(f"{name} is a live LoRA adapter: merge adapters before quantising")
        reason = next((why for pattern, why in keep.items() if re.search(pattern, name)), None)
        if reason is None and (linear.in_features % SIDE_MULTIPLE or linear.out_features % SIDE_MULTIPLE):
            reason = f"a side that is no multiple of {SIDE_MULTIPLE}, which the kernels refuse"
        if reason is None:
            names.append(name)
            rounded = Linear8.from_linear(linear if device is None else linear.to(device), kind)
            setattr(others[path], leaf, rounded)
        else:
            kept[name] = reason
    return Replaced(tuple(names), kept)


def set_kind(model: nn.Module, kind: str) -> int:
    """Make every Linear8 of the model multiply as `kind`; returns how many there are.

    Raises:
        ValueError: a layer is stored in the other format.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear8)]
    for layer in layers:
        if layer.weight_q.dtype is not KINDS[kind].dtype:
            raise ValueError(f"the weights are {layer.weight_q.dtype}, which {kind} cannot multiply")
        layer.kind = kind
    return len(layers)
