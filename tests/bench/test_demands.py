"""What is asked for on a card against what was found: each figure is read, and each limit is one."""

from copy import deepcopy
from typing import Any

import pytest

from bench.demands import table

ALL = [
    ("svi_endframe: 4.7 times as fast as plain, goal 5", "5.00: 65.00 s to 13.00 s, n = 5"),
    ("svi_endframe: 13.8 s, goal 13", "13.00 s, n = 5, 6 forwards"),
    ("the same frames by plain's arithmetic (flf), as fast", "5.20: 65.00 s to 12.50 s, n = 5"),
    ("the same: 13.8 s", "12.50 s, n = 5, 6 forwards"),
    ("a forward: 83 % of the floor, goal 87", "93.5 %"),
    ("peak reserved: 44.0 GiB", "43.0 GiB"),
    ("all resident: no weight moves in a warm job", "0.04 GB"),
    ("neither card nor network: 2 % of a job", "1.53 %, 0.76 of it outside the models, n = 1"),
    (
        "first job, warm compile cache: 1.35 of a warm one",
        "1.25: 20.00 s, a warm one 16.00 s, n = 3; 30.00 s since the start",
    ),
    (
        "first job, files in memory: 1.35 of a warm one",
        "1.19: 19.00 s, a warm one 16.00 s, n = 1; 29.00 s since the start",
    ),
    (
        "first job, cold compile cache: 1.35 of a warm one + 5 s",
        "1.50: 24.00 s, a warm one 16.00 s, n = 1; 34.00 s since the start",
    ),
    (
        "first job, cold compile cache, files in memory: 1.35 of a warm one + 5 s",
        "1.44: 23.00 s, a warm one 16.00 s, n = 1; 33.00 s since the start",
    ),
    ("first job, waited for: 1.35 of a warm one", "1.12: 18.00 s, a warm one 16.00 s, n = 1; 70.00 s since the start"),
    (
        "first job, warmed up before it: 1.35 of a warm one",
        "1.06: 17.00 s, a warm one 16.00 s, n = 1; 80.00 s since the start",
    ),
    ("weights read: 80 % of dd", "90 %: 2.70 of 3.00 GB/s"),
    ("exact track: 3 times as fast as plain", "3.25: 65.00 s to 20.00 s, n = 5"),
    ("exact track, peak reserved: 44.0 GiB", "43.0 GiB"),
    ("exact track: two experts (57.3 GB) move in a job, the encoder (11.4) may", "68.60 GB"),
    ("with 8-bit scores: 13 s", "12.00 s, n = 5, 6 forwards"),
    ("rolling swap: 1.05 of both experts resident", "1.001, 10 blocks"),
    ("rolling swap: equal to it", "True"),
    ("rolling swap: two experts move", "15.1 GB, two experts are 15.1"),
    ("SDXL: 1.8 times as fast as worker-sdxl's way", "3.00: 7.50 s to 2.50 s, n = 5"),
    ("modes: back from host memory, the same pixels, nothing left", "image 0.25 s"),
    ("video in 4 distilled forwards", "10.00 s, n = 3, 4 forwards"),
    ("memoised encode: equal, 2.5 times fewer operations", "equal: True; stage runs 1 of 2; 2.73 times fewer"),
    ("decode: 1.6 times as fast as stock bf16", "2.25: 1.80 s to 0.80 s"),
    ("tests that need a card", "15 passed in 9 s"),
    ("50 jobs: no growth on the card", "+0 MiB after 50"),
]  # fmt: skip


def row(
    what: str, seconds: float, mode: str = "svi_endframe", jobs: int = 5, forwards: int = 6, layout: str | None = None
) -> dict[str, Any]:
    memory = {"peak_reserved_gib": 43.0, "reserved_mib": 42_000.0}
    sample = {"seconds": seconds, "forwards_s": [2.0] * forwards, "tokens": 32_760, "memory": memory}
    precision = {"precision": "fp8"}
    samples = [deepcopy(sample) for _ in range(jobs)]
    return {"what": what, "mode": mode, "layout": layout, "in_effect": precision, "samples": samples}


@pytest.fixture
def found() -> dict[str, Any]:
    traced = [{"seconds": 13.1, "busy_s": 13.0, "bytes_to_device": 36_000_000}]
    whole = {"seconds": 13.1, "generate_s": 13.0, "stages_s": {}}
    ceilings = {"products": {"bf16": 790.0, "fp8": 1434.0}, "attention": {"flash4": 675.0, "sage": 900.0}}
    first = [{"first_s": spent, "warm_s": [16.0], "since_start_s": 10.0 + spent} for spent in (19.0, 20.0, 25.0)]
    disk = {"dd_s": 12.0, "bytes": 27 * 10**9, "read_s": 10.0}
    cold = {"bytes": 36_000_000_000, "warm_cache": first, "disk": disk}
    decodes = [{"name": "decode, stock bf16", "seconds": 1.8}, {"name": "decode, as a job: to bytes", "seconds": 0.8}]
    encode = {"name": "encode, memoised fp32", "says": "equal: True; stage runs 1 of 2"}
    svi = {**row("ours", 13.0), "trace": traced, "whole": [whole]}
    return {
        "svi": [{"ceilings": ceilings}, row("plain", 65.0), svi, row("ours", 12.5, layout="flf")],
        "restarted": {
            "bytes": 36_000_000_000,
            "cold_cache_in_memory": [{**first[0], "first_s": 23.0, "since_start_s": 33.0}],
            "restarted": [{**first[0], "first_s": 19.0, "since_start_s": 29.0}],
        },
        "cold": {
            **cold,
            "cold_cache": [{**first[0], "first_s": 24.0, "since_start_s": 34.0}],
            "waited": [{**first[0], "first_s": 18.0, "since_start_s": 70.0}],
            "warmed_up": [{**first[0], "first_s": 17.0, "since_start_s": 80.0}],
        },
        "exact": [{**row("ours", 20.0), "trace": [{**traced[0], "bytes_to_device": 68_600_000_000}]}],
        "swap": [{"blocks": 10, "swap": [{"name": "rolling swap", "ratio": 1.001, "equal": True, "moved_gb": 15.1}]}],
        "attention8": [{**row("ours", 13.5), "attention": None}, {**row("ours", 12.0), "attention": "attention8"}],
        "sdxl": [row("plain", 7.5, "image"), row("ours", 2.5, "image")],
        "modes": {"visits": [{"mode": "image", "is_return": True, "load_s": 0.25}], "problems": []},
        "lightning": [row("ours", 10.0, "lightning", jobs=3, forwards=4)],
        "vae": [{"vae": [*decodes, encode]}],
        "tests": {"exit_code": 0, "seconds": 9.0, "said": "15 passed in 9 s"},
        "many": [row("ours", 1.4, "short", jobs=50, forwards=2)],
    }


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in table(found).splitlines()[2:]]


def test_every_figure_is_read_and_reached(found: dict[str, Any]) -> None:
    asked = {"video in 4 distilled forwards": "–"}
    assert lines(found) == [(words, seen, asked.get(words, "yes")) for words, seen in ALL]


def put(found: Any, path: str, value: object) -> None:
    *way, last = [int(step) if step.lstrip("-").isdigit() else step for step in path.split("/")]
    for step in way:
        found = found[step]
    found[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("svi/1/samples", row("plain", 60.0)["samples"], ["svi_endframe: 4.7"]),
        ("svi/3/samples", row("ours", 13.81)["samples"], ["the same: 13.8"]),
        ("svi/3/samples", row("ours", 13.9)["samples"], ["the same frames", "the same: 13.8"]),
        (
            "svi/1/samples", row("plain", 65.0, jobs=4)["samples"],
            ["svi_endframe: 4.7", "the same frames", "exact track: 3 times"],
        ),
        ("svi/2/samples/0/memory/peak_reserved_gib", 44.1, ["peak reserved"]),
        ("svi/2/samples/0/forwards_s", [9.0] * 40, ["a forward"]),
        ("svi/2/trace/0/bytes_to_device", 11_400_000_000, ["all resident"]),
        ("svi/2/trace/0/busy_s", 12.0, ["neither card"]),
        ("cold/warm_cache/1/first_s", 21.7, ["first job, warm"]),
        ("restarted/restarted/0/first_s", 21.7, ["first job, files"]),
        ("cold/cold_cache/0/first_s", 26.7, ["first job, cold compile cache:"]),
        ("restarted/cold_cache_in_memory/0/first_s", 26.7, ["first job, cold compile cache, files"]),
        ("cold/waited/0/first_s", 21.7, ["first job, waited"]),
        ("cold/warmed_up/0/first_s", 21.7, ["first job, warmed"]),
        ("cold/disk/read_s", 11.3, ["weights read"]),
        ("exact/0/samples/0/memory/peak_reserved_gib", 44.1, ["exact track, peak"]),
        ("exact/0/trace/0/bytes_to_device", 90_000_000_000, ["exact track: two"]),
        ("exact/0/trace/0/bytes_to_device", 28_600_000_000, ["exact track: two"]),
        ("attention8/1/samples", row("ours", 13.1)["samples"], ["with 8-bit scores"]),
        ("swap/0/swap/0/ratio", 1.06, ["rolling swap: 1.05"]),
        ("swap/0/swap/0/equal", False, ["rolling swap: equal"]),
        ("swap/0/swap/0/moved_gb", 16.0, ["rolling swap: two"]),
        ("sdxl/0/samples", row("plain", 4.4, "image")["samples"], ["SDXL"]),
        ("modes/problems", ["another file"], ["modes"]),
        ("vae/0/vae/2/says", "equal: False", ["memoised"]),
        ("vae/0/vae/1/seconds", 1.2, ["decode"]),
        ("tests/exit_code", 1, ["tests"]),
        ("many/0/samples/-1/memory/reserved_mib", 42_070.0, ["50 jobs"]),
        ("many/0/samples", row("ours", 1.4, jobs=49)["samples"], ["50 jobs"]),
    ],
)  # fmt: skip
def test_figure_that_is_not_enough_is_not_reached(
    path: str, value: object, words: list[str], found: dict[str, Any]
) -> None:
    put(found, path, value)
    missed = [asked for asked, _, reached in lines(found) if reached == "no"]
    assert [asked.startswith(start) for asked, start in zip(missed, words, strict=True)] == [True] * len(words)


def test_overhead_is_of_the_median_trace_and_the_median_whole_job(found: dict[str, Any]) -> None:
    """One that met a busy host would decide, else."""
    svi = found["svi"][2]
    svi["trace"] = [{**svi["trace"][0], "busy_s": busy_s} for busy_s in (11.0, 12.97, 12.98)]
    svi["whole"] = [{**svi["whole"][0], "generate_s": generate_s} for generate_s in (9.0, 13.0, 13.05)]
    told = {words: seen for words, seen, _ in lines(found)}
    assert told["neither card nor network: 2 % of a job"] == "1.76 %, 0.76 of it outside the models, n = 3"


def test_first_jobs_are_held_against_the_median_of_all_warm_ones(found: dict[str, Any]) -> None:
    jobs = found["cold"]["warm_cache"]
    for job, warm_s in zip(jobs, ([30.0], [16.0, 15.0], [15.5, 40.0]), strict=True):
        job["warm_s"] = warm_s
    told = {words: seen for words, seen, _ in lines(found)}
    seen = "1.25: 20.00 s, a warm one 16.00 s, n = 3; 30.00 s since the start"
    assert told["first job, warm compile cache: 1.35 of a warm one"] == seen


def test_program_that_was_cut_or_never_ran_has_no_result(found: dict[str, Any]) -> None:
    assert {line[1:] for line in lines({})} == {("no result", "–")}
    cut = {**found, "restarted": {"bytes": 1}, "cold": {"bytes": 1}, "svi": [{**found["svi"][1], "samples": []}]}
    assert [words for words, seen, _ in lines(cut) if seen == "no result"] == [
        words for words, _ in ALL[:16] if not words.startswith("exact track, peak")
    ]


def test_figures_of_another_form_do_not_end_the_run(found: dict[str, Any]) -> None:
    assert ("decode: 1.6 times as fast as stock bf16", "not readable: TypeError", "–") in lines({**found, "vae": [3]})
