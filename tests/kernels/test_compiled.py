"""What the interpreter lets pass and the compiler does not."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from builder.lockfile import LOCK, read_lock
from engine.settings import ROOT

PASSES = ["_norm_silu_kernel", "_norm_silu_kernel", "_add_kernel", "_double_size_kernel"]
ROUNDINGS = [
    "_plain_round_kernel", "_gelu_round_kernel", *["_norm_round_kernel"] * 3, "_norm_rotate_kernel",
    "_add_gated_kernel",
]  # fmt: skip
WIDENING = ["_widen_kernel"]
TEXT_ATTENTION = ["_survey_kernel", "_root_kernel", "_attend_kernel", "_attend_round_kernel"]
ATTENTION = ["_round_queries_kernel", "_round_keys_kernel", "_lengths_kernel"]


def test_every_kernel_compiles_for_the_cards_that_run_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert made == [
        *(("80", name) for name in PASSES + WIDENING),
        *(("90", name) for name in PASSES + WIDENING),
        *(("89", name) for name in WIDENING + ROUNDINGS + TEXT_ATTENTION),
        *(("90", name) for name in WIDENING + ROUNDINGS + TEXT_ATTENTION),
        *(("90", name) for name in ATTENTION),
    ]


def test_triton_is_the_version_that_the_image_installs() -> None:
    assert [one.version for one in read_lock(LOCK.read_text()) if one.name == "triton"] == [version("triton")]
