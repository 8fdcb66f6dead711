"""docs/settings.md; the pages of the contract are held by tests/schemas/test_docs.py."""

from dataclasses import fields
from pathlib import Path

from builder import generate_docs
from engine.settings import ROOT, Settings


def test_every_setting_has_a_row() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in generate_docs.settings().splitlines() if "| `" in line]
    assert rows == [f"`{one.metadata['variable']}`" for one in fields(Settings)]


def test_defaults_are_written_as_in_the_environment() -> None:
    page = generate_docs.settings()
    assert "| `WORKER_OUTPUT_DIR` | a folder | `output` |" in page
    assert "| `WORKER_COMPILE` | 1 or 0 | `1` |" in page
    assert "| `BUCKET_SECRET_ACCESS_KEY` | a key | not set |" in page
    assert str(ROOT) not in page


def test_check_fails_when_a_figure_differs(tmp_path: Path) -> None:
    assert generate_docs.main([], tmp_path) == 0
    assert generate_docs.main(["--check"], tmp_path) == 0
    drawing = tmp_path / "figures" / "flf.svg"
    drawing.write_text(drawing.read_text().replace("known", "unknown"))
    assert generate_docs.main(["--check"], tmp_path) == 1
