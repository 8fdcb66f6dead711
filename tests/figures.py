"""The figures that tests saw, one line each at the end of the run, for whoever writes them down.

Use by naming this file in `pytest_plugins`. A test says `figure("jobs answered around SIGTERM", "200 of 200")`; the
tests of one parametrised function may say the same name with a `Count` or a `Worst`, which make one line together.

PYTEST_DONT_REWRITE: the tests import it before pytest would, and it asserts nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import pytest


@dataclass(frozen=True)
class Count:
    """So many of so many. Adds up."""

    good: int
    of: int


@dataclass(frozen=True)
class Worst:
    """A measured value with its limit. The largest is shown."""

    value: float
    unit: str
    limit: float


Seen = str | Count | Worst
Figure = Callable[[str, Seen], None]
TITLE = "figures"
FIGURE = "figure"
KINDS = {1: str, 2: Count, 3: Worst}
"""By how many values each has."""


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Say a figure, best before it is asserted, so that a failing run shows it too."""

    def say(name: str, seen: Seen) -> None:
        # As a tuple of plain values, which pytest-xdist can carry from one process to another.
        plain = (seen,) if isinstance(seen, str) else astuple(seen)
        request.node.user_properties.append((name, (FIGURE, *plain)))

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = defaultdict(list)
    for report in _reports(terminalreporter):
        for name, value in report.user_properties:
            if isinstance(value, list | tuple) and value[0] == FIGURE:
                found[name].append(KINDS[len(value) - 1](*value[1:]))
    if found:
        terminalreporter.section(TITLE)
        for name, values in found.items():
            terminalreporter.write_line(f"{name}: {summary(values)}")


def summary(values: list[Seen]) -> str:
    """All that was said under one name, as one text."""
    counts = [value for value in values if isinstance(value, Count)]
    worst = [value for value in values if isinstance(value, Worst)]
    texts = [value for value in values if isinstance(value, str)]
    if counts:
        texts.append(f"{sum(count.good for count in counts):,} of {sum(count.of for count in counts):,}")
    if worst:
        largest = max(worst, key=lambda each: each.value)
        texts.append(f"{largest.value:.3g} {largest.unit} at worst, of {largest.limit:g} allowed")
    return "; ".join(texts)


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport) and report.when == "call":
                yield report
