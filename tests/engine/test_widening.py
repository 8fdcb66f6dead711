"""8-bit weights made wide: on a card by a kernel that must give torch's bits, elsewhere by torch."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from engine import widening

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened_is_the_product_rounded_once(dtype: torch.dtype) -> None:
    weight_q = torch.tensor([[448.0, -0.001953125, 1.0], [3.0, 0.0, -240.0]]).to(FP8)
    scale = torch.tensor([1 / 3, 0.7])
    wanted = (weight_q.double() * scale.double()[:, None]).float().to(dtype)
    assert torch.equal(widening.widened(weight_q, scale, dtype), wanted)


def right(weight_q: Tensor, scale: Tensor) -> Tensor:
    return widening._by_torch(weight_q, scale, torch.bfloat16)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for the card's kernel, to be made wrong."""
    module = ModuleType("engine.widening_triton")
    monkeypatch.setattr(module, "widened", right, raising=False)
    monkeypatch.setitem(sys.modules, "engine.widening_triton", module)
    widening.problem.cache_clear()
    yield module
    widening.problem.cache_clear()


def test_kernel_with_torchs_bits_is_used(kernel: ModuleType) -> None:
    assert widening.problem(torch.device("cpu")) is None


def rounded_twice(weight_q: Tensor, scale: Tensor) -> Tensor:
    return weight_q.to(torch.bfloat16) * scale.to(torch.bfloat16)[:, None]


def transposed_scale(weight_q: Tensor, scale: Tensor) -> Tensor:
    return widening._by_torch(weight_q, scale.flip(0), torch.bfloat16)


@pytest.mark.parametrize("wrong", [rounded_twice, transposed_scale])
def test_kernel_with_other_bits_is_not_used(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(kernel, "widened", wrong)
    assert widening.problem(torch.device("cpu")) == "its bits of torch.float8_e4m3fn are others"


def test_kernel_that_does_not_compile_is_not_used(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernel, "widened")
    assert widening.problem(torch.device("cpu")) == "it fails (ImportError)"
