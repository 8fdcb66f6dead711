"""What a job would take on 48 GB cards that nobody has measured, from what was measured here. A projection, no more.

    python -m bench.projected                                        from the figures in docs/LOG.md
    python -m bench.projected --forward-s 2.2 --decode-s 1.1         from new ones

A forward is products, attention and the rest, and the rest moves memory. Products reach the share of the data sheet
that they reach here. Attention kernels are other ones on other cards: their share is a figure from published charts.
The rest is what a forward here takes beyond its floor, as bytes at this card's bandwidth, moved at the other's. The
decode is between arithmetic-bound and bandwidth-bound, so it is told as a range.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from bench.rows import rows
from bench.work import TERA, forward_work

FORWARDS = 6
STREAMED = 0.85  # of a data sheet's bandwidth that a streaming kernel reaches


@dataclass(frozen=True)
class Card:
    """A data sheet: dense TFLOP/s and TB/s. `attention`: exact bf16, `sage`: 8-bit, TFLOP/s as kernels reach them."""

    name: str
    bf16: float
    narrow: float
    narrow_kind: str
    tb_s: float
    attention: float
    sage: float


H200 = Card("H200", 989.0, 1979.0, "fp8", 4.8, 678.0, 880.0)
# Attention: FlashAttention-2 at 65 % of the data sheet, as published charts have it on Ampere and Ada; SageAttention
# as its charts have it on cards of the same generations, scaled by the data sheets.
OTHERS = (
    Card("L40S", 362.0, 733.0, "fp8", 0.864, 0.65 * 362.0, 430.0),
    Card("RTX 6000 Ada", 364.0, 728.0, "fp8", 0.960, 0.65 * 364.0, 430.0),
    Card("A6000", 155.0, 310.0, "int8", 0.768, 0.65 * 155.0, 165.0),
    Card("A40", 150.0, 299.0, "int8", 0.696, 0.65 * 150.0, 160.0),
)


@dataclass(frozen=True)
class Measured:
    """On the H200, one run: ceilings in TFLOP/s, seconds of a compiled 8-bit forward, and of the rest of a job."""

    bf16: float = 788.0
    narrow: float = 1519.0
    attention: float = 690.0
    forward_s: float = 2.143
    tokens: int = 34_320
    decode_s: float = 0.77
    other_s: float = 0.24
    """Text, encode, file, and what the host does: taken as it is."""

    @property
    def rest_tb(self) -> float:
        """Terabytes that a forward's time beyond its floor would move."""
        work = forward_work(self.tokens)
        floor_s = work.floor_s(self.narrow * TERA, self.attention * TERA)
        return (self.forward_s - floor_s) * H200.tb_s * STREAMED


@dataclass(frozen=True)
class Projection:
    """`job_s`: with the decode scaled by arithmetic and by bandwidth, the shorter first."""

    card: str
    how: str
    forward_s: float
    six_s: float
    job_s: tuple[float, float]


def project(card: Card, measured: Measured, tokens: int) -> Iterator[Projection]:
    """Exact first, then 8-bit products, then 8-bit attention as well, which is lossy."""
    work = forward_work(tokens)
    rest_s = measured.rest_tb * tokens / measured.tokens / (card.tb_s * STREAMED)
    decode = sorted(measured.decode_s * ratio for ratio in (H200.bf16 / card.bf16, H200.tb_s / card.tb_s))
    wide, narrow = card.bf16 * measured.bf16 / H200.bf16, card.narrow * measured.narrow / H200.narrow
    for how, product, attention in (
        ("bf16", wide, card.attention),
        (f"{card.narrow_kind} products", narrow, card.attention),
        (f"{card.narrow_kind} products, SageAttention", narrow, card.sage),
    ):
        forward_s = work.floor_s(product * TERA, attention * TERA) + rest_s
        six_s = FORWARDS * forward_s
        low, high = (six_s + measured.other_s + each for each in decode)
        yield Projection(card.name, how, forward_s, six_s, (low, high))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in vars(Measured()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    measured = Measured(**vars(parser.parse_args()))
    header = ["card", "how", "s/forward", "six forwards", "a job, s"]
    body = [
        [each.card, each.how, each.forward_s, each.six_s, f"{each.job_s[0]:.0f} to {each.job_s[1]:.0f}"]
        for card in OTHERS
        for each in project(card, measured, measured.tokens)
    ]
    print(rows(header, body))


if __name__ == "__main__":
    main()
