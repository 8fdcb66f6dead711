"""What the image's build compiles, and that a worker's launches find it.

It is also where the compiler sees every kernel, which refuses what the interpreter lets pass.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from builder.lockfile import LOCK, read_lock
from engine.settings import ROOT

# Of a decoder's three widths one has its frames placed side by side too; of the encoder's weights there are two widths.
PASSES = {"_norm_silu_kernel": 8, "_add_kernel": 3, "_double_size_kernel": 3}
INT8, BOTH = {"_widen_kernel": 2}, {"_widen_kernel": 4}
ROUNDINGS = {
    "_plain_round_kernel": 1, "_gelu_round_kernel": 1, "_norm_round_kernel": 3, "_norm_rotate_kernel": 1,
    "_add_gated_kernel": 1,
}  # fmt: skip
TEXT_ATTENTION = {"_survey_kernel": 1, "_root_kernel": 1, "_attend_kernel": 1, "_attend_round_kernel": 1}
ATTENTION = {"_round_queries_kernel": 1, "_round_keys_kernel": 1, "_lengths_kernel": 1}
EXPECTED = {
    80: PASSES | INT8,
    86: PASSES | INT8,
    89: PASSES | BOTH | ROUNDINGS | TEXT_ATTENTION,
    90: PASSES | BOTH | ROUNDINGS | TEXT_ATTENTION | ATTENTION,
}


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command of the Dockerfile writes, where CuTe is not installed."""
    folder = tmp_path_factory.mktemp("image") / "kernels"
    done = python("builder/compile_kernels.py", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    counts = [f"{card / 10}: {sum(kernels.values())} kernels of Triton" for card, kernels in EXPECTED.items()]
    *said, _ = sorted(done.stdout.splitlines())
    assert said == counts
    assert "sm_90a: no attention kernels, for CuTe is not to be imported (ModuleNotFoundError" in done.stdout
    return folder


def test_each_card_has_the_kernels_that_it_can_run(image: Path) -> None:
    made = {card: Counter[str]() for card in EXPECTED}
    for entry in (image / "triton").iterdir():
        (binary,) = entry.glob("*.cubin")
        made[json.loads(binary.with_suffix(".json").read_bytes())["target"]["arch"]][binary.stem] += 1
    assert made == EXPECTED


def test_self_tests_and_jobs_find_every_kernel_and_another_width_does_not(image: Path, tmp_path: Path) -> None:
    done = python("-m", "tests.kernels.launches", str(image), str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)
    assert launches.pop("another width") == [1, 1]
    assert {name: compiled for name, (_, compiled) in launches.items()} == dict.fromkeys(launches, 0)
    assert min(starts for starts, _ in launches.values()) >= 4


def test_kernel_that_does_not_compile_fails_the_build(tmp_path: Path) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "release 13.0, V13.0.1" ;; *) exit 1 ;; esac\n')
    assembler.chmod(0o755)
    words = ("builder/compile_kernels.py", "--output", str(tmp_path / "kernels"), "--capabilities", "8.0")
    done = python(*words, TRITON_PTXAS_PATH=str(assembler))
    assert done.returncode == 1
    assert "PTXASError" in done.stderr


def test_triton_is_the_version_that_the_image_installs() -> None:
    assert [one.version for one in read_lock(LOCK.read_text()) if one.name == "triton"] == [version("triton")]
