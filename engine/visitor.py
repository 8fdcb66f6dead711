"""A component that lives in host memory and comes to the card for the moments when it is needed.

Text and picture encoders run once a prompt, 11 GB for a quarter of a second. The usual offload copies a model to the
card and then copies the unchanged weights back. Here the host copy is page-locked and kept: coming is one transfer,
leaving is pointing the parameters back at it, and nothing is copied. Between visits nothing of it is on the card, so it
parks by doing nothing (see engine.parking.Parkable).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.arrival import Coming
from engine.packing import HostCopy, layout, point_at


class Visitor:
    """Takes `module` over. `bytes_moved`: host to device, since the start."""

    def __init__(self, module: nn.Module, device: str, coming: tuple[HostCopy, Coming] | None = None) -> None:
        """`coming`: where the module stands already and is being read into; None: it is whole, and is copied."""
        self._module = module
        self._device = device
        self._pieces = layout(module)
        self._host = coming[0] if coming is not None else HostCopy.of(module, self._pieces, device)
        self._coming = coming[1] if coming is not None else None
        self.bytes_moved = 0

    @contextmanager
    def on_card(self) -> Iterator[nn.Module]:
        """The module with its parameters on the card for the length of the block, also when the block fails."""
        if self._coming is not None:
            self._coming.wait_whole()
        try:
            with torch.inference_mode(False):
                for piece, buffer in zip(self._pieces, self._host.buffers, strict=True):
                    on_card = torch.empty_like(buffer, device=self._device)
                    point_at(self._module, piece, on_card.copy_(buffer, non_blocking=True))
                    self.bytes_moved += piece.size_bytes
            yield self._module
        finally:
            for piece, buffer in zip(self._pieces, self._host.buffers, strict=True):
                point_at(self._module, piece, buffer)

    @property
    def is_whole(self) -> bool:
        return self._coming is None or self._coming.is_whole

    @property
    def needed_bytes(self) -> int:
        return 0

    @property
    def held_bytes(self) -> int:
        return self._host.size_bytes

    def park(self) -> int:
        return 0

    def bring_back(self) -> int:
        return 0

    def unload(self) -> None:
        """Give the host memory back. The module is empty afterwards."""
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)  # a visit that failed may have left copies under way
        self._module.to("meta")
        self._host.release()
