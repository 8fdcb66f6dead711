"""The passes between convolutions: torch's form against diffusers' modules, and which form is chosen.

What the kernels compute: tests/kernels.
"""

import sys
import threading
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, WanUpsample
from torch import nn
from torch.nn import functional

from engine import passes
from engine.passes import TORCH, Chooser, agree, choose, norm, place


def make_pixels(channels: int = 6) -> torch.Tensor:
    return torch.randn(2, 3, 5, channels, generator=torch.Generator().manual_seed(1))


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(3, 0, 1, 2)[None]


def make_norm(channels: int = 6) -> WanRMS_norm:
    stock = WanRMS_norm(channels, images=False)
    nn.init.normal_(stock.gamma, generator=torch.Generator().manual_seed(2))
    return stock.requires_grad_(False)


def test_norm_is_the_stock_one():
    stock, x = make_norm(), make_pixels()
    x[0, 0, 0] = 0.0
    made = channels_first(norm(x, stock.gamma.flatten()))
    torch.testing.assert_close(made, stock(channels_first(x)), atol=1e-6, rtol=0)


def frames(*numbers: float) -> torch.Tensor:
    """A pixel of one channel a frame."""
    return torch.tensor(numbers)[:, None, None, None]


@pytest.mark.parametrize(
    ("x", "in_a_row", "side_by_side", "last"),
    [
        ([3], [1, 2, 3], [[1, 2, 3]], [2, 3]),
        ([3, 4], [1, 2, 3, 4], [[1, 2, 3], [2, 3, 4]], [3, 4]),
        ([3, 4, 5], [1, 2, 3, 4, 5], [[1, 2, 3], [2, 3, 4], [3, 4, 5]], [4, 5]),
        ([3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]], [5, 6]),
    ],
)
def test_place_writes_frames_after_those_kept_in_a_row_or_side_by_side(x, in_a_row, side_by_side, last):
    for wanted in (in_a_row, side_by_side):
        kept, room = frames(1, 2), torch.zeros(len(wanted), 1, 1, len(wanted[0]) if wanted is side_by_side else 1)
        place(frames(*x), kept, room.fill_(torch.nan))
        assert room[:, 0, 0].squeeze(-1).tolist() == wanted
        assert kept.flatten().tolist() == last


def test_norm_silu_places_its_results_after_the_frames_kept():
    stock, x = make_norm(), make_pixels()
    bias = torch.arange(6.0)
    kept, room = torch.full((2, 3, 5, 6), 7.0), torch.full((4, 3, 5, 6), torch.nan)
    TORCH.norm_silu(x, bias, stock.gamma.flatten(), kept, room)
    wanted = functional.silu(stock(channels_first(x + bias)))
    torch.testing.assert_close(channels_first(room[2:]), wanted, atol=1e-6, rtol=0)
    assert (room[:2] == 7.0).all()
    assert torch.equal(kept, room[2:])


def test_double_size_is_the_stock_upsampling():
    x = make_pixels()
    frames_first = x.permute(0, 3, 1, 2)
    stock = WanUpsample(scale_factor=(2.0, 2.0), mode="nearest-exact")(frames_first)
    assert torch.equal(TORCH.double_size(x), stock.permute(0, 2, 3, 1))


def test_agree_accepts_torchs_own():
    assert agree(TORCH, "cpu", 24)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(TORCH, add=lambda x, _bias, other: x + other),
        replace(TORCH, norm_silu=lambda x, _bias, gamma, *places: TORCH.norm_silu(x, None, gamma, *places)),
        replace(TORCH, norm_silu=lambda _x, _bias, _gamma, _kept, room: room.zero_()),
        replace(
            TORCH, norm_silu=lambda x, bias, gamma, kept, room: TORCH.norm_silu(x, bias, gamma, kept.clone(), room)
        ),
        replace(TORCH, double_size=lambda x: TORCH.double_size(x).roll(1, dims=2)),
    ],
    ids=["no bias in the sum", "no bias in the norm", "nothing", "nothing kept", "one pixel aside"],
)
def test_agree_refuses_wrong_results(wrong):
    assert not agree(wrong, "cpu", 24)


def test_choose_takes_torchs_operators_without_a_card():
    assert choose("cpu", {96}) == (TORCH, ())


def test_choose_goes_on_without_kernels_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "engine.passes_triton", None)
    chosen, notes = choose("cuda", {96})
    assert chosen is TORCH
    assert notes[0].startswith("decode without fused passes: ModuleNotFoundError")


def test_choose_leaves_out_kernels_with_wrong_results_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "engine.passes_triton", type(sys)("engine.passes_triton"))
    sys.modules["engine.passes_triton"].TRITON = replace(TORCH)
    monkeypatch.setattr(passes, "agree", lambda _passes, _device, channels: channels != 192)
    assert choose("cuda", {96, 192}) == (TORCH, ("decode without fused passes: wrong results with [192] channels",))


def test_choose_takes_kernels_that_agree(monkeypatch):
    kernels = replace(TORCH)
    monkeypatch.setitem(sys.modules, "engine.passes_triton", type(sys)("engine.passes_triton"))
    sys.modules["engine.passes_triton"].TRITON = kernels
    monkeypatch.setattr(passes, "agree", lambda _passes, _device, _channels: True)
    chosen, notes = choose("cuda", {96})
    assert chosen is kernels
    assert notes == ()


@pytest.mark.gpu
def test_kernels_agree_on_the_card():
    chosen, notes = choose("cuda", {24, 96, 192, 384})
    assert notes == ()
    assert chosen is not TORCH


class Slow:
    """Stands for `choose`: takes until it is let go."""

    def __init__(self, monkeypatch, chosen=TORCH, notes=()):
        self.calls, self.go, self.answer = [], threading.Event(), (chosen, notes)
        monkeypatch.setattr(passes, "choose", self)

    def __call__(self, device, channels):
        self.calls.append((device, channels, threading.current_thread().name))
        assert self.go.wait(10)
        return self.answer


def test_chooser_chooses_beside_what_goes_on_and_is_waited_for(monkeypatch):
    kernels = replace(TORCH)
    slow = Slow(monkeypatch, kernels)
    chooser = Chooser("cpu", [96, 96])
    assert slow.calls == []
    for _ in range(2):
        chooser.begin()
    threading.Timer(0.1, slow.go.set).start()
    assert chooser.chosen() is kernels
    assert chooser.chosen() is kernels
    assert slow.calls == [("cpu", {96}, "passes")]


def test_chooser_that_nobody_began_begins_when_it_is_asked(monkeypatch):
    slow = Slow(monkeypatch, kernels := replace(TORCH))
    slow.go.set()
    chooser = Chooser("cpu", {96})
    chooser.join()
    assert slow.calls == []
    assert chooser.chosen() is kernels


def test_chooser_says_once_what_should_be_said(monkeypatch, caplog):
    slow = Slow(monkeypatch, notes=("decode without fused passes: no compiler",))
    slow.go.set()
    chooser = Chooser("cpu", {96})
    with caplog.at_level("INFO", "engine.passes"):
        assert [chooser.chosen(), chooser.chosen()] == [TORCH, TORCH]
    assert caplog.messages == ["decode without fused passes: no compiler"]
