"""The grammar of `loras_multipliers`."""

import pytest

from engine.multipliers import parse_multipliers
from schemas.errors import InvalidInput


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1;0 0;1 1.2;0 0;1", ((1.0, 0.0), (0.0, 1.0), (1.2, 0.0), (0.0, 1.0))),
        (["1;0", "0;1", "1.2;0", "0;1"], ((1.0, 0.0), (0.0, 1.0), (1.2, 0.0), (0.0, 1.0))),
        ("0.5 1 .75 -2", ((0.5, 0.5), (1.0, 1.0), (0.75, 0.75), (-2.0, -2.0))),
        ([0.5, 1, "1.2;0", "1."], ((0.5, 0.5), (1.0, 1.0), (1.2, 0.0), (1.0, 1.0))),
        ("  1;0\n0;1\t1.2;0  0;1 ", ((1.0, 0.0), (0.0, 1.0), (1.2, 0.0), (0.0, 1.0))),
    ],
)
def test_parse_multipliers_reads_a_value_a_phase(value, expected):
    assert parse_multipliers(value, n_loras=4, phases=2) == expected


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("1;0 0;1", "loras_multipliers: has 2 entries; this profile has 4 LoRAs"),
        ("", "loras_multipliers: has 0 entries; this profile has 4 LoRAs"),
        ([1] * 5, "loras_multipliers: has 5 entries; this profile has 4 LoRAs"),
        ("1;0;0 1 1 1", "loras_multipliers[0]: '1;0;0' has 3 phases; give 1 or 2, parted by ';'"),
        ("1 1 1 1;", "loras_multipliers[3]: '' is not a number from -10 to 10"),
        ("1,0 1 1 1", "loras_multipliers[0]: '1,0' is not a number from -10 to 10"),
        ("1 nan 1 1", "loras_multipliers[1]: 'nan' is not a number from -10 to 10"),
        ("1 1 inf 1", "loras_multipliers[2]: 'inf' is not a number from -10 to 10"),
        ("1 1 1_0 1", "loras_multipliers[2]: '1_0' is not a number from -10 to 10"),
        ("1 1 10.5 1", "loras_multipliers[2]: '10.5' is not a number from -10 to 10"),
        ([True, 1, 1, 1], "loras_multipliers[0]: True is not a number from -10 to 10"),
        ([1, None, 1, 1], "loras_multipliers[1]: None is not a number from -10 to 10"),
        ([1, 1, float("nan"), 1], "loras_multipliers[2]: nan is not a number from -10 to 10"),
        ([1, 1, 1, [1]], "loras_multipliers[3]: [1] is not a number from -10 to 10"),
    ],
)
def test_parse_multipliers_says_what_is_wrong(value, sentence):
    with pytest.raises(InvalidInput) as caught:
        parse_multipliers(value, n_loras=4, phases=2)
    assert caught.value.sentence == sentence


def test_parse_multipliers_refuses_a_huge_integer_without_overflow():
    with pytest.raises(InvalidInput):
        parse_multipliers([10**400], n_loras=1, phases=2)


def test_parse_multipliers_lists_every_problem_at_once():
    with pytest.raises(InvalidInput) as caught:
        parse_multipliers("x 1;1;1 1 y;z", n_loras=4, phases=2)
    assert [problem.field for problem in caught.value.problems] == [
        "loras_multipliers[0]",
        "loras_multipliers[1]",
        "loras_multipliers[3]",
        "loras_multipliers[3]",
    ]
