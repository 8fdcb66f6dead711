"""The projection gives back what it was made from, scales as it says, and is what docs/performance.md shows."""

import re
from dataclasses import replace

import pytest

from bench.processes import ROOT
from bench.projected import H200, OTHERS, Measured, project
from bench.work import forward_work


def test_card_that_was_measured_is_projected_as_it_was_measured():
    measured = Measured()
    exact, narrow, _ = project(replace(H200, attention=measured.attention), measured, measured.tokens)
    assert narrow.forward_s == pytest.approx(2.143)
    # six forwards, 0.77 s of decode, 0.24 s of other things
    assert narrow.job_s == pytest.approx((13.87, 13.87), abs=0.01)
    assert exact.forward_s > narrow.forward_s


def test_forward_at_its_floor_leaves_nothing_to_move():
    floor_s = forward_work(34_320).floor_s(1519e12, 690e12)
    assert Measured(forward_s=floor_s).rest_tb == pytest.approx(0.0)


def test_slower_cards_take_longer_and_8_bits_less():
    for card in OTHERS:
        exact, narrow, lossy = project(card, Measured(), 34_320)
        assert 2.143 < lossy.forward_s < narrow.forward_s < exact.forward_s
        assert narrow.job_s[0] < narrow.job_s[1] < exact.job_s[0]


def test_page_shows_what_is_projected():
    page = (ROOT / "docs" / "performance.md").read_text().split("## Projected")[1].split("\n## ")[0]
    shown = re.findall(r"^\| (.+) \| (.+) \| ([\d.]+) \| ([\d.]+) \| (\d+)(?: to (\d+))? \|$", page, re.MULTILINE)
    assert len(shown) == 8
    made = {card.name: list(project(card, Measured(), 34_320)) for card in OTHERS}
    ways = {"bf16, rolling swap": 0, "both resident": 1, "and SageAttention": 2}
    for name, how, *figures in shown:
        found = made[name][next(way for words, way in ways.items() if how.endswith(words))]
        forward_s, six_s, low, high = (float(figure or figures[2]) for figure in figures)
        assert (forward_s, six_s) == pytest.approx((found.forward_s, found.six_s), rel=0.005)
        assert (low, high) == tuple(round(each) for each in found.job_s)
