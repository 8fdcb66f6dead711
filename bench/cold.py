"""What the first job of a process costs, and how near the disk's own rate its weights are read.

    python -m bench.cold                       svi_endframe in fp8, 36 GB of random weights, written once to --weights
    python -m bench.cold --small --repeats 1   the twin's sizes, no card needed: fields and counts, no seconds
    python -m bench.cold --only restarted --processes 5   some of the figures, named as in STARTS below; medians of 5

The worker's own kernels are compiled first, as they are when an image is built (builder/compile_kernels.py). A fresh
process runs a job and --repeats warm ones through handler.run, once for each of STARTS: with an empty folder of
compiled graphs or with the one that was left, with the files in memory, as after a worker's restart, or dropped from
the page cache; and, before its first job is timed, left waiting until libraries and files are there (apps/standby.py),
or warmed up as WORKER_WARM_UP asks. Then `dd` reads the files one after the other, and a process of its own reads them
to where they work, and nothing else. Each figure is said and kept when it is there. The weights stay for next time.
Packages should have their bytecode, as pip leaves it in an image: modules without it are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.first import First
from bench.kept import keep
from bench.processes import ALLOCATOR, ROOT
from bench.say import say

MODE = "svi_endframe"


class Start(NamedTuple):
    """What the process of a first job finds."""

    words: str
    in_memory: bool = False
    """The files: they are not dropped, and whoever came before has read or written them."""
    empty_cache: bool = False
    """An empty folder of compiled graphs. Later starts find what this one leaves."""
    before: tuple[str, ...] = ()


STARTS = {
    "cold_cache_in_memory": Start("cold compile cache, files in memory", in_memory=True, empty_cache=True),
    "cold_cache": Start("cold compile cache", empty_cache=True),
    "warm_cache": Start("warm compile cache"),
    "restarted": Start("the same, files in memory", in_memory=True),
    "waited": Start("the same, the worker waited for it", before=("--before", "standby")),
    "warmed_up": Start("the same, warmed up before it came", before=("--before", "warm-up")),
}
DISK = "disk"
"""The figure of `dd` and of the reader by itself."""


def main() -> int:
    args = _arguments().parse_args()
    if args.child is not None:
        print(json.dumps({"bake": _bake, "read": _read, "jobs": _jobs}[args.child](args)))
        return 0
    with tempfile.TemporaryDirectory(prefix="cold-") as scratch:
        return _measure_all(args, Path(scratch))


def _measure_all(args: argparse.Namespace, scratch: Path) -> int:
    """A figure that cannot be had leaves the others to be measured."""
    args.cache_dir = args.cache_dir or scratch / "graphs"
    files = [Path(name) for name in _child(args, "bake", scratch)["files"]]
    result: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in files)}
    figures: dict[str, Callable[[], Any]] = {
        name: partial(_first_jobs, args, scratch, start, files) for name, start in STARTS.items()
    }
    figures[DISK] = lambda: _disk(args, scratch, files)
    wanted = args.only or figures
    for name in wanted:
        try:
            result[name] = figures[name]()
        except subprocess.CalledProcessError as error:
            say(f"{name}: {error}")
            continue
        keep(args.json, result)
    print(table(result))
    return 1 if set(wanted) - result.keys() else 0


def _first_jobs(args: argparse.Namespace, scratch: Path, start: Start, files: list[Path]) -> list[dict[str, Any]]:
    """Of --processes, one after the other; each is said when it has ended."""
    jobs = []
    for _ in range(args.processes):
        jobs.append(_first_job(args, scratch, start, files))
        say(f"{start.words}: {json.dumps(jobs[-1])}")
    return jobs


def _first_job(args: argparse.Namespace, scratch: Path, start: Start, files: list[Path]) -> dict[str, Any]:
    if not start.in_memory:
        drop(files)
    if start.empty_cache:
        args.cache_dir = Path(tempfile.mkdtemp(prefix="graphs-", dir=scratch))
    return _child(args, "jobs", scratch, *start.before)


def _disk(args: argparse.Namespace, scratch: Path, files: list[Path]) -> dict[str, Any]:
    drop(files)
    dd_s = dd(files)
    drop(files)
    read = {"dd_s": dd_s, **_child(args, "read", scratch)}
    say(f"{DISK}: {json.dumps(read)}")
    return read


def drop(files: list[Path]) -> None:
    """Write the files out and drop them from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def dd(files: list[Path]) -> float:
    """Seconds that `dd` takes for all of them, one after the other."""
    started = time.monotonic()
    for path in files:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M", "status=none"], check=True)
    return time.monotonic() - started


def table(result: dict[str, Any]) -> str:
    """The figures for people, those that are there. A job's parts are those of timings_s."""
    lines = [f"weights                 {result['bytes'] / 1e9:.2f} GB"]
    if DISK in result:
        disk = result[DISK]
        rate, mine = result["bytes"] / 1e9 / disk["dd_s"], disk["bytes"] / 1e9 / disk["read_s"]
        ratio, busy_s = 100 * mine / rate, disk["card_s"]
        lines += [
            f"dd                      {rate:.2f} GB/s",
            f"ours, to where it works {mine:.2f} GB/s, {ratio:.0f} % of dd; bus busy {busy_s:.2f} s",
        ]
    for figure, start in STARTS.items():
        if figure not in result:
            continue
        job, last = First.of(result[figure]), result[figure][-1]
        parts = ", ".join(f"{name} {spent:.2f}" for name, spent in last["timings_s"].items())
        lines += [
            f"first job, {start.words}: {job.seconds:.2f} s ({job.lowest_s:.2f}-{job.highest_s:.2f}, n = "
            f"{job.processes}), {job.seconds / job.warm_s:.2f} times a warm one ({job.warm_s:.2f} s); "
            f"{job.since_start_s:.2f} s after the process was started",
            f"  of the last {parts}; {last['without_bytecode']} of {last['modules']} modules had no bytecode",
        ]
    return "\n".join(lines)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.cold", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "build" / "cold" / "weights")
    parser.add_argument("--only", nargs="+", metavar="FIGURE", choices=[*STARTS, DISK], help="default: all of them")
    parser.add_argument(
        "--cache-dir", type=Path, default=None, help="of compiled graphs, until a start with an empty one"
    )
    parser.add_argument("--precision", default="fp8", choices=["bf16", "fp8", "int8"])
    parser.add_argument("--cap-gib", type=float, default=44.5)
    parser.add_argument("--processes", type=int, default=1, help="for each figure of a first job")
    parser.add_argument("--repeats", type=int, default=3, help="warm jobs after each first one")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--twins", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "cold" / "cold.json")
    parser.add_argument("--child", choices=["bake", "read", "jobs"], help=argparse.SUPPRESS)
    parser.add_argument("--before", choices=["standby", "warm-up"], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser


def _child(args: argparse.Namespace, what: str, scratch: Path, *more: str) -> dict[str, Any]:
    """A fresh process; its last line is the answer. It finds no kernel that another one has compiled, as a new
    container would, but in --cache-dir."""
    command = [
        sys.executable, "-m", "bench.cold", "--child", what, "--weights", args.weights, "--twins", args.twins,
        "--precision", args.precision, "--cap-gib", str(args.cap_gib), "--repeats", str(args.repeats),
        "--cache-dir", args.cache_dir, "--started", str(time.monotonic()), *(["--small"] if args.small else []), *more,
    ]  # fmt: skip
    environment = {
        **os.environ,
        **ALLOCATOR,
        "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="inductor-", dir=scratch),
        "TRITON_CACHE_DIR": tempfile.mkdtemp(prefix="triton-", dir=scratch),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _settings(args: argparse.Namespace, output: Path | None = None) -> Any:
    from engine.settings import Settings

    settings = Settings(
        weights_dir=args.weights, vram_gib=args.cap_gib, precision=args.precision, cache_dir=args.cache_dir
    )
    return settings if output is None else replace(settings, output_dir=output, outbox_dir=output / "outbox")


def _bake(args: argparse.Namespace) -> dict[str, Any]:
    """Write what an image holds: weights, kernels for this card, a list of models.

    What is measured afterwards begins with an empty card and an empty host.
    """
    import torch

    from bench.jobs import located
    from bench.random_bake import write_bake

    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        for script, *asked in (("compile_kernels.py", "--capabilities", capability), ("list_models.py",)):
            subprocess.run([sys.executable, ROOT / "builder" / script, *asked], stdout=sys.stderr, check=True)
    profile = located(MODE, args.twins)[0].baked_in(args.precision)
    return {"files": [str(path) for path in write_bake(profile, args.weights, args.twins, is_small=args.small)]}


def _read(args: argparse.Namespace) -> dict[str, Any]:
    """All components to where they work, the libraries imported before, nothing else at work."""
    import torch

    from engine import weights
    from engine.arrival import Arrival
    from engine.loading import Loader
    from engine.namesake import import_diffusers
    from engine.profiles import resolve
    from engine.readahead import order_of_need
    from schemas.input_schema import parse_request

    import_diffusers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    baked = weights.locate(resolve(parse_request(_job().payload)), _settings(args))
    arrival = Arrival(device)
    loader = Loader(baked.parts(), args.precision, device, arrival)
    names = [part.name for part in baked.profile.components if part.dtype is not None]
    # What would not fit the card beside the rest goes to host memory, as the swap has it.
    fits = args.precision != "bf16"
    loaded = [loader.on_device(name) if fits else loader.in_host_memory(name) for name in order_of_need(names)]
    for each in loaded:
        if each.coming is not None:
            each.coming.wait_whole()
    arrival.close()
    return {"bytes": arrival.tally.bytes_read, "read_s": arrival.tally.read_s, "card_s": arrival.tally.card_s}


def _jobs(args: argparse.Namespace) -> dict[str, Any]:
    """The first job of this process and some more. Nothing heavy is imported before the first."""
    from engine.inputs import CHILDREN
    from engine.spares import SPARES
    from handler import Worker, run, warm_up
    from model_handler import ModelHandler

    job, begun = _job(), time.time()
    changes = job.small if args.small else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(args, Path(folder))
        worker = Worker(settings, ModelHandler(settings))
        SPARES.keep(CHILDREN)  # as handler.main does
        if args.before == "standby":
            _stand_by(worker)
        elif args.before == "warm-up":
            from apps.warm_up_request import warm_up_request

            warm_up({**warm_up_request(MODE), **changes}, worker)
        spent, timings = [], []
        for number in range(1 + args.repeats):
            payload = job.whole(number, changes)
            started = time.monotonic()
            response = run(payload, job_id=f"cold-{number}", worker=worker, progress=_progress())
            spent.append(time.monotonic() - started)
            timings.append(response["timings_s"])
            if number == 0:
                since_start_s, modules = time.monotonic() - args.started, _bytecode()
                worker.models.finish()  # a graph that no job waits for would be compiled beside the next one
        worker.models.unload_all()
    return {
        "first_s": spent[0], "warm_s": spent[1:], "since_start_s": since_start_s, "timings_s": timings[0],
        "warm_timings_s": timings[-1], "loads": worker.models.loads,
        "modules": len(modules), "without_bytecode": len(_written_since(modules, begun)),
    }  # fmt: skip


def _stand_by(worker: Any) -> None:
    """As a worker that waits for its first job long enough."""
    from apps.standby import get_ready
    from engine.readahead import ReadAhead

    get_ready(worker.settings, worker.models)
    if ReadAhead.last is not None:
        ReadAhead.last.join()


def _bytecode() -> list[Path]:
    """Where the bytecode of each imported module is, or would be."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return [Path(spec.cached) for spec in specs if spec is not None and spec.has_location and spec.cached is not None]


def _written_since(files: Iterable[Path], begun: float) -> list[Path]:
    """Those that were not there at `begun` (time.time()): Python may have written them since."""
    return [path for path in files if not path.exists() or path.stat().st_mtime >= begun]


def _progress() -> Any:
    from engine.progress import Progress

    return Progress()


def _job() -> Any:
    from bench.jobs import JOBS

    return JOBS[MODE]


if __name__ == "__main__":
    sys.exit(main())
