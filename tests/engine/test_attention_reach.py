"""A softmax without its maxima: inside float32 wherever it is used, and equal to the usual one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention16 import reach_of
from engine.attention_reach import MOST_SPAN, MOST_WEIGHT, WIDTH, Reach, reach, score_factor

SMALLEST = 2.0**-126  # the card's exponentials are zero below it


def draw(queries, keys, spread, seed, shared=0.0):
    """Two heads; `shared` lies in each key."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(n, 2, WIDTH, generator=generator) * spread for n in (queries, keys))
    return query, key + shared * torch.randn(1, 2, WIDTH, generator=generator)


def scores_of(query, key):
    return torch.einsum("nhd,mhd->hnm", query.double(), key.double()) * score_factor(WIDTH)


def weights_of(scores, reached: Reach):
    """As the kernel computes them: float32, and nothing below its smallest normal number."""
    weights = torch.exp2(scores.float() - reached.shift[:, None, None])
    return torch.where(weights < SMALLEST, 0.0, weights)


@given(
    spread=st.floats(0.01, 2.7),
    shared=st.floats(0.0, 4.0),
    queries=st.integers(1, 20),
    keys=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_softmax_without_maxima_is_the_usual_one_for_heads_that_span_no_more(spread, shared, queries, keys, seed):
    query, key = draw(queries, keys, spread, seed, shared)
    reached, scores = reach_of(query, key), scores_of(query, key)
    weights = weights_of(scores, reached)
    usual = torch.softmax(scores * math.log(2), dim=-1)
    for head in (reached.span <= MOST_SPAN).nonzero()[:, 0].tolist():
        assert weights[head].max() <= 2.0 ** (MOST_WEIGHT + 0.01)
        assert (weights[head].sum(dim=-1) >= keys * 2.0**-100.01).all()
        mine = weights[head].double() / weights[head].double().sum(dim=-1, keepdim=True)
        assert (mine - usual[head]).abs().max() < 3e-5


@given(spread=st.floats(0.01, 20), shared=st.floats(0.0, 20), keys=st.integers(1, 99), seed=st.integers(0, 99))
def test_no_score_is_above_and_no_mean_of_a_row_below_what_is_said(spread, shared, keys, seed):
    query, key = draw(9, keys, spread, seed, shared)
    reached, scores = reach_of(query, key), scores_of(query, key)
    lowest = (-scores.mean(dim=-1)).amax(dim=-1).clamp_min(0)
    bound = torch.where(reached.shift > 0, reached.shift + MOST_WEIGHT, torch.inf)
    assert (scores.amax((1, 2)) <= bound * (1 + 1e-5)).all()
    assert (scores.amax((1, 2)) + lowest <= reached.span * (1 + 1e-5) + 1e-4).all()


def test_what_is_shifted_would_overflow_as_it_is():
    """Each query meets itself among the keys, with a score of 150, and its contrary."""
    query, key = draw(4, 200, 1.0, 0)
    query *= (150 / score_factor(WIDTH)) ** 0.5 / query.norm(dim=2, keepdim=True)
    key = torch.cat([query, -query, key])
    reached, scores = reach_of(query, key), scores_of(query, key)
    assert (reached.span <= MOST_SPAN).all()
    assert weights_of(scores, reached).isfinite().all()
    assert weights_of(scores, Reach(reached.span, torch.zeros(2))).isinf().any()


@pytest.mark.parametrize("at", [0, 1])
def test_head_with_a_nan_is_not_bounded(at):
    given_ = list(draw(9, 90, 1.0, 0))
    given_[at][7, 1, 5] = math.nan
    assert (reach_of(*given_).span <= MOST_SPAN).tolist() == [True, False]


def test_scores_that_are_small_are_taken_as_they_are():
    reached = reach(torch.tensor([0.0, 60.0, 61.0]), torch.zeros(3))
    assert reached.shift.tolist() == [0.0, 0.0, 1.0]
