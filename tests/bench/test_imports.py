"""Programs of the bench leave it to the worker's own guard to import diffusers first."""

import subprocess
import sys

from bench.processes import ROOT

PROGRAMS = ("acceptance", "cells", "cold", "faults", "modes", "sdxl")


def test_programs_do_not_import_diffusers_before_its_guard_does() -> None:
    """flash-attn-4 by itself makes an unguarded import fail; see engine.namesake."""
    modules = ", ".join(f"bench.{name}" for name in PROGRAMS)
    code = f"import sys, {modules}; print('diffusers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def test_bench_of_a_cold_start_and_the_whole_run_import_nothing_heavy() -> None:
    code = "import sys, bench.acceptance, bench.cold; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
