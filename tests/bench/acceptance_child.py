"""A program for bench.acceptance to run: prints, keeps a figure, fails, or stays with a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    kind, *rest = sys.argv[1:]
    print(f"{kind} begins")  # noqa: T201 what it is for
    if kind == "figures":
        Path(rest[0]).write_text(json.dumps([{"seen": os.environ["PYTORCH_CUDA_ALLOC_CONF"]}]))
        print("one figure")  # noqa: T201
    if kind == "fails":
        print("no card", file=sys.stderr)  # noqa: T201
        return 3
    if kind == "stays":
        asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(rest[0]).write_text(json.dumps({"pid": asleep.pid}))
        time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
