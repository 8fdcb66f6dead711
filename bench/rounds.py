"""Jobs of several arms on one card, in turns: a job of each, then the next of each.

Taking turns is what makes a ratio fair: a host that gets busy or a card that gets warm meets every arm. Each arm is
one process that stays alive and keeps its memory while another works. Where two do not fit the machine together,
they run one after the other, and it is said. The results are written after every job: a run that is cut loses none.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.jobs import GIB, JOBS
from bench.processes import Arm, Died
from bench.say import say
from bench.smi import Sampler
from engine import profiles, residency
from schemas.input_schema import parse_request

PROCESS_BYTES = 6_000_000_000  # of the host, for Python, torch, the CUDA context and a job's own buffers


@dataclass
class Row:
    """One line of the table: an arm's process, and a variant of the request."""

    cell: dict[str, Any]
    layout: str | None
    steps: int | None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.cell["mode"], self.cell["what"], self.cell["precision"], self.cell["attention"], self.layout]
        return " ".join(word for word in words if word)

    @property
    def asked(self) -> dict[str, Any]:
        return {"layout": self.layout, "steps": self.steps}

    def result(self) -> dict[str, Any]:
        return {**self.cell, **self.asked, **self.found}


class Rounds:
    """`write`: called with all rows' results whenever there is something new. `traces`: how many jobs a traced arm runs
    under the profiler, and ours as many through handler.run, for the worker's own seconds."""

    def __init__(
        self,
        rows: Sequence[Row],
        write: Callable[[list[dict[str, Any]]], None],
        start: Callable[[dict[str, Any]], Any] = Arm,
        traces: int = 1,
    ) -> None:
        self.rows = list(rows)
        self.failed: list[str] = []
        self._traces = traces
        self._write = write
        self._start = start
        self._smi = Sampler()

    def run(self, groups: Sequence[Sequence[dict[str, Any]]], repeats: int, traced: Sequence[str]) -> None:
        """`groups`: cells whose processes are alive together. `traced`: arms that run traced jobs as well."""
        try:
            for cells in groups:
                self._group([row for row in self.rows if row.cell in cells], repeats, traced)
        finally:
            self._smi.close()

    def _group(self, rows: list[Row], repeats: int, traced: Sequence[str]) -> None:
        arms: dict[int, Any] = {}
        for row in rows:
            if id(row.cell) not in arms:
                arms[id(row.cell)] = self._start(row.cell)
            self._job(row, arms, "first")
        for number in range(1, repeats + 1):
            for row in rows:
                self._job(row, arms, f"job {number} of {repeats}")
        firsts = {id(row.cell): row for row in reversed(rows)}  # a process's other variants would say the same
        for row in rows:
            if row.cell["what"] in traced and firsts[id(row.cell)] is row:
                self._more(row, arms)
        for arm in arms.values():
            arm.close()

    def _job(self, row: Row, arms: dict[int, Any], which: str) -> None:
        started = time.monotonic()
        answer = self._ask(row, arms, "job")
        if answer is None:
            return
        state = self._smi.since(started)
        sample = {**answer.pop("sample"), "state": None if state is None else dataclasses.asdict(state)}
        row.found.update(answer)
        if which == "first":
            row.found.update(first=sample, samples=[])
        else:
            row.found["samples"].append(sample)
        say(f"{row.name}: {which}: {_told(sample)}")
        self._write([row.result() for row in self.rows if "samples" in row.found])

    def _more(self, row: Row, arms: dict[int, Any]) -> None:
        asked = ["trace", "whole"] if row.cell["what"] == "ours" else ["trace"]
        for what in asked * self._traces:
            answer = self._ask(row, arms, what)
            if answer is None:
                return
            say(f"{row.name}: {what}: {answer[what]['seconds']:.2f} s")
            row.found.setdefault(what, []).append(answer[what])
            self._write([row.result() for row in self.rows if "samples" in row.found])

    def _ask(self, row: Row, arms: dict[int, Any], what: str) -> dict[str, Any] | None:
        if row.name in self.failed:
            return None
        try:
            return dict(arms[id(row.cell)].ask(what, **row.asked))
        except Died as error:
            say(f"{row.name}: {what} failed, {error}")
            self.failed += [other.name for other in self.rows if other.cell is row.cell]
            return None


def groups(
    cells: Sequence[dict[str, Any]], host_bytes: int, card_bytes: int | None
) -> tuple[list[list[dict[str, Any]]], str]:
    """Cells that can be alive together, in their order, and why not all can ('' if they can)."""
    cells = [cell for i, cell in enumerate(cells) if cell not in cells[:i]]
    made: list[list[dict[str, Any]]] = []
    for cell in cells:
        together = [*made[-1], cell] if made else [cell]
        if made and _fits(together, host_bytes, card_bytes):
            made[-1].append(cell)
        else:
            made.append([cell])
    if len(made) < 2:
        return made, ""
    need = sum(host_need_bytes(cell) for cell in cells) / GIB
    card = "unknown" if card_bytes is None else f"{card_bytes / GIB:.0f} GiB"
    return made, (
        f"not all arms can be alive at once (host: {need:.0f} GiB needed, {host_bytes / GIB:.0f} GiB there; "
        f"card: {card}): they run in {len(made)} groups, one after the other"
    )


def host_need_bytes(cell: dict[str, Any]) -> int:
    """Host memory that the arm's process takes: plain keeps every model there, ours what its plan says."""
    if cell["size"] == "twin":
        return PROCESS_BYTES // 6
    profile = profiles.resolve(parse_request(JOBS[cell["mode"]].payload))
    if cell["what"] == "plain":
        return profile.size_bytes + PROCESS_BYTES
    made = residency.plan(profile, int(cell["cap_gib"] * GIB), precision=cell["precision"])
    return made.host_bytes + PROCESS_BYTES


def _fits(cells: Sequence[dict[str, Any]], host_bytes: int, card_bytes: int | None) -> bool:
    on_card = sum(cell["cap_gib"] * GIB for cell in cells)
    if sum(host_need_bytes(cell) for cell in cells) > host_bytes:
        return False
    return all(cell["size"] == "twin" for cell in cells) or (card_bytes is not None and on_card <= card_bytes)


def _told(sample: dict[str, Any]) -> str:
    state = sample["state"]
    warm = f", {state['sm_mhz']:.0f} MHz {state['power_w']:.0f} W {state['temperature_c']:.0f} C" if state else ""
    peak = sample["memory"]["peak_reserved_gib"]
    return f"{sample['seconds']:.2f} s, {len(sample['forwards_s'])} forwards, {peak:.1f} GiB reserved{warm}"
