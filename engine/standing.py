"""Modules that stand on the card for good, until somebody else needs its memory.

Parking copies each of them to the host once, a flat buffer a piece (see `packing`), and points its tensors there;
coming back is one copy a piece into new memory of the card. Tensors stay the objects they are, with their strides, so
what was compiled for them fits. Addresses change: nothing may keep one beyond a job (a CUDA graph, say).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import nn

from engine.arrival import Coming
from engine.packing import HostCopy, Piece, layout, point_at
from engine.parking import NotLocked


class Standing:
    """See engine.parking.Parkable. A module that is given twice counts once."""

    def __init__(self, modules: Iterable[nn.Module], device: str, coming: Sequence[Coming] = ()) -> None:
        """`coming`: those whose weights are still being read."""
        self._modules = list({id(module): module for module in modules}.values())
        self._device = device
        self._coming = coming
        self._hosts: list[HostCopy] = []
        """One a module, once it was parked."""

    @property
    def is_whole(self) -> bool:
        return all(coming.is_whole for coming in self._coming)

    @property
    def needed_bytes(self) -> int:
        return 0 if self._hosts else sum(piece.size_bytes for pieces in self._pieces for piece in pieces)

    @property
    def held_bytes(self) -> int:
        return sum(host.size_bytes for host in self._hosts)

    def park(self) -> int:
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            if not self._hosts:
                return self._copy_out()
            for module, pieces, host in zip(self._modules, self._pieces, self._hosts, strict=True):
                for piece, buffer in zip(pieces, host.buffers, strict=True):
                    point_at(module, piece, buffer)
        return 0

    def bring_back(self) -> int:
        with torch.inference_mode(False):
            for module, pieces, host in zip(self._modules, self._pieces, self._hosts, strict=True):
                for piece, buffer in zip(pieces, host.buffers, strict=True):
                    on_card = torch.empty_like(buffer, device=self._device)
                    point_at(module, piece, on_card.copy_(buffer, non_blocking=True))
        self._settle()
        return self.held_bytes

    def unload(self) -> None:
        """The modules are empty afterwards."""
        self._settle()  # a return that failed left copies under way, and what they read from is about to go
        for module in self._modules:
            module.to("meta")
        for host in self._hosts:
            host.release()
        self._modules, self._hosts = [], []

    def _settle(self) -> None:
        """Wait for the copies."""
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)

    @cached_property
    def _pieces(self) -> list[tuple[Piece, ...]]:
        """Of each module, as it is when it is first parked: loading may still replace layers."""
        return [layout(module) for module in self._modules]

    def _copy_out(self) -> int:
        for module, pieces in zip(self._modules, self._pieces, strict=True):
            _replace_views(module)
            self._hosts.append(HostCopy((), self._device))
            for piece in pieces:
                self._hosts[-1].take(module, piece)
                if self._hosts[-1].notes:
                    raise NotLocked(self._hosts[-1].notes[0])
        return self.held_bytes


def _replace_views(module: nn.Module) -> None:
    """A buffer that is a view of another tensor, as the scales of a layer rounded at load, keeps that one's memory."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer._base is not None:
                part._buffers[name] = buffer.data
