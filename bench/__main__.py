"""Measure this worker against plain diffusers, on one card, in one run.

    python -m bench                                         svi_endframe, plain and ours, and the card's ceilings
    python -m bench jobs --modes image video --repeats 5    other jobs
    python -m bench ladder kernels                          one forward, lever by lever; where its time goes
    python -m bench swap vae accuracy                       expert swap; VAE; what 8 bits cost in accuracy
    python -m bench jobs --arms ours --repeats 50           does memory grow?
    python -m bench --cpu-counts                            counts on the tiny twins, no card needed

Weights are random and full size, tokenizers come from the tiny twins (`make twins`). Every cell runs in a process of
its own, below --cap-gib of the card's memory: capacity of a 48 GB card, speed of this one. The table is printed last,
all numbers lie beside it in --json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.jobs import CAP_GIB, JOBS

ROOT = Path(__file__).resolve().parent.parent
WHAT = ("jobs", "ladder", "kernels", "swap", "vae", "accuracy")
UNCAPPED = ("swap", "accuracy")  # they compare with two bf16 experts on one card, and keep every layer's inputs


def main() -> int:
    args = _arguments().parse_args()
    if args.cell:
        return _child(json.loads(args.cell), args.json)
    if args.cpu_counts:
        from bench.counts import count_all

        print(json.dumps(count_all(args.twins), indent=1))
        return 0
    results, failed = [], False
    for cell in _cells(args):
        print(f"bench: {cell['what']} {cell.get('mode', '')}", file=sys.stderr, flush=True)
        result = _in_a_process(cell)
        failed |= result is None
        results += [] if result is None else [result]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))
    from bench.table import render

    print(render(results))
    return int(failed)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["jobs"], help=f"of {', '.join(WHAT)}")
    parser.add_argument("--modes", nargs="+", choices=list(JOBS), default=["svi_endframe"])
    parser.add_argument("--arms", nargs="+", choices=["plain", "ours"], default=["plain", "ours"])
    parser.add_argument("--repeats", type=int, default=5, help="timed jobs, after one that loads and warms up")
    parser.add_argument("--precision", nargs="+", default=["fp8"], help="bf16, fp8, int8: one `ours` arm for each")
    parser.add_argument("--attention", default=None, help="kernel of `ours`; default: the fastest that works")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=None, help="compiled graphs of an earlier run")
    parser.add_argument("--count-bytes", action="store_true", help="one more job an arm, under the profiler")
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB)
    parser.add_argument("--twins", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json")
    parser.add_argument("--cpu-counts", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def _cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"twins": str(args.twins), "cap_gib": args.cap_gib, "repeats": args.repeats}
    job = {**common, "attention": args.attention, "compile": not args.no_compile, "count_bytes": args.count_bytes}
    job["cache_dir"] = None if args.cache_dir is None else str(args.cache_dir)
    cells: list[dict[str, Any]] = [{"what": "ceilings", **common}]
    for what in args.what:
        if what not in WHAT:
            raise SystemExit(f"bench: {what} is none of {', '.join(WHAT)}")
        if what != "jobs":
            cells.append({"what": what, **common, "cap_gib": None if what in UNCAPPED else args.cap_gib})
            continue
        for mode in args.modes:
            if "plain" in args.arms:
                cells.append({"what": "plain", "mode": mode, "precision": "bf16", **job})
            if "ours" in args.arms:
                cells += [{"what": "ours", "mode": mode, "precision": p, **job} for p in args.precision]
    return cells


def _in_a_process(cell: dict[str, Any]) -> dict[str, Any] | None:
    """A fresh process: its memory, its compiler, its clocks. None, and the reason on stderr, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # Fragments would cost 1 to 2 GiB of the cap; the worker's image sets the same.
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        command = [sys.executable, "-m", "bench", "--cell", json.dumps(cell), "--json", str(answer)]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code != 0:
            print(f"bench: {cell['what']} failed with exit code {code}", file=sys.stderr)
            return None
        return dict(json.loads(answer.read_text()))


def _child(cell: dict[str, Any], answer: Path) -> int:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench: seconds are measured on a CUDA card; --cpu-counts needs none")
    from bench.cells import run

    answer.write_text(json.dumps({**cell, **run(cell)}, default=_plain))
    return 0


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
