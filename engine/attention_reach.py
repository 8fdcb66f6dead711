"""When a softmax needs no maximum: what is known of a head's scores before any is computed.

A softmax takes each row's largest score away first, so that no exponential overflows. To find it, and to shrink what
was summed before whenever it grows, is a tenth to an eighth of attention's time on an H200 (docs/LOG.md). What else
could be taken? Scores are powers of two here:

- None is larger than the longest query times the longest key of its head (Cauchy-Schwarz): the bound.
- What all of a head's rows have taken, a row's sum loses again when it is divided by: any number will do that keeps
  the exponentials inside float32. Taken is what the bound has over MOST_WEIGHT, so no weight is above 2**MOST_WEIGHT.
- A row's weights add up to no less than their number times 2**(the mean of the row's scores) (the geometric mean is no
  larger than the arithmetic one), and that mean, a query times the mean of the keys, is no less than -(the longest
  query times that mean's length).

So where bound and mean together span no more than MOST_SPAN, a row of n keys adds up to n * 2**-100 or more, and what
float32 loses below 2**-126 is at most n * 2**-126: 2**-26 of it, less than a float32 is rounded by. The result is that
of a usual softmax, its sums rounded otherwise. Heads that span more have their maxima looked for.
"""

import math
from dataclasses import dataclass

from torch import Tensor

WIDTH = 128  # of a head, the one size that the card's kernel takes
KEY_TILE = 80  # keys that a block of engine.attention_hopper takes at a time

# Weights of 2**60, 2**20 of them, with values of 2**40 are in float32.
MOST_WEIGHT = 60.0
MOST_SPAN = 160.0


@dataclass(frozen=True)
class Reach:
    """Of each head's scores, as powers of two."""

    span: Tensor
    """float32 (heads,): how far no score is above 0 and no row's mean below, together."""
    shift: Tensor
    """float32 (heads,): taken from each score, where the head spans no more than MOST_SPAN."""


def reach(bound: Tensor, mean: Tensor) -> Reach:
    """`bound`: no score is above it; `mean`: no row's mean is below -mean. Both (heads,) float32. A NaN stays one."""
    return Reach(bound + mean, (bound - MOST_WEIGHT).clamp_min(0.0))


def score_factor(width: int) -> float:
    """What a softmax over heads of this width multiplies its products with, to be a power of two."""
    return math.log2(math.e) / math.sqrt(width)
