"""`handler.py` on the command line, with the fake job: exit codes, and the response as stdout's last line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps import runpod_local, runpod_worker
from engine.settings import ROOT, Settings
from tests.apps.conftest import FAKE_WORKER
from tests.apps.fake_job import run

Result = subprocess.CompletedProcess[str]


def command(folder: Path, *arguments: str) -> Result:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C"}
    return subprocess.run(
        [sys.executable, FAKE_WORKER, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_job_as_json_prints_its_whole_response_last(tmp_path: Path) -> None:
    done = command(tmp_path, "--test_input", '{"input": {"echo": "é", "then": "big", "size": 20000}}')
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1]) == {"video": "x" * 20000}


def test_a_job_in_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"input": {"echo": "ü"}}', encoding="utf-8")
    done = command(tmp_path, "--test_input", "job.json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["echo"] == "ü"


def test_an_invalid_job_exits_1_with_a_line_per_problem(tmp_path: Path) -> None:
    done = command(tmp_path, "--test_input", '{"input": {"then": "invalid"}}')
    assert done.returncode == 1
    assert "prompt: is missing\nseed: must be an integer ?\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["code"] == "invalid_input"


def test_a_lost_card_exits_1_with_the_response(tmp_path: Path) -> None:
    done = command(tmp_path, "--test_input", '{"input": {"then": "fault"}}')
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "gpu_fault"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ('{"input": ', "is not JSON"),
        ("{" * 100_000, "is not JSON"),
        ('{"input": ' + "[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "must be a JSON object"),
        ('{"input": null}', "must be a JSON object"),
        ('{"id": 5, "input": {}}', "id must be a string"),
        ("no such file", "neither JSON nor a file"),
        ("", "neither JSON nor a file"),
        (".", "neither JSON nor a file"),
        ("x" * 5000, "neither JSON nor a file"),
        ("nul\0byte", "neither JSON nor a file"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_job_exits_1_with_one_line(given: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runpod_worker.serve(run, Settings(), ["--test_input", given]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
    assert len(err) < 500


def test_a_file_that_is_not_text_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.json").write_bytes(b"\xff\xfe{")
    assert runpod_worker.serve(run, Settings(), ["--test_input", str(tmp_path / "job.json")]) == 1
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--test_input"], []], ids=["flag", "nothing"])
def test_without_a_job_the_file_beside_the_handler_is_run(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_input.json").write_text('{"input": {"echo": 7}}')
    monkeypatch.setattr(runpod_worker, "TEST_INPUT", tmp_path / "test_input.json")
    assert runpod_worker.serve(run, Settings(), argv) == 0
    assert json.loads(capsys.readouterr().out)["echo"] == 7


def test_the_file_beside_the_handler_is_found_from_anywhere() -> None:
    assert runpod_local.TEST_INPUT == ROOT / "test_input.json"
    assert runpod_local.TEST_INPUT.is_absolute()


def test_an_empty_input_reaches_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert runpod_worker.serve(run, Settings(), ["--test_input", '{"input": {}}']) == 0
    assert json.loads(capsys.readouterr().out)["video_url"] == "file:///video.mp4"


@pytest.mark.parametrize(
    "argv",
    [
        ["--test_inputs", "{}"],
        ["--test"],
        ["stray"],
        ["--rp_debugger"],
        ["--rp_serve_api", "--test_input", "{}"],
        ["--rp_api_port", "8001"],
        ["--test_input", "{}", "--rp_api_host", "0.0.0.0"],
        ["--plan", "--plan"],
        ["--warm-up"],
    ],
    ids=str,
)
def test_a_flag_that_is_unknown_or_has_no_effect_is_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        runpod_worker.serve(run, Settings(), argv)
    assert exit_.value.code == 2
    assert "usage: handler.py" in capsys.readouterr().err
