"""docs/licences.md: its table is what the packages say, and nothing that is used goes without a row."""

import re
from importlib.metadata import PathDistribution, version
from pathlib import Path

import pytest

from builder import list_licences
from builder.distributions import licence
from builder.list_licences import NOT_READ, page, read_here, table
from builder.lockfile import LOCK, Locked, read_lock
from engine.profiles import BAKES, PROFILES

CUDA = re.compile(r"(nvidia|cuda)-|triton$")
PAGE = list_licences.PAGE.read_text(encoding="utf-8")


def rows() -> dict[tuple[str, str], str]:
    body = PAGE.partition(list_licences.BEGIN)[2].partition(list_licences.END)[0]
    return dict(list_licences._row(line) for line in body.splitlines()[2:])


def test_page_is_what_the_packages_say() -> None:
    assert list_licences.main(["--check"]) == 0


def test_changed_licence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_licences, "read_here", lambda: read_here() | {("boto3", version("boto3")): "AGPL-3.0"})
    assert list_licences.main(["--check"]) == 1


def test_every_locked_package_has_a_row() -> None:
    assert list(rows()) == [(one.name, one.version) for one in read_lock(LOCK.read_text())]


def test_only_the_cards_libraries_are_unread() -> None:
    assert [name for (name, _), said in rows().items() if said == NOT_READ and not CUDA.match(name)] == []


def test_every_repository_of_weights_has_a_row() -> None:
    sources = [row.source for name in BAKES for row in (*PROFILES[name].components, *PROFILES[name].loras)]
    weights = PAGE.partition("## Weights")[2].partition("## Video")[0]
    assert [repo for repo in sorted({source.repo for source in sources}) if f"`{repo}`" not in weights] == []


def test_what_av_brings_is_named_in_the_page() -> None:
    """The wheel's own libraries, so that a newer wheel without x264, or with another GPL library, changes the page."""
    import av
    from av import _core

    assert f"`av`) {version('av')}" in PAGE
    said = {library["license"] for library in _core.library_meta.values()}
    assert said == {"LGPL version 3 or later"}
    flags = set(_core.library_meta["libavcodec"]["configuration"].split())
    assert {flag for flag in flags if "264" in flag or "265" in flag or flag == "--enable-gpl"} == {
        "--enable-libx264",
        "--enable-libx265",
    }
    assert f"FFmpeg {av.ffmpeg_version_info} in PyAV's wheel" in PAGE


def test_row_of_what_is_not_installed_is_kept_for_its_version_alone() -> None:
    locked = (Locked("nvidia-x", "2.0", (), ()), Locked("nvidia-y", "1.0", (), ()), Locked("boto3", "1.0", (), ()))
    before = table(locked, {("nvidia-x", "2.0"): "NVIDIA", ("nvidia-y", "1.0"): "NVIDIA"}, "")
    newer = (locked[0], locked[1]._replace(version="1.1"), locked[2])
    assert table(newer, {("boto3", "1.0"): "Apache-2.0"}, before).splitlines()[2:] == [
        "| nvidia-x | 2.0 | NVIDIA |",
        "| nvidia-y | 1.1 | not read |",
        "| boto3 | 1.0 | Apache-2.0 |",
    ]


def test_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        page("# Licences\n", (), {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "MIT", "License": "BSD"}, ("MIT", True)),
        ({"License": "MIT License"}, ("MIT License", False)),
        ({"License": "UNKNOWN", "Classifier": ["License :: OSI Approved :: BSD License"]}, ("BSD License", False)),
        ({"License": "Copyright\nall of it", "Classifier": ["License :: OSI Approved :: BSD"]}, ("BSD", False)),
        ({"License": "Dual", "Classifier": ["License :: OSI Approved :: A", "License :: B"]}, ("A / B", False)),
        ({"Classifier": ["Topic :: Software Development"]}, ("not stated", False)),
    ],
)
def test_licence_is_read_from_the_field_that_says_most(
    fields: dict[str, object], expected: tuple[str, bool], tmp_path: Path
) -> None:
    given = [(name, one) for name, value in fields.items() for one in (value if isinstance(value, list) else [value])]
    text = "".join(f"{name}: {str(one).replace(chr(10), chr(10) + '        ')}\n" for name, one in given)
    (tmp_path / "METADATA").write_text(f"Metadata-Version: 2.4\nName: x\nVersion: 1\n{text}")
    assert licence(PathDistribution(tmp_path).metadata) == expected
