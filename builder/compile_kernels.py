"""Compile the worker's own kernels where there is no card, so that no card waits for a compiler.

python builder/compile_kernels.py [--output FOLDER] [--capabilities 8.0 8.9 ...]

The folder is as engine.settings.keep_kernels has it. It must stay where it was written: Triton's lists in it name their
files by where they lie. A process for each capability.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from engine.settings import IMAGE_KERNELS, keep_kernels  # noqa: E402 after the path is set

# The A100, the A40 and its kin, the L40S and its kin, Hopper.
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0")


def main(argv: list[str] | None = None) -> int:
    """Write the kernels; returns the exit status.

    Raises:
        Exception: whatever a compiler has to say.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGE_KERNELS, help="default: kernels")
    parser.add_argument("--capabilities", nargs="+", type=_capability, default=[*map(_capability, CAPABILITIES)])
    options = parser.parse_args(argv)
    folder = options.output.resolve()
    if not keep_kernels(folder):
        parser.error(f"{folder} cannot be written")
    from engine.absent_card import compile_kernels, has_own_attention
    from engine.hopper_kernels import ARCHITECTURE

    script = ROOT / "builder" / "compile_hopper.py"
    command = ["env", f"CUTE_DSL_ARCH={ARCHITECTURE}", sys.executable, str(script), str(folder / "cute")]
    is_for_hopper = any(map(has_own_attention, options.capabilities))
    # Forked: what was imported above need not be imported again.
    with ProcessPoolExecutor(len(options.capabilities) + is_for_hopper, get_context("fork")) as pool:
        hopper = pool.submit(subprocess.call, command) if is_for_hopper else None
        made = pool.map(compile_kernels, options.capabilities)
        for capability, names in zip(options.capabilities, made, strict=True):
            print(f"{capability[0]}.{capability[1]}: {len(names)} kernels of Triton", flush=True)
    return 0 if hopper is None else hopper.result()


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


if __name__ == "__main__":
    sys.exit(main())
