"""A baked component without its bytes: the model, and where in its file each of its tensors is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch

from engine.arrival import Arrival, Coming
from engine.packing import HostCopy, Piece, fill_piece, layout, point_at
from engine.parts import fill
from engine.profile import Component
from engine.readahead import ReadAhead
from engine.reading import Wanted
from engine.tensorfile import Stored


@dataclass(frozen=True)
class Skeleton:
    """Of one use: `stand` or `pack` gives the model its storage, which an arrival fills."""

    component: Component
    model: Any
    """What the file holds is on the meta device, in the type it runs in; what no file holds is real."""
    stream: BinaryIO
    """The open file."""
    stored: Mapping[str, Stored]
    """By the model's names, tied tensors left out."""

    def stand(self, device: str, arrival: Arrival) -> Coming:
        """Give the model storage on `device`, a tensor at a time. Addresses stay; values come."""
        pieces = layout(self.model)
        fields = {piece.prefix + field.name: field for piece in pieces for field in piece.fields}
        with torch.inference_mode(False):
            targets = {name: fields[name].empty(device) for name in self.stored}
            fill(self.model, self.component, targets, device)
        return arrival.expect(self.component.name, self.stream, self._wanted(targets, pieces))

    def whole(self, device: str) -> Any:
        """The model on `device` with all its values, read now."""
        arrival = Arrival(device)
        try:
            self.stand(device, arrival).wait_whole()
        finally:
            arrival.close()
        return self.model

    def pack(self, device: str, arrival: Arrival) -> tuple[HostCopy, Coming]:
        """Give the model storage in host memory, a flat buffer a piece, from where copies go to `device`."""
        pieces = layout(self.model)
        with torch.inference_mode(False):
            host = HostCopy(pieces, device)
            targets: dict[str, torch.Tensor] = {}
            for piece, buffer in zip(pieces, host.buffers, strict=True):
                fill_piece(self.model, piece, buffer)
                targets |= {piece.prefix + field.name: field.view(buffer) for field in piece.fields}
            stored = {name: targets[name] for name in self.stored}
            fill(self.model, self.component, stored, "cpu")
            for piece, buffer in zip(pieces, host.buffers, strict=True):
                point_at(self.model, piece, buffer)
        return host, arrival.expect(self.component.name, self.stream, self._wanted(stored, pieces), host.settle)

    def _wanted(self, targets: Mapping[str, torch.Tensor], pieces: Sequence[Piece]) -> list[Wanted]:
        """Each tensor with the number of the piece that it belongs to."""
        number = {piece.prefix + field.name: i for i, piece in enumerate(pieces) for field in piece.fields}
        return [Wanted(self.stored[name], target, number[name]) for name, target in targets.items()]


@runtime_checkable
class HasSkeletons(Protocol):
    """Parts whose files may be read by us, in the order of need."""

    @property
    def ahead(self) -> ReadAhead | None:
        """Reads them already, for nobody in particular."""

    def skeleton(self, name: str, device: str) -> Skeleton | None:
        """The component `name` to compute on `device`; None if its files are not one file of our bake."""
