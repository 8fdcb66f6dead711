"""How long chaos lasts, and which chaos it is."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    chaos = parser.getgroup("chaos")
    chaos.addoption("--chaos-minutes", type=float, default=20.0, help="how long faults go on (default: %(default)s)")
    chaos.addoption("--chaos-seed", type=int, default=1, help="the order of the faults (default: %(default)s)")
