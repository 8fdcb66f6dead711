"""docs/reliability.md names tests; each must be there."""

import re
from pathlib import Path

from tests.conftest import ROOT

NAME = re.compile(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`")


def missing(text: str) -> list[str]:
    """The names in back-ticks, of four words or more, that no file of tests defines."""
    code = "\n".join(path.read_text() for path in Path(ROOT / "tests").rglob("*.py"))
    return [name for name in NAME.findall(text) if not re.search(rf"^ *(?:async )?def {name}\(", code, re.MULTILINE)]


def test_every_test_that_the_page_names_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert len(NAME.findall(text)) > 50
    assert missing(text) == []


def test_missing_notices_a_name_that_is_none() -> None:
    assert missing("`test_that_nobody_has_written_yet`") == ["test_that_nobody_has_written_yet"]
