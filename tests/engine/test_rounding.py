"""One-pass rounding: the same numbers as the steps apart."""

import pytest
import torch
from torch.nn import functional

from engine import rounding
from engine.attention import rotate
from engine.linear8 import KINDS, round_rows
from engine.rounding import add_gated, add_norm_round, gelu_round, norm_rotate, norm_round, plain_round

EPS = 1e-6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rows():
    return draw(5, 48).to(torch.bfloat16)


@pytest.fixture
def turn():
    """cos and sin for heads of 16."""
    angles = draw(5, 8, seed=6).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def test_plain_round_gives_what_rounding_gives(rows):
    values, scale = plain_round(rows)
    expected, expected_scale = round_rows(rows, KINDS["fp8"])
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_norm_rotate_gives_what_the_steps_give_in_float32(rows, turn):
    norm = torch.nn.RMSNorm(48, EPS)
    norm.weight.data = draw(48, seed=1)
    cos, sin = (table[None, :, None] for table in turn)
    with torch.no_grad():
        expected = rotate(norm(rows.float()[None]).unflatten(2, (3, 16)), cos, sin).flatten(2)[0]
        made = norm_rotate(rows, norm.weight, *turn, EPS)
    assert torch.equal(made, expected.to(torch.bfloat16))


def test_norm_rotate_lets_no_other_row_see_a_nan(rows, turn):
    right = norm_rotate(rows, torch.ones(48), *turn, EPS)
    rows[1, 3] = float("nan")
    made = norm_rotate(rows, torch.ones(48), *turn, EPS)
    assert torch.isnan(made[1]).all()
    assert torch.equal(made[[0, 2, 3, 4]], right[[0, 2, 3, 4]])


def test_gelu_round_gives_what_gelu_and_rounding_give(rows):
    values, scale = gelu_round(rows)
    expected, expected_scale = round_rows(functional.gelu(rows.float(), approximate="tanh"), KINDS["fp8"])
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_norm_round_gives_what_norm_and_rounding_give(rows):
    weight, bias = draw(48, seed=1), draw(48, seed=2)
    values, scale = norm_round(rows, weight, bias, EPS)
    expected, expected_scale = round_rows(functional.layer_norm(rows.float(), (48,), weight, bias, EPS), KINDS["fp8"])
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("gated", [True, False])
def test_add_norm_round_norms_the_sum_that_it_returns(rows, gated):
    added, weight, bias = draw(5, 48, seed=3).to(torch.bfloat16), draw(48, seed=1), draw(48, seed=2)
    gate = draw(48, seed=4) if gated else None
    total, values, scale = add_norm_round(rows, added, gate, weight, bias, EPS)
    by_hand = (rows.float() + added.float() * gate).to(torch.bfloat16) if gated else rows + added
    assert torch.equal(total, by_hand)
    expected, expected_scale = norm_round(total, weight, bias, EPS)
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_add_gated_rounds_the_sum_once(rows):
    added, gate = draw(5, 48, seed=3).to(torch.bfloat16), draw(48, seed=4)
    made = add_gated(rows, added, gate)
    assert torch.equal(made, (rows.double() + added.double() * gate.double()).to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["plain", "gelu", "norm"])
def test_a_row_with_a_nan_becomes_nan_and_no_other_does(rows, kind):
    rows[1, 3] = float("nan")
    values, scale = {
        "plain": lambda: plain_round(rows),
        "gelu": lambda: gelu_round(rows),
        "norm": lambda: norm_round(rows, torch.ones(48), torch.zeros(48), EPS),
    }[kind]()
    made = values.float() * scale
    assert torch.isnan(made[1]).all()
    assert torch.isfinite(made[[0, 2, 3, 4]]).all()


def test_every_operator_has_a_fake_of_its_shapes_and_types(rows, turn):
    weight = torch.ones(48)
    torch.library.opcheck(plain_round, (rows,))
    torch.library.opcheck(norm_rotate, (rows, weight, *turn, EPS))
    torch.library.opcheck(gelu_round, (rows,))
    torch.library.opcheck(norm_round, (rows, weight, weight, EPS))
    torch.library.opcheck(add_norm_round, (rows, rows.clone(), None, weight, weight, EPS))
    torch.library.opcheck(add_gated, (rows, rows.clone(), weight))


def test_problem_is_none_for_the_right_arithmetic():
    assert rounding.problem.__wrapped__("cpu") is None


@pytest.mark.parametrize("name", ["plain_round", "gelu_round", "norm_round", "norm_rotate", "add_gated"])
def test_problem_names_a_wrong_result(name, monkeypatch):
    right = getattr(rounding, name)
    monkeypatch.setattr(rounding, name, lambda x, *rest: right(x.flip(-1), *rest))
    assert "a result is off" in str(rounding.problem.__wrapped__("cpu"))


def test_problem_names_a_gate_that_is_left_out(monkeypatch):
    right = rounding.add_norm_round
    monkeypatch.setattr(rounding, "add_norm_round", lambda x, added, _gate, *rest: right(x, added, None, *rest))
    assert "a result is off" in str(rounding.problem.__wrapped__("cpu"))


def test_problem_says_that_a_kernel_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(rounding, "gelu_round", broken)
    assert rounding.problem.__wrapped__("cpu") == "they fail (RuntimeError)"


@pytest.mark.gpu
def test_kernels_agree_with_float32_on_a_card():
    assert rounding.problem.__wrapped__("cuda") is None


@pytest.mark.parametrize("operator", [rounding.plain_round, rounding.gelu_round])
def test_operator_tells_the_compiler_what_it_gives_also_of_columns(operator):
    torch.library.opcheck(operator, (torch.randn(48, 6).bfloat16().t(),), test_utils="test_faketensor")
