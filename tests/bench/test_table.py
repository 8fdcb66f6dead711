"""The table, and the command line that fills it."""

import json
import subprocess
import sys

import pytest
import torch

from bench.__main__ import ROOT, _arguments, _cells
from bench.table import render, rows


def make_sample(seconds: float, forward_s: float) -> dict:
    return {
        "seconds": seconds, "forwards_s": [forward_s] * 6, "peak_reserved_gib": 43.0, "stages_s": {"denoise": 12.0},
    }  # fmt: skip


def make_cell(what: str, precision: str, seconds: float, forward_s: float) -> dict:
    return {
        "what": what, "mode": "svi_endframe", "cap_gib": 44.5, "card": "card", "bytes_to_device": 2_000_000_000,
        "tokens": 32_760,
        "in_effect": {"precision": precision, "attention": "flash4", "graphs": 1}, "notes": [],
        "first": make_sample(20.0, 3.0), "samples": [make_sample(seconds, forward_s)] * 5,
    }  # fmt: skip


CEILINGS = {
    "products": {"bf16": 790.0, "fp8": 1434.0},
    "attention": {"flash4": 675.0, "sage": 900.0},
    "copy_gb_s": 55.0,
}


def test_table_tells_ratio_rate_and_share_of_the_floor():
    cells = [make_cell("plain", "bfloat16", 65.0, 3.13), make_cell("ours", "fp8", 13.0, 2.0)]
    text = render([{"ceilings": CEILINGS}, *cells])
    # 785.5 / 1434 + 892.9 / 675 = 1.871 s, over 2.0 s
    assert "| ours, fp8, flash4, 1 graphs | 13 | 13 | 13 | 20 | 2 | 839 | 93.5 | 43 | 2 |" in text
    assert "svi_endframe: ours takes 1/5.00 of plain diffusers' time" in text
    assert "ours: denoise 12.00 s" in text


def test_rows_are_markdown_with_three_digits():
    assert rows(["", "s"], [["a", 1234.56], ["b", 0.012345]]) == "|  | s |\n| --- | --- |\n| a | 1235 |\n| b | 0.0123 |"


def test_cells_are_ceilings_then_both_arms_of_each_mode():
    args = _arguments().parse_args(["jobs", "--modes", "video", "image", "--precision", "bf16", "fp8"])
    assert [(cell["what"], cell.get("mode"), cell.get("precision")) for cell in _cells(args)] == [
        ("ceilings", None, None),
        ("plain", "video", "bf16"), ("ours", "video", "bf16"), ("ours", "video", "fp8"),
        ("plain", "image", "bf16"), ("ours", "image", "bf16"), ("ours", "image", "fp8"),
    ]  # fmt: skip


def test_unknown_measurement_is_refused():
    with pytest.raises(SystemExit, match="speed is none of jobs, ladder"):
        _cells(_arguments().parse_args(["speed"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_seconds_are_not_measured_without_a_card(tmp_path):
    cell = json.dumps({"what": "ceilings", "cap_gib": 44.5})
    command = [sys.executable, "-m", "bench", "--cell", cell, "--json", str(tmp_path / "answer.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--cpu-counts needs none" in done.stderr
