"""One cell of a run, in the process that it has for itself."""

import gc
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, ceilings, kernels, ladder, ours, plain, swap, vae
from bench.jobs import GIB, located
from bench.timing import Sample, Watch, bytes_to_device, sample
from engine.linear8_check import self_test
from engine.namesake import import_diffusers
from engine.settings import Settings


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure on the card; the answer is what the table and the JSON file need."""
    import_diffusers()
    if cell["cap_gib"] is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell["cap_gib"] * GIB / total))
    cells: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "ceilings": lambda _: {"ceilings": ceilings.measure()},
        "plain": _job,
        "ours": _job,
        "ladder": lambda cell: {"ladder": ladder.climb(_transformer(cell, "cuda"), ceilings.measure())},
        "kernels": lambda cell: {"kernels": kernels.profile(_transformer(cell, "cuda"), ladder.inputs("cuda"))},
        "swap": lambda cell: {
            "swap": swap.compare(lambda expert: _transformer(cell, "cpu", expert), ladder.inputs("cuda"))
        },
        "vae": lambda cell: {"vae": vae.compare(_parts(cell).load("vae", "cuda"))},
        "accuracy": lambda cell: {
            "accuracy": accuracy.compare(lambda: _transformer(cell, "cuda"), self_test("cuda").passed)
        },
    }
    answer = cells[cell["what"]](cell)
    return {**answer, "card": torch.cuda.get_device_name(), "torch": torch.__version__, "state": card_state()}


def _job(cell: dict[str, Any]) -> dict[str, Any]:
    watch = Watch()
    twins = Path(cell["twins"])
    arm: Any
    if cell["what"] == "plain":
        arm = plain.Arm(cell["mode"], twins, watch)
    else:
        arm = ours.Arm(cell["mode"], _settings(cell), twins, watch)
    first = sample(arm.run, watch)
    samples = [sample(arm.run, watch) for _ in range(cell["repeats"])]
    moved = bytes_to_device(arm.run) if cell["count_bytes"] else None
    answer = {
        "first": _told(first),
        "samples": [_told(one) for one in samples],
        "tokens": watch.tokens,
        "bytes_to_device": moved,
        "in_effect": arm.in_effect(),
        "notes": arm.notes,
    }
    arm.close()
    gc.collect()
    return answer


def _told(one: Sample) -> dict[str, Any]:
    return {**vars(one), "forwards_s": one.forwards_s()}


def _settings(cell: dict[str, Any]) -> Settings:
    return Settings(
        weights_dir=Path(cell["twins"]),
        vram_gib=cell["cap_gib"],
        precision=cell["precision"],
        attention=cell["attention"],
        compile=cell["compile"],
        cache_dir=None if cell["cache_dir"] is None else Path(cell["cache_dir"]),
    )


def _parts(cell: dict[str, Any]) -> ours.CardParts:
    return ours.CardParts(*located("svi_endframe", Path(cell["twins"])))


def _transformer(cell: dict[str, Any], device: str, expert: str = "high") -> Any:
    return _parts(cell).load({"high": "transformer", "low": "transformer_2"}[expert], device)


def card_state() -> str:
    """Clock, power and temperature just after the work; '' where nvidia-smi is missing."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
