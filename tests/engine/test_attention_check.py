"""What the Hopper kernels alone are tested for finds each kind of wrong kernel."""

import math

import pytest
import torch

from engine.attention16 import attend16, in_float32
from engine.attention_check import heads_of_every_way, problem
from engine.attention_reach import WIDTH, score_factor


def one_head(query, key, value):
    out = attend16(query, key, value)
    out[:, :, 3] *= 1.1
    return out


def without_the_last_keys(query, key, value):
    return attend16(query, key[:, :320], value[:, :320])


def number_of_a_nan(query, key, value):
    return attend16(query, key, value).nan_to_num(0.0)


def nan_of_another_head(query, key, value):
    out = attend16(query, key, value)
    return torch.where(out.isnan().any(), torch.full_like(out, math.nan), out)


def without_maxima(query, key, value):
    """As a kernel that takes nothing away."""
    scores = torch.einsum("nhd,mhd->hnm", query[0].float(), key[0].float()) * score_factor(WIDTH)
    weights = torch.exp2(scores)
    out = torch.einsum("hnm,mhd->nhd", weights, value[0].float()) / weights.sum(dim=-1).t()[..., None]
    return out.bfloat16()[None]


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (one_head, "its result is off"),
        (without_the_last_keys, "its result is off"),
        (without_maxima, "its result is off"),
        (lambda q, k, v: attend16(q, k, v) * math.nan, "its result is off"),
        (number_of_a_nan, "it hides a NaN"),
        (nan_of_another_head, "it hides a NaN"),
    ],
)
def test_kernel_that_is_wrong_is_found_out(kernel, said):
    assert problem(kernel, in_float32, "cpu").startswith(said)


def test_kernel_that_is_right_has_no_problem():
    assert problem(attend16, in_float32, "cpu") is None


@pytest.mark.parametrize("head", [0, 1])
def test_head_that_is_shifted_alone_needs_it(head):
    drawn = [x[:, :, head : head + 1] for x in heads_of_every_way("cpu")]
    assert without_maxima(*drawn).isfinite().all() == (head == 0)
