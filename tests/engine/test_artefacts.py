"""Compiled graphs on disk: what is another file, and that nobody reads half of one or loses another's."""

from pathlib import Path

import pytest
import torch

from engine import artefacts
from engine.artefacts import Artefacts

FP8 = Artefacts(Path("/kept"), "fp8-flash4").of("34320 tokens")


@pytest.fixture
def compiled(monkeypatch):
    """What this process has compiled, as the compiler hands it out."""
    content = [b"graphs"]
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (content[0], None) if content[0] else None)
    return content


def test_missing_artefacts_are_a_miss(tmp_path):
    assert Artefacts(tmp_path, "fp8-flash4").load() is False


def test_damaged_artefacts_are_a_miss(tmp_path):
    kept = Artefacts(tmp_path, "fp8-flash4")
    kept.path.write_bytes(b"not what was saved")
    assert kept.load() is False


@pytest.mark.parametrize(
    "other",
    [Artefacts(Path("/kept"), "bf16-flash4").of("34320 tokens"), FP8.of("32760 tokens")],
    ids=["variant", "size"],
)
def test_another_variant_or_size_is_another_file(other):
    assert Artefacts(Path("/kept"), "fp8-flash4").of("34320 tokens").path == FP8.path
    assert other.path != FP8.path


@pytest.mark.parametrize("what", ["version_of", "card_name"])
def test_another_version_or_card_is_another_file(what, monkeypatch):
    path = FP8.path
    monkeypatch.setattr(artefacts, what, lambda *_: "another")
    assert FP8.path != path


def test_two_workers_on_one_volume_keep_each_others_sizes(tmp_path, compiled):
    for size in ("34320 tokens", "32760 tokens"):
        compiled[0] = size.encode()
        assert Artefacts(tmp_path, "fp8-flash4").of(size).save()
    kept = sorted(path.read_bytes() for path in tmp_path.iterdir())
    assert kept == [b"32760 tokens", b"34320 tokens"]


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, compiled, monkeypatch):
    kept = Artefacts(tmp_path, "fp8-flash4")
    kept.save()
    compiled[0] = b"newer graphs"
    seen = []
    rename = Path.replace

    def look_first(self, target):
        seen.append((self.read_bytes(), kept.path.read_bytes()))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", look_first)
    assert kept.save()
    assert seen == [(b"newer graphs", b"graphs")]
    assert [path.name for path in tmp_path.iterdir()] == [kept.path.name]


def test_nothing_compiled_writes_nothing(tmp_path, compiled):
    compiled[0] = b""
    assert not Artefacts(tmp_path / "new", "fp8-flash4").save()
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_costs_a_warning_and_leaves_nothing(tmp_path, compiled, monkeypatch, caplog):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not Artefacts(tmp_path, "fp8-flash4").save()
    assert list(tmp_path.iterdir()) == []
    assert "could not be kept" in caplog.text
