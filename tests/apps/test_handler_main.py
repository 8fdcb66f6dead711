"""handler.main() in this process: the settings, the door, and the exit code."""

import json
import sys
from pathlib import Path

import pytest

import handler


def test_main_runs_a_job_from_the_command_line(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    monkeypatch.setenv("WORKER_OUTPUT_DIR", str(tmp_path))
    job = {"input": {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 2}}
    monkeypatch.setattr(sys, "argv", ["handler.py", "--test_input", json.dumps(job)])
    assert handler.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["profile"] == "tiny/sdxl"


def test_main_refuses_to_start_with_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_VRAM_GIB", "lots")
    monkeypatch.setattr(sys, "argv", ["handler.py"])
    assert handler.main() == 1
    assert capsys.readouterr().err == "settings_error: WORKER_VRAM_GIB is 'lots', not a number of GiB\n"
