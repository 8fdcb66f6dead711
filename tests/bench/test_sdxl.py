"""SDXL's ladder: without a card it climbs the rungs that need none, and tells their pictures apart."""

from pathlib import Path

import pytest

from bench import sdxl
from bench.jobs import located


@pytest.fixture(scope="module")
def found(twins: Path) -> list[sdxl.Row]:
    _, parts = located("image", twins)
    return list(sdxl.measure(parts, "cpu", is_small=True, repeats=1))


def test_rungs_without_a_card_are_measured_and_the_others_left_out(found: list[sdxl.Row]) -> None:
    assert [row.rung for row in found] == ["eager", "eager, channels last"]
    assert all(row.job_s >= row.denoise_s > row.decode_s > 0 for row in found)


def test_first_rung_is_its_own_reference_and_another_picture_is_seen(found: list[sdxl.Row]) -> None:
    assert found[0].levels_off == 0
    assert found[1].levels_off < 1  # convolutions sum in another order, no more


def test_layout_of_one_rung_is_not_left_to_the_next(twins: Path) -> None:
    _, parts = located("image", twins)
    kept = sdxl.Kept(parts)
    strides = [
        sdxl._prepared(kept, rung, "cpu")._parts["unet"].conv_in.weight.stride()
        for rung in (sdxl.RUNGS[1], sdxl.RUNGS[0])
    ]
    assert strides == [(36, 1, 12, 4), (36, 9, 3, 1)]


def test_table_has_a_line_for_each_rung_with_its_ratio() -> None:
    lines = sdxl.table(
        [
            sdxl.Row("eager", 3.0, 2.5, 0.1, 62.5, 5.0, 13.5, 0.0),
            sdxl.Row("replayed", 2.0, 1.5, 0.1, 37.5, 4.0, 13.5, 0.0),
        ]
    ).splitlines()
    assert lines[2:] == [
        "| eager | 3 | 1 | 2.5 | 0.1 | 62.5 | 5 | 13.5 | 0 |",
        "| replayed | 2 | 1.5 | 1.5 | 0.1 | 37.5 | 4 | 13.5 | 0 |",
    ]
