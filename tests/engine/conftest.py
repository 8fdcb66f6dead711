"""What the tests of the bake share."""

from pathlib import Path

import pytest

from engine.profiles import BAKES, PROFILES
from engine.twins import write_upstream


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of every profile as published, tiny. Read only: a test that spoils them copies them."""
    root = tmp_path_factory.mktemp("upstream")
    for name in BAKES:
        write_upstream(PROFILES[name], root)
    return root
