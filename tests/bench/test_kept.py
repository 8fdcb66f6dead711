"""What is kept is whole: the old or the new."""

import json
from pathlib import Path

import pytest

from bench.kept import keep


def test_keep_makes_the_folder_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    keep(path, [1])
    keep(path, [1, 2])
    assert json.loads(path.read_text()) == [1, 2]
    assert list(path.parent.iterdir()) == [path]


def test_keep_leaves_the_old_figures_when_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    keep(path, [1])

    def cut(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        keep(path, [1, 2])
    assert json.loads(path.read_text()) == [1]
