"""`make release` refuses what floats, before anything is built."""

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.settings import ROOT
from tests.test_image_files import steps

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile by itself, beside a lock of weights."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "builder").mkdir()
    (tmp_path / "builder" / "weights.lock.json").write_text("{}")
    return tmp_path


def pinned(folder: Path, base: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", "pinned", f"BASE={base}"], cwd=folder, capture_output=True, text=True)


def test_base_by_digest_passes(folder: Path) -> None:
    assert pinned(folder, f"python:3.11-slim-bookworm@{DIGEST}").returncode == 0


@pytest.mark.parametrize(
    "base", ["", "python:3.11-slim-bookworm", "python@sha256:0123", f"python@{DIGEST}0", f"python@{DIGEST.upper()}"]
)
def test_base_by_tag_is_refused(base: str, folder: Path) -> None:
    done = pinned(folder, base)
    assert done.returncode != 0
    assert "name the base image by digest" in done.stderr


def test_weights_without_a_lock_are_refused(folder: Path) -> None:
    (folder / "builder" / "weights.lock.json").unlink()
    done = pinned(folder, f"python:3.11-slim-bookworm@{DIGEST}")
    assert done.returncode != 0
    assert "--lock writes it" in done.stderr


def test_release_begins_with_what_is_pinned_and_hands_it_on() -> None:
    text = (ROOT / "Makefile").read_text()
    rule = text.partition("\nrelease: ")[2].partition("\n\n")[0]
    assert rule.split()[0] == "pinned"
    assert {"BASE=$(BASE)", "BAKE=--require-lock"} <= set(rule.split())


def test_image_is_built_on_what_the_argument_names() -> None:
    bases = [step.words[0] for step in steps("FROM")]
    assert bases == ["${BASE}", "base", "base"]
    (default,) = [word for step in steps("ARG", "") for word in step.words]
    assert default == "BASE=python:3.11-slim-bookworm"


def test_audit_does_not_pass_over_a_package_that_it_could_not_ask_about() -> None:
    rule = (ROOT / "Makefile").read_text().partition("\naudit: ")[2].partition("\n\n")[0]
    assert {"--strict", "--require-hashes", "$(LOCKED)"} <= set(rule.split())
