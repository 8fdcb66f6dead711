"""What an image was built with, in the folder where a worker keeps kernels: all of it or nothing, and nothing twice."""

from pathlib import Path
from threading import Barrier, Thread

import pytest

from engine import image_kernels
from engine.image_kernels import lend

FIRST, SECOND = "ABC", "DEF"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two entries as Triton writes them, and a library."""
    for entry in (FIRST, SECOND):
        folder = tmp_path / "image" / "triton" / entry
        folder.mkdir(parents=True)
        (folder / "kernel.cubin").write_bytes(b"code")
        (folder / "__grp__kernel.json").write_text(f'{{"child_paths": {{"kernel.cubin": "{folder}/kernel.cubin"}}}}')
    (tmp_path / "image" / "cute").mkdir()
    (tmp_path / "image" / "cute" / "attention-1.so").write_bytes(b"library")
    return tmp_path / "image"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lent(image: Path) -> dict[str, bytes]:
    wanted = {name: content for name, content in files(image).items() if not name.endswith(".cubin")}
    assert len(wanted) == 3
    return wanted


def test_new_folder_gets_the_lists_and_the_libraries(image: Path, tmp_path: Path) -> None:
    lend(image, tmp_path / "new" / "cache")
    assert files(tmp_path / "new" / "cache") == lent(image)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new" / "cache" / "triton").iterdir()} == {0o755}


def test_what_is_there_stays_as_it_is(image: Path, tmp_path: Path) -> None:
    own = {f"triton/{FIRST}/__grp__kernel.json": b"of its own", "cute/attention-1.so": b"another", "flash4/x": b"x"}
    for name, content in own.items():
        (tmp_path / "cache" / name).parent.mkdir(parents=True)
        (tmp_path / "cache" / name).write_bytes(content)
    lend(image, tmp_path / "cache")
    assert files(tmp_path / "cache") == lent(image) | own
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "cache").rglob("*"))]
    lend(image, tmp_path / "cache")
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "cache").rglob("*"))] == before


@pytest.mark.parametrize("where", ["image", "image/../image", "elsewhere"])
def test_same_folder_or_no_image_is_nothing_to_do(where: str, image: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    if where == "elsewhere":
        lend(tmp_path / where, tmp_path / "cache")
    else:
        lend(image, tmp_path / where)
    assert files(tmp_path) == before


def test_image_without_attention_kernels_lends_the_others(image: Path, tmp_path: Path) -> None:
    (image / "cute" / "attention-1.so").unlink()
    (image / "cute").rmdir()
    lend(image, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["triton"]


def test_workers_that_start_at_once_leave_each_entry_whole_and_nothing_else(image: Path, tmp_path: Path) -> None:
    begin = Barrier(8)

    def start() -> None:
        begin.wait()
        lend(image, tmp_path / "cache")

    workers = [Thread(target=start) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert files(tmp_path / "cache") == lent(image)


def test_entry_that_another_worker_begins_in_between_is_his(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = image_kernels._lacking

    def then_another_begins(of: Path, folder: Path) -> list[Path]:
        found = lacking(of, folder)
        if of.name == "triton":
            (folder / FIRST).mkdir()
            (folder / FIRST / "kernel.source").touch()
        return found

    monkeypatch.setattr(image_kernels, "_lacking", then_another_begins)
    lend(image, tmp_path / "cache")
    assert sorted(files(tmp_path / "cache")) == [
        "cute/attention-1.so", f"triton/{FIRST}/kernel.source", f"triton/{SECOND}/__grp__kernel.json"
    ]  # fmt: skip
    assert not caplog.records


def test_full_folder_is_said_and_holds_no_half_entry(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_from: Path, to: Path) -> None:
        to.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_kernels.shutil, "copyfile", full)
    lend(image, tmp_path / "cache")
    assert files(tmp_path / "cache") == {}
    assert list((tmp_path / "cache" / "triton").iterdir()) == []
    assert "could not be put into" in caplog.text
