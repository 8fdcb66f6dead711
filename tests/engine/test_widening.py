"""8-bit weights made wide: on a card by a kernel that must give torch's bits, elsewhere by torch."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from engine import widening

FP8 = torch.float8_e4m3fn
FORMATS = (FP8, torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened_is_the_product_rounded_once(dtype: torch.dtype) -> None:
    weight_q = torch.tensor([[448.0, -0.001953125, 1.0], [3.0, 0.0, -240.0]]).to(FP8)
    scale = torch.tensor([1 / 3, 0.7])
    wanted = (weight_q.double() * scale.double()[:, None]).float().to(dtype)
    assert torch.equal(widening.widened(weight_q, scale, dtype), wanted)


def right(weight_q: Tensor, scale: Tensor) -> Tensor:
    return widening._by_torch(weight_q, scale, torch.bfloat16)


def problem(format_: torch.dtype) -> str | None:
    return widening.problem.__wrapped__(torch.device("cpu"), format_)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the card's kernel, to be made wrong."""
    module = ModuleType("engine.widening_triton")
    monkeypatch.setattr(module, "widened", right, raising=False)
    monkeypatch.setitem(sys.modules, "engine.widening_triton", module)
    return module


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("format_", FORMATS)
def test_kernel_with_torchs_bits_is_used(format_: torch.dtype) -> None:
    assert problem(format_) is None


def rounded_twice(weight_q: Tensor, scale: Tensor) -> Tensor:
    return weight_q.to(torch.bfloat16) * scale.to(torch.bfloat16)[:, None]


def transposed_scale(weight_q: Tensor, scale: Tensor) -> Tensor:
    return widening._by_torch(weight_q, scale.flip(0), torch.bfloat16)


@pytest.mark.parametrize("wrong", [rounded_twice, transposed_scale])
def test_kernel_with_other_bits_is_not_used_and_the_log_says_so(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: object
) -> None:
    monkeypatch.setattr(kernel, "widened", wrong)
    assert problem(FP8) == "its bits are others"
    assert caplog.messages == [
        "the kernel that makes torch.float8_e4m3fn weights wide is not used: its bits are others"
    ]


def test_kernel_that_does_not_compile_is_not_used(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernel, "widened")
    assert problem(FP8) == "it fails (ImportError)"


def ampere(weight_q: Tensor, scale: Tensor) -> Tensor:
    if weight_q.dtype == FP8:
        raise ValueError("type fp8e4nv not supported in this architecture")
    return right(weight_q, scale)


def test_kernel_that_fails_for_fp8_is_used_for_int8(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "widened", ampere)
    assert [problem(format_) for format_ in FORMATS] == ["it fails (ValueError)", None]


@pytest.mark.gpu
@pytest.mark.parametrize("format_", FORMATS)
def test_kernel_gives_torchs_bits_on_a_card(format_: torch.dtype) -> None:
    assert widening.problem.__wrapped__(torch.device("cuda"), format_) is None
