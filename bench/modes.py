"""Two modes by turns on a card that holds one: what a change costs once both have been there, and what it leaves.

    python -m bench.modes                       svi_endframe in fp8 and image, random weights, 44.5 GiB: 3 minutes
    python -m bench.modes --small --rounds 1    the twins, no card needed: counts and equality, no seconds

Each round is a job of the one and a job of the other, through ModelHandler. The first round draws the weights and, for
the second mode, page-locks host memory for the first; from the second round on every load is a copy from there. The
same request must give the same pixels, the card's memory must be that of the first stay within 64 MiB, and with both
parked nothing may be left. Exits 1 if not.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.jobs import CAP_GIB, JOBS, located
from bench.kept import keep
from bench.processes import ALLOCATOR, ROOT
from bench.say import say
from bench.timing import MIB
from engine.namesake import import_diffusers
from engine.outputs import Frames
from engine.progress import Progress
from engine.settings import Settings
from model_handler import ModelHandler

MODES = ("svi_endframe", "image")
STEPS = {"svi_endframe": 2, "video": 1, "image": None}  # the change is what is measured: few forwards after it
TOLERANCE_MIB = 64


@dataclass(frozen=True)
class Visit:
    """One job of a mode that was not on the card before it."""

    mode: str
    round: int
    is_return: bool
    seconds: float
    load_s: float
    make_room_s: float
    """Of `load_s`: the other mode leaves the card; the first time its host memory is page-locked too."""
    to_card_s: float
    """Of `load_s`: the copy of this one, from host memory."""
    to_host_gb: float
    """Of the other one, in this job."""
    to_card_gb: float
    card_mib: float
    """Held by tensors after the job."""
    sha256: str
    """Of the pixels before they are encoded."""


class Models(ModelHandler):
    """Knows what its last job made."""

    sha256 = ""

    def _write(self, output: Any, *args: Any) -> Any:
        digest = hashlib.sha256()
        if isinstance(output, Frames):
            output = replace(output, chunks=_digested(output.chunks, digest))
        else:
            for picture in output.pictures:
                digest.update(picture.tobytes())
        made = super()._write(output, *args)
        self.sha256 = digest.hexdigest()
        return made


def _digested(chunks: Any, digest: Any) -> Iterator[Any]:
    try:
        for chunk in chunks:
            digest.update(chunk.tobytes())
            yield chunk
    finally:
        getattr(chunks, "close", lambda: None)()  # a decoder that is left early frees its card


class Turns:
    """One ModelHandler, and the parts of both modes."""

    def __init__(self, args: argparse.Namespace) -> None:
        import_diffusers()
        from bench.ours import CardParts  # imports diffusers' models

        self._small = args.small
        self._parts: dict[str, Any] = {}
        for mode in args.modes:
            profile, rest = located(mode, args.twins)
            self._parts[mode] = rest if args.small else CardParts(profile, rest)
        self.models = Models(Settings(vram_gib=args.cap_gib, precision=args.precision, cache_dir=args.cache_dir))

    def job(self, mode: str) -> tuple[Progress, float, str]:
        """The mode's request, the same each time; its timings, seconds, and the digest of its pixels."""
        parts, job = self._parts[mode], JOBS[mode]
        task = job.task(parts.profile, 0, job.changes(None, STEPS[mode], is_small=self._small))
        progress, started = Progress(), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.models.generate(task, parts, Path(folder), progress)
        return progress, time.perf_counter() - started, self.models.sha256

    def visit(self, mode: str, number: int) -> Visit:
        lot, loads = self.models.lot, self.models.loads
        before = lot.bytes_to_host, lot.bytes_to_card
        progress, seconds, sha256 = self.job(mode)
        if not number:  # the first job of a process runs in part before its blocks are compiled
            _, _, sha256 = self.job(mode)
        spent = progress.timings_s
        return Visit(
            mode, number, self.models.loads == loads, seconds, spent["load"],
            spent.get("load_make_room", 0.0), spent.get("load_to_card", 0.0),
            (lot.bytes_to_host - before[0]) / 1e9, (lot.bytes_to_card - before[1]) / 1e9, card_mib(), sha256,
        )  # fmt: skip

    def park_all(self) -> float:
        """Everybody leaves the card; MiB left on it."""
        while self.models._loaded:
            self.models._evict_oldest(Progress())
        return card_mib()


def main() -> int:
    args = _arguments().parse_args()
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("bench: seconds are measured on a CUDA card; --small needs none")
    os.environ.update(ALLOCATOR)  # read when the card is first used, which is below
    base_mib = card_mib()
    turns, visits = Turns(args), []
    for number in range(args.rounds):
        for mode in args.modes:
            visits.append(turns.visit(mode, number))
            say(line(visits[-1]))
            keep(args.json, {"visits": [asdict(visit) for visit in visits], "problems": ["cut short"]})
    left_mib = turns.park_all() - base_mib
    turns.models.unload_all()
    problems = wrong(visits, left_mib)
    result = {"visits": [asdict(visit) for visit in visits], "left_mib": left_mib, "problems": problems}
    keep(args.json, result)
    print("\n".join([*map(line, visits), f"with both parked, {left_mib:.0f} MiB are left on the card", *problems]))
    return 1 if problems else 0


def line(visit: Visit) -> str:
    """One visit for people."""
    rate = f", {visit.to_card_gb / visit.to_card_s:.1f} GB/s" if visit.to_card_s else ""
    how = f"back: {visit.to_card_gb:.2f} GB in {visit.to_card_s:.2f} s{rate}" if visit.is_return else "loaded"
    return (
        f"round {visit.round} {visit.mode:<13} load {visit.load_s:.2f} s: room made in {visit.make_room_s:.2f} s "
        f"({visit.to_host_gb:.2f} GB to the host), {how}; job {visit.seconds:.2f} s; {visit.card_mib:.0f} MiB after it"
    )


def wrong(visits: list[Visit], left_mib: float) -> list[str]:
    """What must not be."""
    first = {visit.mode: visit for visit in reversed(visits)}
    problems = []
    for visit in visits:
        base, name = first[visit.mode], f"{visit.mode} in round {visit.round}"
        if visit.is_return != (visit is not base):
            problems.append(f"{name}: {'came back' if visit.is_return else 'was loaded again'}")
        if abs(visit.card_mib - base.card_mib) > TOLERANCE_MIB:
            problems.append(f"{name}: {visit.card_mib:.0f} MiB on the card, {base.card_mib:.0f} the first time")
        if visit.sha256 != base.sha256:
            problems.append(f"{name}: other pixels than the first time")
    if left_mib > TOLERANCE_MIB:
        problems.append(f"{left_mib:.0f} MiB are left on the card with both parked")
    return problems


def card_mib() -> float:
    """Held by tensors on the card; 0 without one."""
    return torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.modes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--modes", nargs=2, choices=list(STEPS), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp8", choices=["bf16", "fp8", "int8"])
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB)
    parser.add_argument("--cache-dir", type=Path, help="compiled graphs of an earlier run")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--twins", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "modes.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
