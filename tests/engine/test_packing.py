"""Page-locked copies of a model: what is locked is unlocked again, once, on every way out."""

import gc

import pytest
import torch
from torch import nn

from engine import packing
from engine.packing import HostCopy, layout
from tests.engine.tiny_wan import make_wan


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses given back, by a driver that locks everything."""
    seen: list[int] = []
    monkeypatch.setattr(packing, "lock", lambda *_: None)
    monkeypatch.setattr(packing, "unlock", lambda buffer: seen.append(buffer.data_ptr()))
    return seen


def test_layout_keeps_the_order_of_axes_and_leaves_gaps_out() -> None:
    model = nn.Module()
    model.plain = nn.Parameter(torch.empty(3, 4))
    model.turned = nn.Parameter(torch.empty(4, 3).t())
    model.gaps = nn.Parameter(torch.empty(3, 8)[:, ::2])
    (_, exit_piece) = layout(model)
    strides = {field.name: field.strides for field in exit_piece.fields}
    assert strides == {"plain": (4, 1), "turned": (1, 3), "gaps": (4, 1)}


def locked_copy() -> tuple[HostCopy, list[int]]:
    host = HostCopy(layout(make_wan(0)), "cuda")
    for i in range(len(host.buffers)):
        host.settle(i)
    return host, sorted(buffer.data_ptr() for buffer in host.buffers if buffer.numel())


def test_copy_that_a_failed_load_drops_is_unlocked(unlocked: list[int]) -> None:
    host, addresses = locked_copy()
    del host
    gc.collect()
    assert sorted(unlocked) == addresses


def test_copy_that_is_released_is_unlocked_once(unlocked: list[int]) -> None:
    host, addresses = locked_copy()
    host.release()
    del host
    gc.collect()
    assert sorted(unlocked) == addresses
