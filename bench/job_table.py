"""The jobs of one mode as tables: what they took, how that divides, what grew, what the worker itself costs."""

from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from bench.jobs import JOBS
from bench.rows import rows
from bench.work import ROUNDING, TERA, Forward, forward_work

Result = dict[str, Any]
PARTS = ("text", "picture", "encode", "forwards", "decode", "load", "fetch", "file", "upload", "rest")


def jobs_text(mode: str, cells: list[Result], ceilings: Result | None) -> str:
    """All that is known of the mode's arms; '' if none ran."""
    cells = [cell for cell in cells if cell["samples"]]
    if not cells:
        return ""
    settings = f"median of {_counts(cells)}, cap {cells[-1]['cap_gib']} GiB, {cells[-1]['card']}"
    if cells[0]["size"] == "twin":
        settings = "tiny twins: counts are right, seconds mean nothing"
    parts = [
        f"{mode}, {settings}\n" + rows(_HEADER, [_job_row(cell, ceilings) for cell in cells]),
        _ratios(mode, cells),
        "seconds of a job, median, by the card's clock where a model works\n"
        + rows(["arm", *PARTS], [[_name(cell), *_parts(cell)] for cell in cells]),
        "card while jobs ran, and memory from the first timed job to the last\n" + rows(_STATE, _states(cells)),
        _traces(cells),
        _wholes(cells),
        "\n".join(f"{_name(cell)}: {note}" for cell in cells for note in cell["notes"]),
    ]
    return "\n\n".join(part for part in parts if part)


_HEADER = [
    "arm", "kernels", "forwards × tokens", "s/job", "min", "max", "first", "s/forward", "TFLOP/s", "% of floor",
    "reserved GiB", "allocated GiB", "GB to card",
]  # fmt: skip
_STATE = [
    "arm", "SM MHz", "W", "°C", "reserved growth MiB", "allocated growth MiB", "host growth MiB", "jobs",
]  # fmt: skip


def _job_row(cell: Result, ceilings: Result | None) -> list[object]:
    samples = cell["samples"]
    seconds = [sample["seconds"] for sample in samples]
    forward_s = _forward_s(cell)
    did, last = cell["in_effect"], samples[-1]
    kernels = f"{did['linear8'] or did['precision']}, {did['attention']}, {did['graphs']} graphs"
    peaks = [max(sample["memory"][f"peak_{name}_gib"] for sample in samples) for name in ("reserved", "allocated")]
    moved = cell["trace"][0]["bytes_to_device"] / 1e9 if "trace" in cell else "–"
    forwards = f"{len(last['forwards_s'])} × {last['tokens']}"
    rates = _rates(cell, ceilings)
    times = [median(seconds), min(seconds), max(seconds), cell["first"]["seconds"], forward_s]
    return [_name(cell), kernels, forwards, *times, *rates, *peaks, moved]


def _rates(cell: Result, ceilings: Result | None) -> list[object]:
    """Achieved TFLOP/s of a forward and its floor's share; dashes where the work is not counted."""
    if JOBS[cell["mode"]].mode == "image" or cell["size"] == "twin":
        return ["–", "–"]
    rate = _work(cell).total / _forward_s(cell) / TERA
    if ceilings is None:
        return [rate, "–"]
    return [rate, floor_percent(cell, ceilings)]


def floor_percent(cell: Result, ceilings: Result) -> float:
    """What the run's ceilings allow a forward of a video's transformer at best, over what it takes."""
    precision = cell["in_effect"]["precision"]
    linear, attention = (ceiling_rate(ceilings, sort, precision) for sort in ("product", "attention"))
    return 100 * _work(cell).floor_s(linear, attention) / _forward_s(cell)


def ceiling_rate(ceilings: Mapping[str, Any], sort: str, precision: str) -> float:
    """Operations a second that this run's card does at best: of products at `precision`, or of exact attention."""
    if sort == "attention":
        return TERA * float(max(rate for name, rate in ceilings["attention"].items() if name not in ROUNDING))
    return TERA * float(ceilings["products"].get(precision, ceilings["products"]["bf16"]))


def _work(cell: Result) -> Forward:
    return forward_work(cell["samples"][-1]["tokens"], image_tokens=JOBS[cell["mode"]].image_tokens)


def _forward_s(cell: Result) -> float:
    return median([spent for sample in cell["samples"] for spent in sample["forwards_s"]])


def _ratios(mode: str, cells: list[Result]) -> str:
    """Each arm of ours against plain, of the same run."""
    plain = [cell for cell in cells if cell["what"] == "plain"]
    if not plain or plain[0]["size"] == "twin":
        return ""
    of_plain = job_seconds(plain[0])
    return "\n".join(
        f"{mode}: {_name(cell)} takes 1/{of_plain / job_seconds(cell):.2f} of plain diffusers' time"
        for cell in cells
        if cell["what"] == "ours"
    )


def _parts(cell: Result) -> list[object]:
    return [median([sample["parts_s"][name] for sample in cell["samples"]]) for name in PARTS]


def _states(cells: list[Result]) -> list[list[object]]:
    body = []
    for cell in cells:
        samples = cell["samples"]
        states = [sample["state"] for sample in samples if sample["state"]]
        card: list[object] = ["–", "–", "–"]
        if states:
            card = [median([state[name] for state in states]) for name in ("sm_mhz", "power_w", "temperature_c")]
        grown = [
            samples[-1]["memory"][name] - samples[0]["memory"][name]
            for name in ("reserved_mib", "allocated_mib", "host_mib")
        ]
        body.append([_name(cell), *card, *grown, len(samples)])
    return body


def _traces(cells: list[Result]) -> str:
    traced = [(cell, one) for cell in cells for one in cell.get("trace", [])]
    if not traced:
        return ""
    header = ["arm", "s", "s with work on the card", "% idle", "s of it", "GB to card", "products", "attention"]
    body = []
    for cell, one in traced:
        idle = 100 * (1 - one["busy_s"] / one["seconds"])
        ran = [one["kernels"].get(sort, "–")[:40] for sort in ("product", "attention")]
        where = ", ".join(f"{name} {spent:.3f}" for name, spent in one["idle_s"].items())
        body.append([_name(cell), one["seconds"], one["busy_s"], idle, where, one["bytes_to_device"] / 1e9, *ran])
    return "more jobs, under the profiler; the dearest kernels\n" + rows(header, body)


class Overhead(NamedTuple):
    """Seconds of a job through handler.run, and what of them was work of neither the card nor the network."""

    seconds: float
    outside_s: float
    """Before and after the models: parse, fetch, decode of the pictures, delivery."""
    fetch_s: float
    upload_s: float
    idle_s: float
    """Inside them, with nothing to do for the card."""

    @property
    def percent(self) -> float:
        return 100 * (self.outside_s + self.idle_s) / self.seconds


def overhead(cell: Result) -> Overhead | None:
    """Medians of the whole jobs and of the traced ones; None where there is none of either, or it had no card."""
    wholes, traces = cell.get("whole"), [one for one in cell.get("trace", []) if one["busy_s"]]
    if not wholes or not traces:  # without a card nothing is known of its idle time
        return None
    fetch_s, upload_s = (median([one["stages_s"].get(name, 0.0) for one in wholes]) for name in ("fetch", "upload"))
    return Overhead(
        median([one["seconds"] for one in wholes]),
        median([one["seconds"] - one["generate_s"] for one in wholes]),
        fetch_s,
        upload_s,
        median([one["seconds"] - one["busy_s"] for one in traces]),
    )


def _wholes(cells: list[Result]) -> str:
    """handler.run end to end: JSON with data-URI pictures to a verified file on the disk."""
    found = [(_name(cell), spent) for cell in cells if (spent := overhead(cell)) is not None]
    if not found:
        return ""
    header = ["arm", "s", "outside the models", "fetch", "upload (disk)", "card idle inside", "overhead %"]
    body = [[name, *spent, spent.percent] for name, spent in found]
    return "the whole worker: JSON with data URIs to a verified file on the disk\n" + rows(header, body)


def _name(cell: Result) -> str:
    words = [cell["what"], cell["in_effect"]["precision"], cell["attention"], cell["layout"]]
    return ", ".join(word for word in words if word)


def _counts(cells: list[Result]) -> str:
    counts = sorted({len(cell["samples"]) for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def job_seconds(cell: Result) -> float:
    """Median of the timed jobs."""
    return median([sample["seconds"] for sample in cell["samples"]])
