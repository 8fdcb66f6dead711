"""Rounding without a compiler: the same bits in slices, and no wide copy of a whole activation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import linear8
from engine.linear8 import KINDS, round_rows

TOKENS, WIDTH = 34320, 13824  # Wan's feed-forward at 832x480x81 with an end picture


class Outputs(TorchDispatchMode):
    """The bytes of everything that is written in a type of 16 or more bits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide_bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype.itemsize > 1 and not func.is_view:
            self.wide_bytes.append(out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_rounding_in_slices_gives_the_same_bits(kind, rows, monkeypatch):
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    x[0, 3] = 1000.0
    whole = round_rows(x, KINDS[kind])
    monkeypatch.setattr(linear8, "WIDE_BYTES", 8 * 48 * 4)  # eight rows
    values, scale = round_rows(x, KINDS[kind])
    assert torch.equal(values.view(torch.uint8), whole[0].view(torch.uint8))
    assert torch.equal(scale, whole[1])


def test_nan_stays_in_its_row_when_rounding_in_slices(monkeypatch):
    monkeypatch.setattr(linear8, "WIDE_BYTES", 2 * 16 * 4)
    x = torch.ones(5, 16)
    x[3, 2] = float("nan")
    values, scale = round_rows(x, KINDS["fp8"])
    assert values.float().isnan().all(dim=1).tolist() == [False, False, False, True, False]
    assert scale.isnan().flatten().tolist() == [False, False, False, True, False]


def _largest_wide_bytes() -> int:
    with Outputs() as outputs:
        round_rows(torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device="meta"), KINDS["fp8"])
    return max(outputs.wide_bytes[1:])  # after the activation itself


def test_eager_rounding_writes_at_most_256_mb_of_wide_numbers_at_once():
    assert _largest_wide_bytes() <= 2**28


def test_eager_rounding_in_one_piece_would_write_a_wide_activation(monkeypatch):
    """The negative of the test before."""
    monkeypatch.setattr(linear8, "WIDE_BYTES", 2**40)
    assert _largest_wide_bytes() == TOKENS * WIDTH * 4


def test_compiled_rounding_is_not_cut_into_slices(monkeypatch):
    monkeypatch.setattr(linear8, "WIDE_BYTES", 2 * 16 * 4)
    nodes = []

    def backend(graph, inputs):
        nodes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    for rows in (2, 64):
        torch.compile(lambda x: round_rows(x, KINDS["fp8"]), backend=backend, dynamic=False)(torch.ones(rows, 16))
    assert nodes[0] == nodes[1]
