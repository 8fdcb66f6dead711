"""A model's tensors in flat buffers, one a piece: a block, or what stands before or after the blocks.

A piece is what is copied as one. Parameters become views of its buffer, so that a copy into the buffer replaces them
in place: one transfer of hundreds of megabytes where there were twenty-odd small ones, and no address that changes.
"""

import logging
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

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
    strides: tuple[int, ...]
    """Of elements, without gaps. Kept, because code is compiled for an order of axes too (channels last, say)."""
    dtype: torch.dtype
    offset: int

    def empty(self, device: str) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def view(self, buffer: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).as_strided(self.shape, self.strides)


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
        fields.append(Field(name.removeprefix(prefix), tuple(tensor.shape), _strides(tensor), tensor.dtype, offset))
        size = tensor.numel() * tensor.element_size()
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Piece(prefix, tuple(fields), offset)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of one like it without gaps. Its own where it has none: to make one takes longer than the rest of a layout."""
    return (tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")).stride()


def point_at(model: nn.Module, piece: Piece, buffer: Tensor) -> None:
    """Make the piece's parameters and buffers in `model` views of `buffer`; they stay the objects they are."""
    for field in piece.fields:
        _tensor(model, piece, field).data = field.view(buffer)


class HostCopy:
    """A model's tensors in host memory, one flat buffer a piece, page-locked where copies go to a card.

    Made with `of` or `take` from a model that is loaded, or empty, to be filled by a reader: each piece is locked by
    `settle` once it is whole, because locking memory that is still being written would hold the reader up.
    """

    def __init__(self, pieces: tuple[Piece, ...], device: str) -> None:
        """`device`: the card that copies will go to; for a CPU nothing is locked."""
        self.notes: tuple[str, ...] = ()
        self.buffers = [torch.empty(piece.size_bytes, dtype=torch.uint8) for piece in pieces]
        self._device = device
        self._locked: list[Tensor] = []
        # A load that fails drops its copies without `release`, and memory freed while it is locked stays taken.
        weakref.finalize(self, _unlock_all, self._locked).atexit = False  # the card's context goes first there

    @classmethod
    def of(cls, model: nn.Module, pieces: tuple[Piece, ...], device: str) -> Self:
        """Copy a loaded model. It is pointed at the copy piece by piece, so that nothing is held twice."""
        host = cls((), device)
        for piece in pieces:
            host.take(model, piece)
        return host

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self.buffers)

    def take(self, model: nn.Module, piece: Piece) -> None:
        """Copy one more piece of a loaded model and point the model at the copy.

        Locked first: what comes from a card then comes at the bus's rate, in one go.
        """
        buffer = torch.empty(piece.size_bytes, dtype=torch.uint8)
        if torch.device(self._device).type == "cuda":
            buffer.zero_()  # by all cores; locking would bring the pages in with one
        self.buffers.append(buffer)
        self.settle(len(self.buffers) - 1)
        fill_piece(model, piece, buffer)
        point_at(model, piece, buffer)

    def settle(self, i: int) -> None:
        """Lock piece `i`, which is whole. Any thread; a piece is settled once."""
        buffer = self.buffers[i]
        if torch.device(self._device).type != "cuda" or not buffer.numel():
            return
        problem = lock(buffer, self._device)
        if problem is None:
            self._locked.append(buffer)
        else:
            if not self.notes:
                log.warning("%s", problem)
            self.notes = (problem,)

    def release(self) -> None:
        """Unlock and forget. No copy from here may be under way."""
        _unlock_all(self._locked)
        self.buffers = []


def fill_piece(model: nn.Module, piece: Piece, buffer: Tensor) -> None:
    """Copy the piece's tensors from `model` into `buffer`; those on the meta device are left for a reader."""
    for field in piece.fields:
        tensor = _tensor(model, piece, field).detach()
        if not tensor.is_meta:
            field.view(buffer).copy_(tensor)


def lock(buffer: Tensor, device: str) -> str | None:
    """Page-lock host memory for copies to `device`; returns why it could not be. On a CPU there is nothing to do.

    Locking memory we have: torch's own pinned allocator rounds each buffer up to a power of two, and keeps it.
    """
    if torch.device(device).type != "cuda":
        return None
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if code == 0:
        return None
    with suppress(RuntimeError):  # the next kernel launch would be blamed for this error; let it be one of ours
        torch.zeros(1, device=device)
    return f"host memory could not be page-locked (CUDA error {code}): copies will be slow"


def unlock(buffer: Tensor) -> None:
    """Undo `lock`. No copy from the buffer may be under way."""
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _unlock_all(locked: list[Tensor]) -> None:
    while locked:
        unlock(locked.pop())


def _tensor(model: nn.Module, piece: Piece, field: Field) -> Tensor:
    path, _, leaf = (piece.prefix + field.name).rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor
