"""The card's kernel that makes 8-bit weights wide, in Triton's interpreter: torch's bits."""

import pytest
import torch

from engine import widening, widening_triton

FORMATS = (torch.float8_e4m3fn, torch.int8)


@pytest.mark.parametrize("width", [1, 100, 128, 4096])
@pytest.mark.parametrize("format_", FORMATS)
def test_widened_has_torchs_bits(format_, width):
    drawn = 100 * torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    weight_q, scale = drawn.clamp(-127, 127).to(format_), torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(widening_triton.widened(weight_q, scale), widening._by_torch(weight_q, scale, torch.bfloat16))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value * tl.load(scales_at + row)", "value"),
        ("value * tl.load(scales_at + row)", "value * tl.load(scales_at)"),
        ("wide.to(out_at.dtype.element_ty), mask=inside", "wide.to(out_at.dtype.element_ty), mask=columns < width - 1"),
    ],
)
def test_self_test_refuses_a_kernel_that_is_wrong(changed, monkeypatch, old, new, format_):
    monkeypatch.setattr(widening_triton, "widened", changed("widening_triton", old, new).widened)
    assert widening.problem.__wrapped__(torch.device("cpu"), format_) == "its bits are others"


@pytest.mark.parametrize("format_", FORMATS)
def test_self_test_accepts_the_kernel(format_):
    assert widening.problem.__wrapped__(torch.device("cpu"), format_) is None
