"""Results as text: what is printed last, and what docs/performance.md quotes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.job_table import ceiling_rate, jobs_text
from bench.jobs import JOBS
from bench.rows import rows
from bench.work import TERA

Result = dict[str, Any]


def render(results: Sequence[Result]) -> str:
    """All cells of a run, in their order; the jobs with their ratio last."""
    ceilings = next((cell["ceilings"] for cell in results if "ceilings" in cell), None)
    parts = []
    for name, text in _TEXTS.items():
        found = [cell[name] for cell in results if name in cell]
        if name == "work":  # a process for each precision, one table
            found = [[line for lines in found for line in lines]] if found else []
        parts += [text(each, ceilings) for each in found]
    jobs = [cell for cell in results if "samples" in cell]
    parts += [jobs_text(mode, [cell for cell in jobs if cell["mode"] == mode], ceilings) for mode in JOBS]
    return "\n\n".join(part for part in parts if part)


def _ceilings(ceilings: Result, _: Result | None) -> str:
    body = [[f"product, {name}", rate] for name, rate in ceilings["products"].items()]
    body += [[f"attention, {name}", rate] for name, rate in ceilings["attention"].items()]
    return "Ceilings, TFLOP/s\n" + rows(["", "rate"], [*body, ["page-locked copy, GB/s", ceilings["copy_gb_s"]]])


def _lines(name: str) -> Callable[[Any, Result | None], str]:
    """One row a line, its fields as columns."""

    def text(lines: Any, _: Result | None) -> str:
        lines = lines if isinstance(lines, list) else [lines]
        return f"{name}\n" + rows(list(lines[0]), [list(line.values()) for line in lines])

    return text


def _kernels(found: Result, ceilings: Result | None) -> str:
    text = _lines("kernels of one forward")(found["kernels"], None)
    header = ["sort", "calls", "ms", "TFLOP/s", "ms at this run's ceiling", "ms above it"]
    body = [_sort_row(line, ceilings) for line in found["sorts"]]
    return f"{text}\n\nby sort\n{rows(header, body)}"


def _sort_row(line: Result, ceilings: Result | None) -> list[object]:
    spent = line["milliseconds"]
    row: list[object] = [line["sort"], line["calls"], spent]
    if not line["tflop"]:
        return [*row, "–", "–", spent]
    rate = line["tflop"] / spent * 1e3
    if ceilings is None:
        return [*row, rate, "–", "–"]
    best = ceiling_rate(ceilings, line["sort"], line["precision"]) / TERA
    floor = line["tflop"] / best * 1e3
    return [*row, rate, floor, spent - floor]


def _accuracy(lines: Any, _: Result | None) -> str:
    layers = list(lines[0]["layer_db"])
    body = [
        [f"{line['weights']}, {line['kind']}", line["forward_db"], *(line["layer_db"][name][0] for name in layers)]
        for line in lines
    ]
    return "accuracy, SNR in dB; layers: the lowest over all blocks\n" + rows(["", "forward", *layers], body)


_TEXTS: Mapping[str, Callable[[Any, Result | None], str]] = {
    "ceilings": _ceilings,
    "ladder": _lines("ladder"),
    "kernels": _kernels,
    "swap": _lines("swap"),
    "vae": _lines("vae"),
    "work": _lines("work: memory of a job's spans, beyond what stays on the card"),
    "accuracy": _accuracy,
}
