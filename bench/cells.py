"""One measurement, in the process that it has for itself: asked once, or a job at a time."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.jobs import CAP_GIB, GIB, located
from bench.trace import trace
from bench.watch import Sample, Watch, sample
from engine.linear8_check import passing
from engine.namesake import import_diffusers
from engine.settings import Settings

Cell = dict[str, Any]


def serve(cell: Cell, asked: Iterable[str], answers: TextIO) -> None:
    """Answer each line of `asked`, {"do": ...}, with a line of JSON. The first failure ends the process."""
    import_diffusers()
    _cap(cell)
    jobs = _Jobs(cell) if cell["what"] in ("plain", "ours") else None
    for line in asked:
        ask = json.loads(line)
        what = ask.pop("do")
        answer = {**cell, **_measure(cell)} if what == "measure" else getattr(jobs, what)(**ask)
        answers.write(json.dumps({**answer, **_where()}, default=_plain) + "\n")
        answers.flush()
    if jobs is not None:
        jobs.arm.close()


class _Jobs:
    """A warm arm and its clock. Its methods are what can be asked of it."""

    def __init__(self, cell: Cell) -> None:
        self.watch = Watch()
        twins, is_small = Path(cell["twins"]), cell["size"] == "twin"
        self.arm: Any
        if cell["what"] == "plain":
            plain = import_module("bench.plain")
            self.arm = plain.Arm(cell["mode"], twins, self.watch, is_small=is_small)
        else:
            ours = import_module("bench.ours")
            self.arm = ours.Arm(cell["mode"], settings(cell), twins, self.watch, is_small=is_small)

    def job(self, layout: str | None, steps: int | None) -> dict[str, Any]:
        """Run one and tell all about it."""
        self.arm.draw()
        one = sample(lambda: self.arm.run(layout, steps), self.watch)
        return {"sample": told(one), "in_effect": self.arm.in_effect(), "notes": list(self.arm.notes)}

    def trace(self, layout: str | None, steps: int | None) -> dict[str, Any]:
        """One more, under the profiler."""
        self.arm.draw()
        return {"trace": trace(lambda: self.arm.run(layout, steps))}

    def whole(self, layout: str | None, steps: int | None) -> dict[str, Any]:
        """One more, from JSON to a delivered file; ours only."""
        return {"whole": self.arm.run_whole(layout, steps)}


def told(one: Sample) -> dict[str, Any]:
    return {**dataclasses.asdict(one), "forwards_s": one.forwards_s(), "parts_s": one.parts_s()}


def settings(cell: Cell) -> Settings:
    """The worker's settings that the cell stands for."""
    return Settings(
        weights_dir=Path(cell["twins"]),
        vram_gib=cell["cap_gib"] or CAP_GIB,
        precision=cell["precision"],
        attention=cell["attention"],
        compile=cell["compile"],
        cache_dir=None if cell["cache_dir"] is None else Path(cell["cache_dir"]),
    )


def _measure(cell: Cell) -> dict[str, Any]:
    what = cell["what"]
    return {what: _CELLS[what](cell)}


def _ceilings(_cell: Cell) -> Any:
    return import_module("bench.ceilings").measure()


def _ladder(cell: Cell) -> Any:
    ladder, ceilings = import_module("bench.ladder"), import_module("bench.ceilings")
    return ladder.climb(_transformer(cell), ceilings.measure())


def _kernels(cell: Cell) -> Any:
    kernels, ladder = import_module("bench.kernels"), import_module("bench.ladder")
    return kernels.profile(_transformer(cell), ladder.inputs("cuda"))


def _swap(cell: Cell) -> Any:
    swap, ladder = import_module("bench.swap"), import_module("bench.ladder")
    bus = cell["bus_gb_s"]
    return swap.compare(lambda expert: _transformer(cell, expert), ladder.inputs("cuda"), bus_gb_s=bus)


def _vae(cell: Cell) -> Any:
    return import_module("bench.vae").compare(_parts(cell).load("vae", "cuda"))


def _accuracy(cell: Cell) -> Any:
    return import_module("bench.accuracy").compare(lambda: _transformer(cell), passing("cuda"))


def _work(cell: Cell) -> Any:
    is_small = cell["size"] == "twin"
    twins = Path(cell["twins"])
    return import_module("bench.peaks").measure(cell["mode"], settings(cell), twins, cell["layouts"], is_small=is_small)


_CELLS: dict[str, Callable[[Cell], Any]] = {
    "ceilings": _ceilings,
    "ladder": _ladder,
    "kernels": _kernels,
    "swap": _swap,
    "vae": _vae,
    "accuracy": _accuracy,
    "work": _work,
}


def _parts(cell: Cell) -> Any:
    profile, rest = located("svi_endframe", Path(cell["twins"]))
    return import_module("bench.ours").CardParts(profile, rest, blocks=cell["blocks"])


def _transformer(cell: Cell, expert: str = "high") -> Any:
    return _parts(cell).load({"high": "transformer", "low": "transformer_2"}[expert], "cuda")


def _cap(cell: Cell) -> None:
    if cell["cap_gib"] is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell["cap_gib"] * GIB / total))


def _where() -> dict[str, str]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    return {"card": card, "torch": torch.__version__}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
