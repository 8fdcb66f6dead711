"""SDXL lever by lever: base 25 and refiner 15 steps at 1024x1024, resident, the same request in one process.

    python -m bench.sdxl                       on the card: all rungs, median of 3 after one to warm up
    python -m bench.sdxl --size twin           the twins, on any machine: only the rungs that need no card
    python -m bench.sdxl --cap-gib 44.5        below the memory of a 48 GB card (the default)

Rungs: as loaded; channels last; forwards recorded and replayed; both; both and the transformer blocks compiled by
diffusers' own `compile_repeated_blocks`. Weights are random: what is told of the pictures is whether they are equal.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.jobs import CAP_GIB, GIB, JOBS, located
from bench.kept import keep
from bench.processes import ROOT
from bench.rows import rows
from bench.say import say
from bench.timing import begin_peak, median, memory
from engine.backends import Backend, load_backend
from engine.card import Card, Levers
from engine.namesake import import_diffusers
from engine.outputs import Images
from engine.profile import Profile
from engine.progress import Progress
from engine.weights import Parts

JOB = JOBS["image"]
CONVOLVED = ("unet", "refiner_unet", "vae")
REPEATS = 3


@dataclass(frozen=True)
class Rung:
    name: str
    replays: bool = False
    channels_last: bool = False
    compiles: bool = False
    """Cannot be taken back: the last rung."""

    @property
    def needs_card(self) -> bool:
        return self.replays or self.compiles


RUNGS = (
    Rung("eager"),
    Rung("eager, channels last", channels_last=True),
    Rung("replayed", replays=True),
    Rung("replayed, channels last", replays=True, channels_last=True),
    Rung("replayed, channels last, blocks compiled", replays=True, channels_last=True, compiles=True),
)


@dataclass(frozen=True)
class Row:
    rung: str
    job_s: float
    """Median, like the next three."""
    denoise_s: float
    decode_s: float
    forward_ms: float
    first_s: float
    """Of the first job of the rung, which loads and compiles kernels."""
    peak_reserved_gib: float
    levels_off: float
    """Of 255, on average, from the first rung's picture; 0 is equal."""


class Kept:
    """Parts that are loaded once, whoever asks."""

    def __init__(self, parts: Parts) -> None:
        self.profile = parts.profile
        self._parts = parts
        self._loaded: dict[str, Any] = {}

    def load(self, name: str, device: str = "cpu") -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._parts.load(name, device)
        return self._loaded[name]


def measure(parts: Parts, device: str, *, is_small: bool = False, repeats: int = REPEATS) -> Iterator[Row]:
    """A row for each rung that this device can climb."""
    kept, first = Kept(parts), None
    for rung in RUNGS:
        if rung.needs_card and device == "cpu":
            continue
        say(rung.name)
        sdxl = _prepared(kept, rung, device)
        begin_peak()
        runs = [_job(sdxl, parts.profile, number, is_small) for number in range(repeats + 1)]
        picture = runs[-1].picture
        first = picture if first is None else first
        warm = [run.stages_s for run in runs[1:]]
        denoise_s = median([stages["denoise"] for stages in warm])
        yield Row(
            rung.name,
            median([run.seconds for run in runs[1:]]),
            denoise_s,
            median([stages["decode"] for stages in warm]),
            1000 * denoise_s / JOB.forwards,
            runs[0].seconds,
            memory().peak_reserved_gib,
            float(np.abs(picture.astype(np.int16) - first.astype(np.int16)).mean()),
        )


@dataclass(frozen=True)
class _Run:
    seconds: float
    stages_s: dict[str, float]
    picture: np.ndarray


def _job(sdxl: Backend, profile: Profile, number: int, is_small: bool) -> _Run:
    progress, started = Progress(), time.perf_counter()
    made = sdxl.generate(JOB.task(profile, number, JOB.small if is_small else {}), progress)
    assert isinstance(made, Images)
    (picture,) = made.pictures
    return _Run(time.perf_counter() - started, dict(progress.timings_s), picture)


def _prepared(kept: Kept, rung: Rung, device: str) -> Backend:
    """The backend as the worker builds it, its replays switched by WORKER_COMPILE's lever; the rest is done here."""
    sdxl = load_backend(kept.profile, kept, Card(device, 2**40, levers=Levers(compile=rung.replays)))
    for name in CONVOLVED:
        model = kept.load(name, device)
        model.to(memory_format=torch.channels_last if rung.channels_last else torch.contiguous_format)
        if rung.compiles and name != "vae":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return sdxl


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.sdxl", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "twin"], default="full")
    parser.add_argument("--twins", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench-sdxl.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * GIB / total))
    import_diffusers()
    from bench.ours import CardParts  # imports diffusers' models

    profile, twin = located("image", args.twins)
    parts = twin if args.size == "twin" else CardParts(profile, twin)
    found: list[Row] = []
    try:
        for row in measure(parts, device, is_small=args.size == "twin", repeats=args.repeats):
            found.append(row)
            keep(args.json, [asdict(one) for one in found])
    finally:  # a rung that fails, or a run that is cut, loses no other
        print(table(found))
    return 0


def table(found: list[Row]) -> str:
    """`ratio`: to the first rung's seconds a job."""
    header = ["rung", "s/job", "ratio", "denoise s", "decode s", "ms/forward", "first s", "peak GiB", "levels off"]
    body = []
    for row in found:
        name, job_s, *rest = asdict(row).values()
        body.append([name, job_s, found[0].job_s / job_s, *rest])
    return rows(header, body)


if __name__ == "__main__":
    sys.exit(main())
