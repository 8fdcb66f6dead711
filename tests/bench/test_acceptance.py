"""All that is measured on a card in one go: its programs exist, run one after the other, and leave their figures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import acceptance, cold, modes
from bench.acceptance import CHILDREN, Child, results, run_all
from bench.processes import ROOT

HERE = "tests.bench.acceptance_child"
FIGURES = Child("svi", 120, f"{HERE} figures {{result}}")
SEEN = [{"seen": "expandable_segments:True"}]  # without it a card's memory breaks into fragments below the cap
FAILS = Child("cold", 120, f"{HERE} fails")


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(output: Path, name: str, number: int = 1) -> dict[str, Any]:
    return json.loads((output / name / str(number) / "ended.json").read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("child", [child for child in CHILDREN if child.name != "tests"], ids=lambda child: child.name)
def test_every_program_takes_its_options(child: Child) -> None:
    parsers = {"bench": bench._arguments, "bench.cold": cold._arguments, "bench.modes": modes._arguments}
    _, _, program, *options = child.command(Path("kept.json"))
    args = parsers[program]().parse_args(options)
    assert args.json == Path("kept.json")
    if program == "bench":
        assert [*bench._cells(args), *bench._rows(args)]


def test_programs_measure_what_is_asked_for() -> None:
    rows = {
        child.name: [
            (row.cell["what"], row.cell["mode"], row.cell["precision"], row.layout) for row in bench._rows(args)
        ]
        for child in CHILDREN
        if child.call.startswith("bench jobs")
        for args in [bench._arguments().parse_args(child.command(Path())[3:])]
    }
    assert rows == {
        "svi": [
            ("plain", "svi_endframe", "bf16", None),
            ("ours", "svi_endframe", "fp8", "svi_latent"), ("ours", "svi_endframe", "fp8", "flf"),
        ],
        "exact": [("ours", "svi_endframe", "bf16", "svi_latent")],
        "attention8": [("ours", "svi_endframe", "fp8", "svi_latent")] * 2,
        "sdxl": [("plain", "image", "bf16", None), ("ours", "image", "bf16", None)],
        "lightning": [("ours", "lightning", "fp8", None)],
        "many": [("ours", "short", "fp8", None)],
    }  # fmt: skip


def test_files_with_tests_for_a_card_are_all_named() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "\n@pytest.mark.gpu\n" in path.read_text()]
    assert " ".join(sorted(path.relative_to(ROOT).as_posix() for path in marked)) == acceptance.FILES


def test_program_leaves_its_output_its_figures_and_how_it_ended(tmp_path: Path, capfd: Any) -> None:
    assert run_all([FIGURES], tmp_path) == 0
    assert (tmp_path / "svi" / "1" / "stdout.txt").read_text() == "figures begins\none figure\n"
    assert results(tmp_path) == {"svi": SEEN}
    assert (ended(tmp_path, "svi")["exit_code"], ended(tmp_path, "svi")["said"]) == (0, "one figure")
    told = capfd.readouterr()
    assert " s: one figure\n" in told.err
    assert told.out.startswith("| asked for | seen | reached |")
    assert (tmp_path / "table.md").read_text() == told.out


def test_program_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, capfd: Any) -> None:
    assert run_all([FAILS, FIGURES], tmp_path) == 1
    assert "cold: exit code 3 after " in capfd.readouterr().err
    assert ended(tmp_path, "cold")["said"] == "fails begins | no card"
    assert results(tmp_path) == {"svi": SEEN}


def test_program_that_overruns_is_ended_with_what_it_started(tmp_path: Path, capfd: Any) -> None:
    for number, limit_s in enumerate((2, 10, 60), 1):  # a busy machine may not have come to the point in two seconds
        assert run_all([Child("svi", limit_s, f"{HERE} stays {{result}}")], tmp_path) == 1
        assert (ended(tmp_path, "svi", number)["exit_code"], results(tmp_path).keys() <= {"svi"}) == (None, True)
        if results(tmp_path):
            break
    assert "svi: overran and was killed after " in capfd.readouterr().err
    assert not is_alive(results(tmp_path)["svi"]["pid"])


def test_end_of_the_whole_run_ends_the_program_at_work(tmp_path: Path) -> None:
    kept = tmp_path / "svi" / "1" / "result.json"
    code = (
        f"import sys; from bench import acceptance; from bench.acceptance import Child\n"
        f"acceptance.CHILDREN = (Child('svi', 600, '{HERE} stays {{result}}'),)\n"
        f"sys.argv = ['acceptance', '--output', {str(tmp_path)!r}]\n"
        "sys.exit(acceptance.main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        while acceptance._read(kept) is None:
            assert run.poll() is None
            time.sleep(0.05)
        run.terminate()
        told, _ = run.communicate()
    assert run.returncode == 143
    assert told.startswith("| asked for")
    assert not is_alive(acceptance._read(kept)["pid"])


@pytest.mark.parametrize(
    ("words", "ran"),
    [([], ["svi", "cold"]), (["--skip", "done"], ["cold"]), (["svi"], ["svi"]), (["svi", "--skip", "done"], [])],
)
def test_what_runs_is_chosen_by_name_and_by_what_is_there(
    words: list[str], ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "CHILDREN", (FIGURES, FAILS))
    for name, code in (("svi", 0), ("cold", 1)):
        acceptance.keep(tmp_path / name / "1" / "ended.json", {"exit_code": code, "seconds": 1.0, "said": ""})
    chosen: list[str] = []
    monkeypatch.setattr(acceptance, "run_all", lambda children, _: chosen.extend(one.name for one in children))
    monkeypatch.setattr(sys, "argv", ["acceptance", "--output", str(tmp_path), *words])
    acceptance.main()
    assert chosen == ran


def test_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        acceptance._arguments().parse_args(["--output", "x", "speed"])
    assert "'speed' is none of them" in capsys.readouterr().err


def test_figures_are_those_of_the_attempt_that_ended_well_else_of_the_newest(tmp_path: Path) -> None:
    def attempt(number: int, seen: object, code: int | None) -> None:
        acceptance.keep(tmp_path / "svi" / str(number) / "result.json", seen)
        how = {"exit_code": code, "seconds": 1.0, "said": ""}
        acceptance.keep(tmp_path / "svi" / str(number) / "ended.json", how)

    attempt(9, "older", None)
    attempt(10, "newer", 1)
    assert results(tmp_path) == {"svi": "newer"}
    attempt(2, "well", 0)
    assert results(tmp_path) == {"svi": "well"}
    attempt(11, "not even begun", None)
    (tmp_path / "svi" / "11" / "result.json").write_text('{"cut')
    assert results(tmp_path) == {"svi": "well"}


@pytest.mark.soak
def test_programs_run_through_with_the_twins_and_their_figures_are_read(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a card, but for sizes and repeats; one program of each kind, and none that is about the full size."""
    small = {"bench": f"--size twin --twins {twins} --precision bf16 --repeats 1"}
    small["bench.modes"] = f"--small --twins {twins} --rounds 2"
    small["bench.cold"] = f"--small --twins {twins} --weights {tmp_path / 'weights'} --processes 1"
    chosen = [
        Child(child.name, 600, f"{child.call} {small[child.call.split()[0]]}")
        for child in CHILDREN
        if child.name in ("svi", "restarted", "cold", "sdxl", "modes", "lightning")
    ]
    assert run_all(chosen, tmp_path / "kept") == 0
    told = dict(line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:])
    assert not [seen for seen in told.values() if seen.startswith("not readable")]
    assert [words.removeprefix("| ") for words, seen in told.items() if seen != "no result"] == [
        "svi_endframe: 4.7 times as fast as plain, goal 5", "svi_endframe: 13.8 s, goal 13",
        "the same frames by plain's arithmetic (flf), as fast", "the same: 13.8 s",
        "peak reserved: 44.0 GiB", "all resident: no weight moves in a warm job",
        "first job, warm compile cache: 1.35 of a warm one", "first job, files in memory: 1.35 of a warm one",
        "first job, cold compile cache: 1.35 of a warm one + 5 s",
        "first job, cold compile cache, files in memory: 1.35 of a warm one + 5 s",
        "first job, waited for: 1.35 of a warm one", "first job, warmed up before it: 1.35 of a warm one",
        "weights read: 80 % of dd", "SDXL: 1.8 times as fast as worker-sdxl's way",
        "modes: back from host memory, the same pixels, nothing left", "video in 4 distilled forwards",
    ]  # fmt: skip
