"""Results as text: what is printed last, and what docs/performance.md quotes."""

from collections.abc import Sequence
from typing import Any

from bench.jobs import JOBS
from bench.timing import median
from bench.work import TERA, forward_work


def rows(header: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers keep three digits that matter."""
    lines = [header, ["---"] * len(header), *[[_cell(value) for value in line] for line in body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def render(results: Sequence[dict[str, Any]]) -> str:
    """All cells of a run, in their order; the jobs with their ratio last."""
    ceilings = next((cell["ceilings"] for cell in results if "ceilings" in cell), None)
    parts = [_ceilings(ceilings)] if ceilings else []
    for name in ("ladder", "kernels", "swap", "vae"):
        parts += [_plain_rows(name, cell[name]) for cell in results if name in cell]
    parts += [_accuracy(cell["accuracy"]) for cell in results if "accuracy" in cell]
    jobs = [cell for cell in results if "samples" in cell]
    parts += [_jobs(mode, [cell for cell in jobs if cell["mode"] == mode], ceilings) for mode in JOBS]
    return "\n\n".join(part for part in parts if part)


def _ceilings(ceilings: dict[str, Any]) -> str:
    body = [[f"product, {name}", rate] for name, rate in ceilings["products"].items()]
    body += [[f"attention, {name}", rate] for name, rate in ceilings["attention"].items()]
    return "Ceilings, TFLOP/s\n" + rows(["", "rate"], [*body, ["page-locked copy, GB/s", ceilings["copy_gb_s"]]])


def _plain_rows(name: str, lines: list[dict[str, Any]]) -> str:
    return f"{name}\n" + rows(list(lines[0]), [list(line.values()) for line in lines])


def _accuracy(lines: list[dict[str, Any]]) -> str:
    layers = list(lines[0]["layer_db"])
    body = [
        [f"{line['weights']}, {line['kind']}", line["forward_db"], *(line["layer_db"][name][0] for name in layers)]
        for line in lines
    ]
    return "accuracy, SNR in dB; layers: the lowest over all blocks\n" + rows(["", "forward", *layers], body)


def _jobs(mode: str, cells: list[dict[str, Any]], ceilings: dict[str, Any] | None) -> str:
    if not cells:
        return ""
    body = [_job_row(cell, ceilings) for cell in cells]
    header = ["arm", "s/job", "min", "max", "first", "s/forward", "TFLOP/s", "% of floor", "reserved GiB", "GB to card"]
    text = f"{mode}, {_settings(cells)}\n" + rows(header, body)
    plain, ours = ([cell for cell in cells if cell["what"] == what] for what in ("plain", "ours"))
    if plain and ours:
        ratio = _seconds(plain[0]) / _seconds(ours[-1])
        text += f"\n\n{mode}: ours takes 1/{ratio:.2f} of plain diffusers' time"
    return text + "\n\n" + _stages(cells)


def _settings(cells: list[dict[str, Any]]) -> str:
    return f"median of {len(cells[-1]['samples'])}, cap {cells[-1]['cap_gib']} GiB, {cells[-1]['card']}"


def _job_row(cell: dict[str, Any], ceilings: dict[str, Any] | None) -> list[object]:
    seconds = [sample["seconds"] for sample in cell["samples"]]
    forward_s = median([s for sample in cell["samples"] for s in sample["forwards_s"]])
    job = JOBS[cell["mode"]]
    rate: object = "–"
    share: object = "–"
    if job.mode != "image":
        work = forward_work(cell["tokens"], image_tokens=job.image_tokens)
        rate = work.total / forward_s / TERA
        if ceilings:
            products = ceilings["products"]
            linear = products.get(cell["in_effect"]["precision"], products["bf16"]) * TERA
            fastest = max(value for name, value in ceilings["attention"].items() if name != "sage") * TERA
            share = 100 * work.floor_s(linear, fastest) / forward_s
    reserved = max(sample["peak_reserved_gib"] for sample in cell["samples"])
    moved = "–" if cell["bytes_to_device"] is None else cell["bytes_to_device"] / 1e9
    did = cell["in_effect"]
    name = f"{cell['what']}, {did['precision']}, {did['attention']}, {did['graphs']} graphs"
    first = cell["first"]["seconds"]
    return [name, median(seconds), min(seconds), max(seconds), first, forward_s, rate, share, reserved, moved]


def _stages(cells: list[dict[str, Any]]) -> str:
    lines = []
    for cell in cells:
        names = list(cell["samples"][-1]["stages_s"])
        stages = {name: median([sample["stages_s"].get(name, 0.0) for sample in cell["samples"]]) for name in names}
        lines.append(f"{cell['what']}: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in stages.items()))
        lines += [f"{cell['what']}: {note}" for note in cell["notes"]]
    return "\n".join(lines)


def _seconds(cell: dict[str, Any]) -> float:
    return median([sample["seconds"] for sample in cell["samples"]])
