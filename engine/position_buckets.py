"""UMT5's table of distances, made once a prompt.

Each of its 24 layers sorts all pairs of 512 tokens into buckets by their distance, and all find the same: 17 operators
a layer, which Python launches while the card waits. They are a fifth of the whole encoder's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.umt5.modeling_umt5 import UMT5Attention


@contextmanager
def shared_buckets(encoder: nn.Module) -> Iterator[None]:
    """For a block with one call of a UMT5 encoder, whose layers have one length and one way of sorting."""
    tables: list[Tensor] = []
    layers: list[Any] = [module for module in encoder.modules() if isinstance(module, UMT5Attention)]
    for layer in layers:
        layer._relative_position_bucket = partial(_first_made, tables, layer._relative_position_bucket)
    try:
        yield
    finally:
        for layer in layers:
            del layer._relative_position_bucket  # the class's own shows again


def _first_made(tables: list[Tensor], make: Callable[[Tensor], Tensor], relative_position: Tensor) -> Tensor:
    if not tables:
        tables.append(make(relative_position))
    return tables[0]
