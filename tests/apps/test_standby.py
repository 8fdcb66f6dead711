"""What is there before the first job, in a process of its own: libraries, and files on their way, but no model."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps import standby
from engine.settings import Settings
from model_handler import ModelHandler
from tests.conftest import ROOT

READY = """
import json, sys
from pathlib import Path
from engine.settings import Settings
from apps.standby import get_ready
from model_handler import ModelHandler

before = "torch" in sys.modules
settings = Settings(weights_dir=Path(sys.argv[1]))
get_ready(settings, ModelHandler(settings))

from engine import weights
from engine.profiles import PROFILES
from engine.readahead import ReadAhead

here = {name: name in sys.modules for name in ("torch", "diffusers", "engine.backends.wan_svi", "engine.backends.sdxl")}
ready = ReadAhead.last
if ready is not None:
    [thread.join() for thread in ready._threads]
parts = weights.locate(PROFILES["wan22_i2v_svi"], settings).parts()
print(json.dumps([before, here, ready is not None and ready.bytes_read, parts.ahead is ready, parts.ahead is None]))
"""


def ready_with(weights_dir: Path) -> Any:
    words = [sys.executable, "-c", READY, str(weights_dir)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_model(twins: Path, folder: Path) -> Path:
    for name in ("shared", "wan22_i2v_svi"):
        (folder / name).symlink_to(twins / name)
    return folder


def test_one_model_is_imported_and_its_files_are_read_and_its_job_finds_them_so(twins: Path, tmp_path: Path) -> None:
    before, here, bytes_read, is_the_jobs, _ = ready_with(one_model(twins, tmp_path))
    assert not before
    assert here == {"torch": True, "diffusers": True, "engine.backends.wan_svi": True, "engine.backends.sdxl": False}
    assert bytes_read > 0
    assert is_the_jobs


def test_of_several_models_what_all_need_is_imported_and_the_first_jobs_files_are_read_when_it_comes(
    twins: Path,
) -> None:
    before, here, bytes_read, _, is_none = ready_with(twins)
    assert not before
    assert here == {"torch": True, "diffusers": True, "engine.backends.wan_svi": False, "engine.backends.sdxl": False}
    assert bytes_read is False
    assert not is_none


def test_what_goes_wrong_is_left_to_the_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ImportError("/secret/place is broken")

    monkeypatch.setattr(standby, "import_common", broken)
    settings = Settings(weights_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        standby.get_ready(settings, ModelHandler(settings))
    assert caplog.messages == ["nothing is imported ahead of the first job (ImportError)"]
