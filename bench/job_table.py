"""The jobs of one mode as tables: what they took, how that divides, what grew, what the worker itself costs."""

from statistics import median
from typing import Any

from bench.jobs import JOBS
from bench.rows import rows
from bench.work import TERA, forward_work

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
    forward_s = median([spent for sample in samples for spent in sample["forwards_s"]])
    did, last = cell["in_effect"], samples[-1]
    kernels = f"{did['linear8'] or did['precision']}, {did['attention']}, {did['graphs']} graphs"
    peaks = [max(sample["memory"][f"peak_{name}_gib"] for sample in samples) for name in ("reserved", "allocated")]
    moved = cell["trace"][0]["bytes_to_device"] / 1e9 if "trace" in cell else "–"
    forwards = f"{len(last['forwards_s'])} × {last['tokens']}"
    rates = _rates(cell, forward_s, ceilings)
    times = [median(seconds), min(seconds), max(seconds), cell["first"]["seconds"], forward_s]
    return [_name(cell), kernels, forwards, *times, *rates, *peaks, moved]


def _rates(cell: Result, forward_s: float, ceilings: Result | None) -> list[object]:
    """Achieved TFLOP/s of a forward and its floor's share; dashes where the work is not counted."""
    job = JOBS[cell["mode"]]
    if job.mode == "image" or cell["size"] == "twin":
        return ["–", "–"]
    work = forward_work(cell["samples"][-1]["tokens"], image_tokens=job.image_tokens)
    rate = work.total / forward_s / TERA
    if ceilings is None:
        return [rate, "–"]
    products = ceilings["products"]
    linear = products.get(cell["in_effect"]["precision"], products["bf16"]) * TERA
    fastest = max(value for name, value in ceilings["attention"].items() if name != "sage") * TERA
    return [rate, 100 * work.floor_s(linear, fastest) / forward_s]


def _ratios(mode: str, cells: list[Result]) -> str:
    """Each arm of ours against plain, of the same run."""
    plain = [cell for cell in cells if cell["what"] == "plain"]
    if not plain or plain[0]["size"] == "twin":
        return ""
    of_plain = _seconds(plain[0])
    return "\n".join(
        f"{mode}: {_name(cell)} takes 1/{of_plain / _seconds(cell):.2f} of plain diffusers' time"
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
    traced = [cell for cell in cells if "trace" in cell]
    if not traced:
        return ""
    header = ["arm", "s", "s with work on the card", "% idle", "GB to card", "products", "attention"]
    body = []
    for cell in traced:
        one = cell["trace"][0]
        idle = 100 * (1 - one["busy_s"] / one["seconds"])
        ran = [one["kernels"].get(sort, "–")[:40] for sort in ("product", "attention")]
        body.append([_name(cell), one["seconds"], one["busy_s"], idle, one["bytes_to_device"] / 1e9, *ran])
    return "one more job each, under the profiler; the dearest kernels\n" + rows(header, body)


def _wholes(cells: list[Result]) -> str:
    """handler.run end to end: JSON with data-URI pictures to a verified file on the disk."""
    body = []
    for cell in cells:
        wholes, trace = cell.get("whole"), cell.get("trace", [{"busy_s": 0.0}])[0]
        if not wholes or not trace["busy_s"]:  # without a card nothing is known of its idle time
            continue
        seconds = median([one["seconds"] for one in wholes])
        own = median([one["seconds"] - one["generate_s"] for one in wholes])
        fetch, upload = (median([one["stages_s"].get(name, 0.0) for one in wholes]) for name in ("fetch", "upload"))
        idle = trace["seconds"] - trace["busy_s"]
        share = 100 * (own + idle) / seconds
        body.append([_name(cell), seconds, own, fetch, upload, idle, share])
    if not body:
        return ""
    header = ["arm", "s", "outside the models", "fetch", "upload (disk)", "card idle inside", "overhead %"]
    return "the whole worker: JSON with data URIs to a verified file on the disk\n" + rows(header, body)


def _name(cell: Result) -> str:
    words = [cell["what"], cell["in_effect"]["precision"], cell["layout"] or ""]
    return ", ".join(word for word in words if word)


def _counts(cells: list[Result]) -> str:
    counts = sorted({len(cell["samples"]) for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _seconds(cell: Result) -> float:
    return median([sample["seconds"] for sample in cell["samples"]])
