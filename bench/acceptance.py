"""Every figure that only a card can tell, in one go on one that is held for an hour and may vanish at any minute.

    python -m bench.acceptance --output build/acceptance                  all, in the order of importance: 55 minutes
    python -m bench.acceptance --output build/acceptance --skip done      after a cut: what has not ended well there
    python -m bench.acceptance --output build/acceptance swap vae         these alone

Each measurement is a program of its own, with a limit in seconds. One that fails or overruns is ended with all that it
started, and the next one finds the card empty. What it prints and finds lies below --output from its first line on, in
a folder for each attempt; table.md there is written anew after each. Exits 1 if one did not end well.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.demands import table
from bench.kept import keep
from bench.processes import ALLOCATOR, ROOT
from bench.say import say

RESULT, ENDED, OUT, ERR = "result.json", "ended.json", "stdout.txt", "stderr.txt"
SETTLE_S = 30.0  # until what was killed has given its memory back
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Child:
    """A program, as it is called after `python -m`; {result} is the file that it keeps its figures in."""

    name: str
    limit_s: float
    call: str

    def command(self, result: Path) -> list[str]:
        return [sys.executable, "-m", *(word.format(result=result) for word in self.call.split())]


# Tests that need a card. Named, because to look for them would import every test, and what those need is not there.
ON_A_CARD = (
    "attention16", "attention8", "bake_eight_bits", "fast_decode", "frames", "passage", "passes", "reading", "replay",
    "rounding", "speed", "standing", "text", "text_attention", "waking", "warm_up", "widening",
)  # fmt: skip
FILES = " ".join(f"tests/engine/test_{name}.py" for name in ON_A_CARD)
SVI = "bench jobs --modes svi_endframe --repeats 5 --layout svi_latent"
FIRST = "bench.cold --repeats 1 --json {result} --only"
CHILDREN = (
    Child("svi", 1200, f"{SVI} flf --arms plain ours --precision fp8 --traces 5 --json {{result}}"),
    Child("restarted", 700, f"{FIRST} cold_cache_in_memory restarted --processes 5"),
    Child("cold", 600, f"{FIRST} cold_cache warm_cache waited warmed_up disk"),
    Child("exact", 420, f"{SVI} --arms ours --precision bf16 --json {{result}}"),
    Child("attention8", 400, f"{SVI} --arms ours --precision fp8 --attention fastest attention8 --json {{result}}"),
    Child("sdxl", 240, "bench jobs --modes image --arms plain ours --precision bf16 --trace --json {result}"),
    Child("modes", 300, "bench.modes --json {result}"),
    Child("lightning", 240, "bench jobs --modes lightning --arms ours --repeats 3 --trace --json {result}"),
    Child("vae", 180, "bench vae --json {result}"),
    Child("swap", 300, "bench swap --blocks 20 --json {result}"),  # all 40 take longer
    Child("tests", 300, f"pytest -m gpu -p bench.card_tests -p no:cacheprovider {FILES}"),
    Child("many", 300, "bench jobs --modes short --arms ours --repeats 50 --trace --json {result}"),
)


@dataclass(frozen=True)
class Ended:
    """How an attempt went. `exit_code`: None if it was killed at its limit. `said`: its last words."""

    exit_code: int | None
    seconds: float
    said: str

    @property
    def is_well(self) -> bool:
        return self.exit_code == 0

    def __str__(self) -> str:
        how = "overran and was killed" if self.exit_code is None else f"exit code {self.exit_code}"
        return f"{'done' if self.is_well else how} after {self.seconds:.0f} s: {self.said}"


def main() -> int:
    args = _arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the clean-up, as Ctrl-C goes
    chosen = [child for child in CHILDREN if not args.names or child.name in args.names]
    if args.skip == "done":
        chosen = [child for child in chosen if not _is_done(args.output / child.name)]
    return run_all(chosen, args.output)


def run_all(children: Sequence[Child], output: Path) -> int:
    """Run them in their order and print the table of what is below `output`; 1 if one did not end well."""
    output = output.resolve()
    is_well = True
    try:
        for child in children:
            say(f"{child.name}: at most {child.limit_s:.0f} s: {child.call}")
            with _adopting_orphans():
                ended = _attempt(child, output)
            say(f"{child.name}: {ended}")
            is_well &= ended.is_well
            (output / "table.md").write_text(f"{table(results(output))}\n")
    finally:
        print(table(results(output)), flush=True)
    return int(not is_well)


def _attempt(child: Child, output: Path) -> Ended:
    """Run it in a new folder below `output`, to its end or its limit. Nothing that it started is left."""
    folder = output / child.name / str(1 + max([0, *map(int, _numbers(output / child.name))]))
    folder.mkdir(parents=True)
    started, exit_code = time.monotonic(), None
    with (folder / OUT).open("wb") as out, (folder / ERR).open("wb") as err:
        process = subprocess.Popen(
            child.command(folder / RESULT), cwd=ROOT, env={**os.environ, **ALLOCATOR, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            with suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(child.limit_s)
            seconds = time.monotonic() - started
        finally:
            _end_group(process)
    ended = Ended(exit_code, seconds, _last_words(folder))
    keep(folder / ENDED, asdict(ended))
    return ended


def results(output: Path) -> dict[str, Any]:
    """Child -> its figures, of the attempt that ended well, else of the newest that has any; those of a child that
    keeps none are how it ended. What has never begun is left out."""
    found: dict[str, Any] = {}
    for child in CHILDREN:
        told = []
        for number in sorted(map(int, _numbers(output / child.name))):
            folder = output / child.name / str(number)
            figures = _read(folder / (RESULT if "{result}" in child.call else ENDED))
            if figures is not None:
                told.append((_is_well(folder), number, figures))
        if told:
            found[child.name] = max(told, key=lambda one: one[:2])[2]
    return found


def _is_done(folder: Path) -> bool:
    return any(_is_well(folder / number) for number in _numbers(folder))


def _is_well(attempt: Path) -> bool:
    ended = _read(attempt / ENDED)
    return ended is not None and Ended(**ended).is_well


def _numbers(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.glob("[0-9]*")) if folder.is_dir() else iter(())


def _read(path: Path) -> Any:
    """What the file holds; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _last_words(folder: Path) -> str:
    """The last line of what it said, then that of its errors."""
    texts = ((folder / name).read_text(errors="replace").strip() for name in (OUT, ERR))
    return " | ".join(text.rpartition("\n")[2][:200] for text in texts if text)


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Be the parent of what a killed child leaves behind, so that its end can be waited for."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group, and wait until they are gone and their memory with them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    until = time.monotonic() + SETTLE_S
    with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even a killed process
        process.wait(SETTLE_S)
    while time.monotonic() < until:
        try:
            gone, _ = os.waitpid(-process.pid, os.WNOHANG)
        except ChildProcessError:
            return
        if not gone:
            time.sleep(0.05)
    say(f"something of process group {process.pid} is still there")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.acceptance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [child.name for child in CHILDREN]
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--skip", choices=["done"], help="done: what has ended well below --output")
    return parser


def _name(word: str) -> str:
    if word not in [child.name for child in CHILDREN]:
        raise argparse.ArgumentTypeError(f"{word!r} is none of them")
    return word


if __name__ == "__main__":
    sys.exit(main())
