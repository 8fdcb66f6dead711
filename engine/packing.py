"""A model's tensors in flat buffers, one a piece: a block, or what stands before or after the blocks.

A piece is what is copied as one. Parameters become views of its buffer, so that a copy into the buffer
replaces them in place: one transfer of hundreds of megabytes where there were twenty-odd small ones, and no
address that changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What cudaMalloc gives each tensor; kernels compiled for aligned inputs rely on 16 of it.
ALIGNMENT_BYTES = 256
# Of WanTransformer3DModel: used before the first block only. All else outside the blocks belongs to the exit.
ENTRY = ("rope.", "patch_embedding.", "condition_embedder.")
BLOCKS = "blocks."


@dataclass(frozen=True)
class Field:
    """One tensor inside a piece: its dotted name below the piece's module path, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def view(self, buffer: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Piece:
    """A part of the model that is copied as one: `fields` under `prefix`, packed into `size_bytes`."""

    prefix: str
    fields: tuple[Field, ...]
    size_bytes: int


def layout(model: nn.Module) -> tuple[Piece, ...]:
    """Entry, exit, then the blocks in their order: the pieces that this model's tensors make."""
    groups: dict[str, list[tuple[str, Tensor]]] = {"entry": [], "exit": []}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith(BLOCKS):
            prefix = ".".join(name.split(".")[:2]) + "."
        else:
            prefix = "entry" if name.startswith(ENTRY) else "exit"
        groups.setdefault(prefix, []).append((name, tensor))
    return tuple(
        _piece(prefix if prefix.endswith(".") else "", tensors) for prefix, tensors in groups.items()
    )


def _piece(prefix: str, tensors: list[tuple[str, Tensor]]) -> Piece:
    fields, offset = [], 0
    for name, tensor in tensors:
        fields.append(Field(name.removeprefix(prefix), tuple(tensor.shape), tensor.dtype, offset))
        size = tensor.numel() * tensor.element_size()
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Piece(prefix, tuple(fields), offset)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with this dotted name."""
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), leaf)
    return tensor.detach()


def point_at(model: nn.Module, piece: Piece, buffer: Tensor) -> None:
    """Make the piece's parameters and buffers in `model` views of `buffer`."""
    for field in piece.fields:
        path, _, leaf = (piece.prefix + field.name).rpartition(".")
        module = model.get_submodule(path)
        view = field.view(buffer)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(view, requires_grad=False)
        else:
            module._buffers[leaf] = view
