"""handler.main() in this process: the settings, the door, and the exit code."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import handler
from engine import storage
from engine.inputs import CHILDREN
from engine.settings import Secret, Settings
from engine.spares import Spares


@pytest.fixture(autouse=True)
def spares(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spares]:
    """The decoders that a test's worker keeps, ended with the test."""
    kept = Spares()
    monkeypatch.setattr(handler, "SPARES", kept)
    yield kept
    kept.keep(0)


def test_main_runs_a_job_from_the_command_line(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    monkeypatch.setenv("WORKER_OUTPUT_DIR", str(tmp_path))
    steps = {"num_inference_steps": 2, "refiner_inference_steps": 4}
    job = {"input": {"prompt": "a fox", "height": 64, "width": 64, **steps}}
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


def test_main_sets_the_log_up_before_the_outbox_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep logs names keys, and must be redacted like everything else."""

    def look(_settings: Settings) -> int:
        seen.append(logging.raiseExceptions)  # `engine.log.configure` ends this
        return 0

    seen: list[bool] = []
    monkeypatch.setattr(storage, "sweep", look)
    take_no_job(monkeypatch)
    assert seen == [False]


def test_main_keeps_a_decoder_waiting_for_each_picture_that_is_decoded_at_a_time(
    spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_no_job(monkeypatch)
    assert len(spares._waiting) == CHILDREN


def take_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker to its end, and what it does beside jobs too."""
    monkeypatch.setattr(sys, "argv", ["handler.py", "--test_input", "[]"])
    assert handler.main() == 1
    for thread in threading.enumerate():
        if thread.name == "beside":
            thread.join()


def test_an_outbox_that_cannot_be_swept_is_logged_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        outbox_dir=tmp_path / "outbox",
        bucket_endpoint_url="no address at all",
        bucket_access_key_id=Secret("key"),
        bucket_secret_access_key=Secret("secret"),
    )
    storage.sweep_outbox(settings)
    assert "the outbox was not swept: BUCKET_ENDPOINT_URL" in caplog.text
