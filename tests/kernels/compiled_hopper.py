"""Compile an attention kernel for a Hopper, here, where there is none, and say what became of it: a line of JSON.

    CUTE_DSL_ARCH=sm_90a CUTE_DSL_KEEP=cubin CUTE_DSL_DUMP_DIR=FOLDER python -m tests.kernels.compiled_hopper attention8

A process of its own: it ends without Python's last steps, which CuTe does not survive where there is no driver.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import triton

from engine.hopper_kernels import compile_kernel


def main() -> None:
    compile_kernel(sys.argv[1])
    (binary,) = Path(os.environ["CUTE_DSL_DUMP_DIR"]).glob("*.cubin")
    instructions = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+(?:\.\w+)?)", _told(binary, "-sass"))
    print(json.dumps({"resources": _told(binary, "-res-usage"), "instructions": Counter(instructions)}))  # noqa: T201
    sys.stdout.flush()
    os._exit(0)


def _told(binary: Path, what: str) -> str:
    """By the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, binary], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
