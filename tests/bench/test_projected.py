"""The projection gives back what it was made from, and scales as it says."""

import pytest

from bench.projected import H200, OTHERS, Measured, project
from bench.work import forward_work


def test_card_that_was_measured_is_projected_as_it_was_measured():
    measured = Measured()
    exact, narrow, _ = project(H200, measured, measured.tokens)
    assert narrow.forward_s == pytest.approx(2.30)
    assert narrow.job_s == pytest.approx((16.8, 16.8))  # six forwards, 2.0 s of decode, 1.0 s of other things
    assert exact.forward_s > narrow.forward_s


def test_forward_at_its_floor_leaves_nothing_to_move():
    floor_s = forward_work(34_320).floor_s(1500e12, 678e12)
    assert Measured(forward_s=floor_s).rest_tb == pytest.approx(0.0)


def test_slower_cards_take_longer_and_8_bits_less():
    for card in OTHERS:
        exact, narrow, lossy = project(card, Measured(), 34_320)
        assert 2.30 < lossy.forward_s < narrow.forward_s < exact.forward_s
        assert narrow.job_s[0] < narrow.job_s[1] < exact.job_s[0]
