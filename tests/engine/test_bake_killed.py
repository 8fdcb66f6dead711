"""A bake killed at any point: whole components under final names, and the next run finishes the rest."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine.bake import bake
from engine.hub import FolderHub
from engine.profiles import PROFILES
from engine.settings import ROOT, Settings
from engine.weights import locate

SVI = PROFILES["wan22_i2v_svi"]


def left_behind(root: Path) -> list[str]:
    """Files that are neither a component's nor a manifest."""
    return sorted(path.name for path in root.rglob("*") if ".partial" in path.name or ".staging" in path.parts)


def killed_bake(upstream: Path, root: Path, tensors: int) -> int:
    """Bake in a process of its own that is killed before it writes tensor number `tensors`; the exit status."""
    program = f"""
        import os, pathlib, signal
        from engine import bake, hub, profiles, tensorfile
        count, write = 0, tensorfile.TensorWriter.write
        def dying(self, name, tensor):
            global count
            count += 1
            if count == {tensors}:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, name, tensor)
        tensorfile.TensorWriter.write = dying
        upstream, root = pathlib.Path({str(upstream)!r}), pathlib.Path({str(root)!r})
        bake.bake(profiles.PROFILES["wan22_i2v_svi"], hub.FolderHub(upstream), root, twin=True)
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True).returncode


def whole_after(upstream: Path, root: Path, tensors: int) -> None:
    assert killed_bake(upstream, root, tensors) == -signal.SIGKILL
    assert not (root / "wan22_i2v_svi/manifest.json").exists()
    for folder in root.glob("[!.]*/*"):  # what has its final name is whole, and says so
        lines = json.loads((folder / "component.json").read_bytes())["files"]
        assert all((root / line["path"]).stat().st_size == line["size_bytes"] for line in lines)
    bake(SVI, FolderHub(upstream), root, twin=True)
    locate(SVI, Settings(weights_dir=root)).verify()
    assert left_behind(root) == []


def test_bake_killed_in_the_middle_leaves_nothing_half_done(upstream: Path, tmp_path: Path) -> None:
    whole_after(upstream, tmp_path, 300)


@pytest.mark.soak
@pytest.mark.parametrize("tensors", range(1, 361, 18))
def test_bake_killed_anywhere_leaves_nothing_half_done(upstream: Path, tmp_path: Path, tensors: int) -> None:
    whole_after(upstream, tmp_path, tensors)
