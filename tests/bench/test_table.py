"""The table, and the command line that fills it."""

import pytest

from bench.__main__ import _arguments, _cells, _rows
from bench.rows import rows
from bench.table import render


def make_sample(seconds: float, forward_s: float, **changes) -> dict:
    memory = {
        "peak_reserved_gib": 43.0, "peak_allocated_gib": 41.0, "reserved_mib": 40_000.0, "allocated_mib": 30_000.0,
        "host_mib": 9_000.0, **changes,
    }  # fmt: skip
    parts = dict.fromkeys(("text", "picture", "load", "fetch", "upload"), 0.0)
    return {
        "seconds": seconds, "forwards_s": [forward_s] * 6, "tokens": 32_760, "memory": memory,
        "parts_s": {**parts, "encode": 0.25, "forwards": 6 * forward_s, "decode": 0.5, "file": 0.125, "rest": 0.125},
        "state": {"sm_mhz": 1980.0, "power_w": 650.0, "temperature_c": 61.0},
    }  # fmt: skip


def make_cell(what: str, precision: str, seconds: float, forward_s: float, layout: str | None = None) -> dict:
    linear8 = precision if what == "ours" else ""
    return {
        "what": what, "mode": "svi_endframe", "cap_gib": 44.5, "size": "full", "card": "card", "layout": layout,
        "attention": None,
        "in_effect": {"precision": precision, "attention": "flash4", "linear8": linear8, "graphs": 1}, "notes": [],
        "first": make_sample(20.0, 3.0), "samples": [make_sample(seconds, forward_s) for _ in range(5)],
    }  # fmt: skip


CEILINGS = {
    "products": {"bf16": 790.0, "fp8": 1434.0},
    "attention": {"flash4": 675.0, "sage": 900.0},
    "copy_gb_s": 55.0,
}


def test_table_tells_ratio_rate_and_share_of_the_floor():
    ours = make_cell("ours", "fp8", 13.0, 2.0, "flf")
    ours["trace"] = [
        {"seconds": 13.5, "busy_s": 13.25, "idle_s": {"around": 0.2, "later": 0.05}, "bytes_to_device": 2_000_000_000}
    ]
    ours["trace"][0]["kernels"] = {"product": "nvjet_fp8", "attention": "flash"}
    ours["whole"] = [{"seconds": 13.25, "generate_s": 13.0, "stages_s": {"fetch": 0.2, "upload": 0.01}}] * 2
    text = render([{"ceilings": CEILINGS}, make_cell("plain", "bfloat16", 65.0, 3.13), ours])
    # 785.5 / 1434 + 892.9 / 675 = 1.871 s, over 2.0 s
    row = "| ours, fp8, flf | fp8, flash4, 1 graphs | 6 × 32760 | 13 | 13 | 13 | 20 | 2 | 839 | 93.5 | 43 | 41 | 2 |"
    assert row in text
    assert "svi_endframe: ours, fp8, flf takes 1/5.00 of plain diffusers' time" in text
    assert "| ours, fp8, flf | 0 | 0 | 0.25 | 12 | 0.5 | 0 | 0 | 0.125 | 0 | 0.125 |" in text
    assert "| ours, fp8, flf | 13.5 | 13.2 | 1.85 | around 0.200, later 0.050 | 2 | nvjet_fp8 | flash |" in text
    assert "| ours, fp8, flf | 13.2 | 0.25 | 0.2 | 0.01 | 0.25 | 3.77 |" in text  # (0.25 + 0.25) / 13.25


def test_table_tells_what_grew_from_the_first_timed_job_to_the_last():
    cell = make_cell("ours", "fp8", 13.0, 2.0)
    cell["samples"][-1] = make_sample(13.0, 2.0, reserved_mib=40_064.0, allocated_mib=30_002.0, host_mib=9_010.0)
    assert "| ours, fp8 | 1980 | 650 | 61 | 64 | 2 | 10 | 5 |" in render([cell])


def test_arm_without_a_finished_job_is_left_out():
    cell = {**make_cell("ours", "fp8", 13.0, 2.0), "samples": []}
    assert render([cell]) == ""


def test_kernels_are_told_with_what_stands_above_the_ceiling():
    kernel = {"kernel": "k", "sort": "product", "calls": 1, "milliseconds": 600.0, "share": 1.0, "rate": ""}
    found = {
        "kernels": [kernel],
        "sorts": [
            {"sort": "product", "calls": 400, "milliseconds": 600.0, "tflop": 717.0, "precision": "fp8"},
            {"sort": "fused", "calls": 300, "milliseconds": 50.0, "tflop": 0.0, "precision": "fp8"},
        ],
    }
    text = render([{"ceilings": CEILINGS}, {"kernels": found}])
    assert "| product | 400 | 600 | 1195 | 500 | 100 |" in text  # 717 at 1434 TFLOP/s takes 500 ms
    assert "| fused | 300 | 50 | – | – | 50 |" in text


def test_peaks_of_all_processes_are_one_table():
    text = render(
        [{"work": [{"precision": "fp8", "above_gib": 7.5}]}, {"work": [{"precision": "bf16", "above_gib": 9.0}]}]
    )
    assert text.endswith("| fp8 | 7.5 |\n| bf16 | 9 |")


def test_rows_are_markdown_with_three_digits():
    assert rows(["", "s"], [["a", 1234.56], ["b", 0.012345]]) == "|  | s |\n| --- | --- |\n| a | 1235 |\n| b | 0.0123 |"


def test_one_process_serves_all_layouts_of_an_arm():
    args = _arguments().parse_args(["jobs", "--modes", "svi_endframe", "video", "--precision", "bf16", "fp8"])
    made = _rows(args)
    assert [row.name for row in made] == [
        "svi_endframe plain bf16", "svi_endframe ours bf16 svi_latent", "svi_endframe ours bf16 flf",
        "svi_endframe ours fp8 svi_latent", "svi_endframe ours fp8 flf",
        "video plain bf16", "video ours bf16", "video ours fp8",
    ]  # fmt: skip
    assert made[1].cell is made[2].cell
    assert [cell["what"] for cell in _cells(args)] == ["ceilings"]


def test_each_kernel_that_is_asked_for_is_an_arm_of_ours():
    given = ["jobs", "--attention", "fastest", "attention8", "--layout", "flf"]
    made = _rows(_arguments().parse_args(given))
    assert [row.name for row in made] == [
        "svi_endframe plain bf16", "svi_endframe ours fp8 flf", "svi_endframe ours fp8 attention8 flf",
    ]  # fmt: skip
    assert [row.cell["attention"] for row in made] == [None, None, "attention8"]


def test_work_is_measured_eager_and_compiled():
    args = _arguments().parse_args(["work", "--precision", "fp8", "--layout", "flf"])
    assert [(c["what"], c["precision"], c["compile"], c["cap_gib"], c["layouts"]) for c in _cells(args)] == [
        ("work", "fp8", False, None, ["flf"]), ("work", "fp8", True, None, ["flf"]),
    ]  # fmt: skip


def test_swap_takes_its_bus_and_blocks_and_needs_no_ceilings():
    args = _arguments().parse_args(["swap", "--bus-gb-s", "25", "--blocks", "20"])
    assert [(c["what"], c["bus_gb_s"], c["blocks"], c["cap_gib"]) for c in _cells(args)] == [("swap", 25.0, 20, None)]


def test_unknown_measurement_is_refused():
    with pytest.raises(SystemExit, match="speed is none of jobs, ladder"):
        _cells(_arguments().parse_args(["speed"]))


def test_measurement_of_the_full_size_is_refused_for_twins():
    with pytest.raises(SystemExit, match="swap is about the full size"):
        _cells(_arguments().parse_args(["swap", "--size", "twin"]))


def test_steps_of_a_mode_that_has_two_are_refused():
    with pytest.raises(SystemExit, match="image has two numbers of steps"):
        _rows(_arguments().parse_args(["jobs", "--modes", "image", "--steps", "4"]))
