"""Measure this worker against plain diffusers, on one card, in one run.

    python -m bench                                         svi_endframe: plain and ours take turns; the card's ceilings
    python -m bench jobs --modes image video --repeats 5    other jobs
    python -m bench jobs --layout svi_latent flf window     ways of the same 81 frames; flf is the arithmetic of plain
    python -m bench ladder kernels                          one forward, lever by lever; where its time goes
    python -m bench swap --bus-gb-s 25                      expert swap, here as behind a slower bus
    python -m bench vae accuracy                            VAE; what 8 bits cost in accuracy
    python -m bench work --precision fp8 bf16               memory of a job's spans, for the planner's figures
    python -m bench jobs --arms ours --repeats 50           does memory grow?
    python -m bench jobs --size twin                        the same protocol with the tiny twins, on any machine
    python -m bench.acceptance --output build/acceptance    all that is asked for on a card, in one go
    python -m bench.projected                               what it might take on 48 GB cards
    python -m bench --cpu-counts                            counts on the tiny twins, no card needed

Weights are random and full size, tokenizers come from the tiny twins (`make twins`). Every arm is a process of its
own, below --cap-gib of the card's memory: capacity of a 48 GB card, speed of this one. Every job leaves a line on
stderr and its numbers in --json at once, so a run that is cut loses nothing. The table is printed last.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from bench.jobs import CAP_GIB, JOBS, LAYOUTS
from bench.kept import keep
from bench.processes import ROOT, once
from bench.rounds import Rounds, Row, groups
from bench.say import say
from bench.smi import card_bytes
from engine import host_memory

WHAT = ("jobs", "ladder", "kernels", "swap", "vae", "accuracy", "work")
UNCAPPED = ("swap", "accuracy", "work")  # two bf16 experts at once, every layer's inputs, or the peaks themselves
WITH_CEILINGS = ("jobs", "kernels")  # the ladder measures its own
WITH_TWINS = ("jobs", "work")
Cell = dict[str, Any]


def main() -> int:
    args = _arguments().parse_args()
    if args.cell:
        return _child(json.loads(args.cell), args.answers)
    if args.cpu_counts:
        from bench.counts import count_all

        print(json.dumps(count_all(args.twins), indent=1))
        return 0
    singles, rows = _cells(args), _rows(args)
    results: list[Cell] = []
    failed = False

    def write(of_jobs: list[Cell]) -> None:
        keep(args.json, [*results, *of_jobs])

    for cell in singles:
        say(f"{cell['what']} {cell.get('precision') or ''}")
        result = once(cell)
        failed |= result is None
        results += [] if result is None else [result]
        write([])
    if rows:
        done = _run_jobs(rows, args, write)
        failed |= bool(done.failed)
        results += [row.result() for row in done.rows if "samples" in row.found]
    from bench.table import render

    print(render(results))
    return int(failed)


def _run_jobs(rows: list[Row], args: argparse.Namespace, write: Any) -> Rounds:
    together: list[list[Cell]] = []
    for mode in args.modes:
        cells = [row.cell for row in rows if row.cell["mode"] == mode]
        made, why = groups(cells, host_memory.free_bytes(), card_bytes())
        say(f"{mode}: {why or 'all arms are alive at once and take turns'}")
        together += made
    rounds = Rounds(rows, write, traces=args.traces)
    rounds.run(together, args.repeats, args.trace)
    return rounds


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["jobs"], help=f"of {', '.join(WHAT)}")
    parser.add_argument("--modes", nargs="+", choices=list(JOBS), default=["svi_endframe"])
    parser.add_argument("--arms", nargs="+", choices=["plain", "ours"], default=["plain", "ours"])
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=["svi_latent", "flf"])
    parser.add_argument("--steps", type=int, help="of a video job; default: 6, for `video` 4 of its usual 40")
    parser.add_argument("--repeats", type=int, default=5, help="timed jobs, after one that loads and warms up")
    parser.add_argument(
        "--precision", nargs="+", choices=["bf16", "fp8", "int8"], default=["fp8"], help="one `ours` arm for each"
    )
    parser.add_argument(
        "--attention", nargs="+", default=["fastest"],
        help="one `ours` arm for each: a kernel's name, or fastest (the default): the fastest exact one that works",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--cache-dir", type=Path, help="compiled graphs of an earlier run")
    parser.add_argument(
        "--trace", nargs="*", choices=["plain", "ours"], default=["ours"],
        help="arms that run --traces more jobs under the profiler, and ours as many through the whole worker",
    )  # fmt: skip
    parser.add_argument("--traces", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="of each transformer in ladder, kernels, swap: a shallower model")
    parser.add_argument("--bus-gb-s", type=float, help="of swap: emulate a slower bus; PCIe 4 has 25")
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB)
    parser.add_argument("--size", choices=["full", "twin"], default="full")
    parser.add_argument("--twins", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json")
    parser.add_argument("--cpu-counts", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    return parser


def _cells(args: argparse.Namespace) -> list[Cell]:
    """What is measured in one go, each in a process of its own."""
    for what in args.what:
        if what not in WHAT:
            raise SystemExit(f"bench: {what} is none of {', '.join(WHAT)}")
        if args.size == "twin" and what not in WITH_TWINS:
            raise SystemExit(f"bench: {what} is about the full size; --size twin is for {' and '.join(WITH_TWINS)}")
    common = {**_common(args), "blocks": args.blocks, "bus_gb_s": args.bus_gb_s}
    is_timed = args.size == "full" and any(what in WITH_CEILINGS for what in args.what)
    cells: list[Cell] = [{"what": "ceilings", **common}] if is_timed else []
    for what in args.what:
        if what == "work":
            cells += [
                {"what": what, **common, **_levers(args, kernel), "cap_gib": None, "mode": "svi_endframe",
                 "layouts": args.layout, "precision": precision, "compile": is_compiled}
                for precision in args.precision for kernel in args.attention for is_compiled in (False, True)
            ]  # fmt: skip
        elif what != "jobs":
            cells.append({"what": what, **common, "cap_gib": None if what in UNCAPPED else args.cap_gib})
    return cells


def _rows(args: argparse.Namespace) -> list[Row]:
    """The lines of the jobs' tables: arms, and for ours the variants of the request that one process serves."""
    if "jobs" not in args.what:
        return []
    rows = []
    for mode in args.modes:
        job = {"mode": mode, **_common(args), **_levers(args)}
        layouts = args.layout if mode == "svi_endframe" else [None]
        if "plain" in args.arms:
            rows.append(Row({"what": "plain", **job, "precision": "bf16"}, None, args.steps))
        if "ours" in args.arms:
            for precision, kernel in product(args.precision, args.attention):
                cell = {"what": "ours", **job, **_levers(args, kernel), "precision": precision}
                rows += [Row(cell, layout, args.steps) for layout in layouts]
    for row in rows:
        try:
            JOBS[row.cell["mode"]].changes(row.layout, row.steps)
        except ValueError as error:
            raise SystemExit(f"bench: {error}") from error
    return rows


def _common(args: argparse.Namespace) -> Cell:
    return {"twins": str(args.twins), "cap_gib": args.cap_gib, "size": args.size}


def _levers(args: argparse.Namespace, kernel: str = "fastest") -> Cell:
    cache_dir = None if args.cache_dir is None else str(args.cache_dir)
    attention = None if kernel == "fastest" else kernel
    return {"attention": attention, "compile": not args.no_compile, "cache_dir": cache_dir}


def _child(cell: Cell, answers: int) -> int:
    import torch

    if cell["size"] == "full" and not torch.cuda.is_available():
        raise SystemExit("bench: seconds are measured on a CUDA card; --cpu-counts and --size twin need none")
    from bench.cells import serve

    with open(answers, "w") as pipe:
        serve(cell, sys.stdin, pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
