"""What the tests of the bake and of the reader share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.profiles import BAKES, PROFILES
from engine.twins import write_upstream
from tests.engine.disk import Disk


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of every profile as published, tiny. Read only: a test that spoils them copies them."""
    root = tmp_path_factory.mktemp("upstream")
    for name in BAKES:
        write_upstream(PROFILES[name], root)
    return root


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Every preadv of the test. What it still holds back at the end is let go."""
    disk = Disk(monkeypatch)
    yield disk
    disk.gate.set()
