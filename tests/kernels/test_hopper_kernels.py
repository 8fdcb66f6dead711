"""Compiled kernels kept for the next process, which then needs no CuTe; each process is one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from engine import hopper_kernels
from engine.settings import CUTE_DIR, ROOT

KEPT_AT = Path(triton.__file__).parents[1]  # by `make kernels`
CUTE = KEPT_AT / "nvidia_cutlass_dsl" / "dsl_packages"
# Called with what lies on no card, a kernel says what it wants. CuTe does not survive Python's last steps without one.
ASK = """
import logging, os, sys, torch
logging.basicConfig()
from engine.hopper_kernels import hopper_kernel
x = torch.zeros(4, 2, 128, dtype=torch.bfloat16)
try:
    hopper_kernel("attention16")(x, x, x, x, torch.zeros(2), torch.zeros(2))
except ValueError as error:
    print(error)
print("cutlass" in sys.modules, flush=True)
os._exit(0)
"""
Ask = Callable[..., tuple[list[str], str]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Ask for the kernel in a new process, with or without CuTe; what it said, and to stderr."""

    def in_process(*paths: Path, **environment: str) -> tuple[list[str], str]:
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, KEPT_AT, *paths]))}
        wanted = {CUTE_DIR: str(tmp_path / "kept"), "CUTE_DSL_ARCH": "sm_90a"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", ASK],
            cwd=tmp_path, env=kept | path | wanted | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.splitlines(), done.stderr

    return in_process


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command of the Dockerfile leaves of the attention kernels."""
    folder = tmp_path_factory.mktemp("image") / "kept"
    command = [sys.executable, "builder/compile_hopper.py", folder]
    wanted = {"CUTE_DSL_ARCH": hopper_kernels.ARCHITECTURE, "PYTHONPATH": os.pathsep.join([str(KEPT_AT), str(CUTE)])}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | wanted, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "sm_90a: 2 attention kernels of CuTe\n"), done.stderr
    return folder


def test_kernel_that_the_image_was_built_with_needs_no_cute(image: Path, ask: Ask) -> None:
    assert {file.stat().st_mode & 0o777 for file in image.iterdir()} == {0o644}
    loaded, said = ask(**{CUTE_DIR: str(image)})
    assert loaded[-1] == "False"
    assert "expected device_type=cuda" in loaded[0]
    assert not said


def test_damaged_kernel_is_compiled_anew_and_the_next_process_has_it_without_cute(
    image: Path, ask: Ask, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (whole,) = image.glob("attention16-*")
    file = tmp_path / "kept" / whole.name
    file.write_bytes(whole.read_bytes()[:5000])  # to load it would end the process
    nothing, said = ask()
    assert not nothing
    assert "could not be read (ValueError)" in said
    assert "No module named 'cutlass'" in said
    compiled, _ = ask(CUTE)
    assert compiled[-1] == "True"
    loaded, said = ask()
    assert loaded[-1] == "False"
    assert "expected device_type=cuda" in loaded[0]
    assert not said


def test_library_that_does_not_load_is_as_good_as_none(image: Path, ask: Ask, tmp_path: Path) -> None:
    (whole,) = image.glob("attention16-*")
    stem, content = whole.stem.rpartition("-")[0], b"no library"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / f"{stem}-{hopper_kernels._digest(content)}.so").write_bytes(content)
    nothing, said = ask()
    assert not nothing
    assert "could not be read (RuntimeError)" in said
    assert "No module named 'cutlass'" in said


def test_kernel_that_cannot_be_linked_is_not_kept_and_works(ask: Ask, tmp_path: Path) -> None:
    compiled, said = ask(CUTE, PATH="")
    assert "expected device_type=cuda" in compiled[0]
    assert "could not be kept (FileNotFoundError)" in said
    assert not (tmp_path / "kept").exists()


def test_kernel_that_cannot_be_exported_is_lost_to_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled:
        def export_to_c(self, **_: str) -> None:
            raise LookupError("an error of the compiler's own")

    made = Compiled()
    monkeypatch.setitem(sys.modules, "cutlass", ModuleType("cutlass"))
    monkeypatch.setattr(sys.modules["cutlass"], "cute", None, raising=False)
    monkeypatch.setattr(hopper_kernels, "compile_kernel", lambda _name: made)
    monkeypatch.setenv(CUTE_DIR, str(tmp_path / "kept"))
    assert hopper_kernels.hopper_kernel.__wrapped__("attention16") is made
    assert "could not be kept (LookupError)" in caplog.text
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("of", ["attention16_hopper", "attention_weights", "attention_reach"])
def test_kernel_of_another_source_is_another_file(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    for file in (ROOT / "engine").glob("attention*.py"):
        (engine / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(hopper_kernels, "__file__", str(engine / "hopper_kernels.py"))
    before = {name: hopper_kernels._stem(name) for name in hopper_kernels.KERNELS}
    (engine / f"{of}.py").write_text("changed")
    after = {name: hopper_kernels._stem(name) for name in hopper_kernels.KERNELS}
    assert after["attention16"] != before["attention16"]
    assert (after["attention8"] == before["attention8"]) is (of == "attention16_hopper")


def test_kernel_of_another_version_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hopper_kernels._stem("attention16")
    monkeypatch.setattr(hopper_kernels, "version_of", lambda _package: "another")
    assert hopper_kernels._stem("attention16") != before


def test_kernel_has_one_name_where_there_is_no_card_and_on_every_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hopper_kernels._stem("attention16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for card in ("an H100", "an H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, card=card: card)
        assert hopper_kernels._stem("attention16") == before
