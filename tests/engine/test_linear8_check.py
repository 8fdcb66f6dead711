"""The start-up check of the 8-bit kernels, and the accuracy figures of the 8-bit layer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import linear8_check
from engine.linear8 import KINDS, Linear8
from engine.linear8_check import (
    MIN_SNR_DB,
    kernel_calls,
    layer_snr_db,
    passing,
    problem,
    product_snr_db,
    snr_db,
)
from engine.proof import Proof


def make_linear(outliers: float = 1.0) -> nn.Linear:
    """(512 -> 256); `outliers` scales 4 rows and 4 columns of the weight, as in trained feed-forwards."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 256)
    with torch.no_grad():
        linear.weight[::64] *= outliers
        linear.weight[:, ::128] *= outliers
    return linear


def make_inputs() -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(2))


# Floors: the lowest SNR of 20 seeds less 0.5 dB (28.6, 41.4, 31.8, 48.0 seen).
@pytest.mark.parametrize(
    ("kind", "floor_db"), [("fp8", 28.1), ("int8", 40.9), ("fp8-weights", 31.3), ("int8-weights", 47.5)]
)
def test_layer_snr_holds_on_random_weights(kind, floor_db):
    assert layer_snr_db(make_linear(), make_inputs(), kind) > floor_db


# The same with outliers 20 times larger in rows and columns of the weight and one channel 30 times larger
# in the activations (28.3, 21.1, 31.4, 24.9 seen): a float format spends its bits evenly over sizes, an
# integer one does not.
@pytest.mark.parametrize(
    ("kind", "floor_db"), [("fp8", 27.8), ("int8", 20.6), ("fp8-weights", 30.9), ("int8-weights", 24.4)]
)
def test_layer_snr_holds_on_outlier_weights_and_inputs(kind, floor_db):
    inputs = make_inputs()
    inputs[:, 3] *= 30
    assert layer_snr_db(make_linear(outliers=20.0), inputs, kind) > floor_db


def test_one_scale_for_the_whole_tensor_would_fail_the_outlier_gate():
    linear = make_linear()
    with torch.no_grad():
        linear.weight[0] *= 1000
    inputs = make_inputs()
    scale = linear.weight.abs().max() / 127
    rounded = (linear.weight / scale).round() * scale
    reference = nn.functional.linear(inputs, linear.weight)[:, 1:]
    assert snr_db(reference, nn.functional.linear(inputs, rounded)[:, 1:]) < 10
    linear.bias = None
    assert snr_db(reference, Linear8.from_linear(linear, "int8")(inputs)[:, 1:]) > 40


def test_snr_is_minus_infinity_for_nan():
    assert snr_db(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("-inf")


@pytest.fixture
def hopper(monkeypatch):
    """A card that is not there, whose kernels have proved nothing yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(linear8_check, "problem", Proof(problem.__wrapped__))


def test_cpu_has_no_fast_kernel():
    assert problem("cpu", "fp8") == problem("cpu", "int8") == "the device is no CUDA card"
    assert passing("cpu") == ()


@pytest.mark.usefixtures("hopper")
def test_each_kind_is_tested_when_it_is_asked_for(monkeypatch):
    tested = []

    def multiplied(kind, *_):
        tested.append(kind)
        return MIN_SNR_DB if kind is KINDS["int8"] else MIN_SNR_DB - 1

    monkeypatch.setattr(linear8_check, "product_snr_db", multiplied)
    assert linear8_check.problem("cuda", "int8") is None
    assert tested == [KINDS["int8"]] * 2
    assert linear8_check.problem("cuda", "fp8") == "its result is off (SNR 27.0 dB)"
    assert passing("cuda") == ("int8",)
    assert len(tested) == 4


@pytest.mark.usefixtures("hopper")
def test_card_without_the_kernel_tries_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    assert linear8_check.problem("cuda", "fp8") == "compute capability 8.6 is too low"
    assert linear8_check.problem("cuda", "int8-weights") == "compute capability 8.6 is too low"


def test_product_snr_passes_a_right_kernel_and_catches_a_wrong_one():
    def one_row_off(x_q, x_scale, weight_q, weight_scale, bias, dtype):
        return KINDS["int8"].product(x_q, x_scale, weight_q, weight_scale.roll(1), bias, dtype)

    def silent_nan(*args):
        return KINDS["int8"].product(*args) * float("nan")

    assert product_snr_db(KINDS["int8"], 64, 512, 256, "cpu") > MIN_SNR_DB
    assert product_snr_db(KINDS["fp8"], 64, 512, 256, "cpu") > MIN_SNR_DB
    assert product_snr_db(replace(KINDS["int8"], product=one_row_off), 64, 512, 256, "cpu") < MIN_SNR_DB
    assert product_snr_db(replace(KINDS["int8"], product=silent_nan), 64, 512, 256, "cpu") == float("-inf")


def test_numbers_are_drawn_where_they_are_multiplied(monkeypatch):
    draw, drawn = torch.randn, []

    def noted(*shape, generator, device=None):
        drawn.append((device, generator.device.type))
        return draw(*shape, generator=generator, device=device)

    monkeypatch.setattr(torch, "randn", noted)
    product_snr_db(KINDS["fp8"], 8, 64, 32, "cpu")
    assert drawn == [("cpu", "cpu")] * 3


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("said", "told"), [("no kernel\nat all", "no kernel"), ("", "")])
def test_kernel_that_fails_is_left_out_whatever_it_says(said, told, monkeypatch):
    def broken(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(linear8_check, "product_snr_db", broken)
    assert linear8_check.problem("cuda", "fp8") == f"the kernel fails ({told})"
    assert passing("cuda") == ()


def test_kernel_calls_counts_what_ran_and_sees_a_silent_detour():
    weight = torch.randint(-127, 127, (32, 64), dtype=torch.int8)
    inputs = torch.randint(-127, 127, (32, 64), dtype=torch.int8)

    def fast_twice():
        torch._int_mm(inputs, weight.t())
        torch._int_mm(inputs, weight.t())

    assert kernel_calls(fast_twice) == {"_scaled_mm": 0, "_int_mm": 2}
    layer = Linear8.from_linear(make_linear(), "int8-weights")
    assert kernel_calls(lambda: layer(torch.randn(32, 512))) == {"_scaled_mm": 0, "_int_mm": 0}
