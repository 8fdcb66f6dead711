"""Compile our attention kernels for a Hopper that is not there, into a folder where engine.hopper_kernels finds them.

CUTE_DSL_ARCH=sm_90a python builder/compile_hopper.py FOLDER

A process of its own, begun by builder/compile_kernels.py: CuTe asks for the architecture when it is imported, and does
not survive Python's last steps where there is no driver. Where CuTe is not installed, that is said and nothing written.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from engine.hopper_kernels import ARCHITECTURE, KERNELS, compile_kernel, keep  # noqa: E402 after the path is set


def main() -> None:
    """Write the libraries, and end the process.

    Raises:
        Exception: a kernel does not compile.
    """
    try:
        import_module("cutlass")
    except Exception as error:  # noqa: BLE001 a foreign package may raise anything while it is imported
        print(f"{ARCHITECTURE}: no attention kernels, for CuTe is not to be imported ({type(error).__name__}: {error})")
        return
    for name in KERNELS:
        keep(compile_kernel(name), Path(sys.argv[1]), name).chmod(0o644)  # whoever runs the worker is to read it
    print(f"{ARCHITECTURE}: {len(KERNELS)} attention kernels of CuTe", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
