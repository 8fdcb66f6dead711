"""A model's tensors in flat buffers, one a piece: a block, or what stands before or after the blocks.

A piece is what is copied as one. Parameters become views of its buffer, so that a copy into the buffer replaces them
in place: one transfer of hundreds of megabytes where there were twenty-odd small ones, and no address that changes.
"""

from contextlib import suppress
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
    return tuple(_piece(prefix if prefix.endswith(".") else "", tensors) for prefix, tensors in groups.items())


def _piece(prefix: str, tensors: list[tuple[str, Tensor]]) -> Piece:
    fields, offset = [], 0
    for name, tensor in tensors:
        fields.append(Field(name.removeprefix(prefix), tuple(tensor.shape), tensor.dtype, offset))
        size = tensor.numel() * tensor.element_size()
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Piece(prefix, tuple(fields), offset)


def point_at(model: nn.Module, piece: Piece, buffer: Tensor) -> None:
    """Make the piece's parameters and buffers in `model` views of `buffer`; they stay the objects they are."""
    for field in piece.fields:
        _tensor(model, piece, field).data = field.view(buffer)


class HostCopy:
    """A model's tensors in page-locked host memory. The model is pointed at it, so that nothing is held twice."""

    def __init__(self, model: nn.Module, pieces: tuple[Piece, ...], device: str) -> None:
        """`device`: the card that copies will go to; for a CPU nothing is locked."""
        self.notes: tuple[str, ...] = ()
        self.buffers: list[Tensor] = []
        self._locked: list[Tensor] = []
        for piece in pieces:
            buffer = torch.empty(piece.size_bytes, dtype=torch.uint8)
            for field in piece.fields:
                field.view(buffer).copy_(_tensor(model, piece, field).detach())
            point_at(model, piece, buffer)
            self.buffers.append(buffer)
            if torch.device(device).type == "cuda":
                self._lock(buffer, device)

    def release(self) -> None:
        """Unlock and forget. No copy from here may be under way."""
        for buffer in self._locked:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self.buffers, self._locked = [], []

    def _lock(self, buffer: Tensor, device: str) -> None:
        # Locking memory we have: torch's own pinned allocator rounds each buffer up to a power of two.
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
        if code == 0:
            self._locked.append(buffer)
            return
        self.notes = (f"host memory could not be page-locked (CUDA error {code}): copies will be slow",)
        with suppress(RuntimeError):  # the next kernel launch would be blamed for this error; let it be one of ours
            torch.zeros(1, device=device)


def _tensor(model: nn.Module, piece: Piece, field: Field) -> Tensor:
    path, _, leaf = (piece.prefix + field.name).rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor
