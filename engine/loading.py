"""One component to where it will stand: at once and read behind, or whole and rounded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.arrival import Arrival, Coming
from engine.eight_bits import to_eight_bits
from engine.packing import HostCopy
from engine.profile import EIGHT_BITS
from engine.skeleton import HasSkeletons, Skeleton
from engine.weights import Parts


@dataclass(frozen=True)
class Loaded:
    """A model where it stands. `coming`: what is still to be waited for; None: it is whole."""

    model: Any
    coming: Coming | None = None
    host: HostCopy | None = None
    """The buffers that it stands in, where that is host memory and it is still coming."""


@dataclass(frozen=True)
class Loader:
    """Loads components of `parts` to compute on `device` in `precision` (None: as baked); `arrival` reads them."""

    parts: Parts
    precision: str | None
    device: str
    arrival: Arrival

    def rounds(self, names: Iterable[str]) -> bool:
        """Whether any of the components is baked wide and wanted in 8 bits: rounding needs whole tensors."""
        parts = [self.parts.profile.component(name) for name in names]
        return self.precision in EIGHT_BITS and any(
            part.narrow_size_bytes and part.dtype not in EIGHT_BITS for part in parts
        )

    def on_device(self, name: str) -> Loaded:
        """The component where it computes."""
        skeleton = self._skeleton(name)
        if skeleton is None:
            return Loaded(self._whole(name, self.device))
        return Loaded(skeleton.model, skeleton.stand(self.device, self.arrival))

    def in_host_memory(self, name: str) -> Loaded:
        """The component beside the card, from where it comes to it."""
        skeleton = self._skeleton(name)
        if skeleton is None:
            return Loaded(self._whole(name, "cpu"))
        host, coming = skeleton.pack(self.device, self.arrival)
        return Loaded(skeleton.model, coming, host)

    def _skeleton(self, name: str) -> Skeleton | None:
        if self.rounds([name]) or not isinstance(self.parts, HasSkeletons):
            return None
        if self.parts.ahead is not None:
            self.arrival.follow(self.parts.ahead)
        return self.parts.skeleton(name, self.device)

    def _whole(self, name: str, stands: str) -> Any:
        """From a wide bake each layer is rounded on the device, where it takes no time, one at a time."""
        model = self.parts.load(name, stands)
        if self.rounds([name]):
            to_eight_bits(model, self.parts.profile.component(name), str(self.precision), self.device)
            model.to(stands)
        return model
