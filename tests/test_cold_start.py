"""The first job of a process: files are read while libraries are imported, and what it costs is told."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.importing import importing
from engine.progress import Progress, Update
from engine.settings import Settings
from handler import Worker, run
from model_handler import ModelHandler
from schemas.errors import Cancelled, InvalidInput, WeightsCorrupt
from tests.conftest import ROOT, data_uri, photo
from tests.engine.disk import Disk, readers

SVI = {
    "mode": "svi_endframe", "prompt": "a fox", "resolution": "96x64", "video_length": 9, "seed": 5,
    "image_start": data_uri(photo()), "image_end": data_uri(photo(seed=1)),
}  # fmt: skip

FIRST_PARTS = """
import json, sys
from pathlib import Path
from engine import readahead, weights
from engine.profiles import PROFILES
from engine.settings import Settings

seen = []
step = readahead.ReadAhead._steps

def watched(self):
    for _ in step(self):
        seen.append(("torch" in sys.modules, "diffusers" in sys.modules))
        yield
    seen.append([path.parent.name for path in self._files])

readahead.ReadAhead._steps = watched
baked = weights.locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=Path(sys.argv[1])))
parts = baked.parts()
[thread.join() for thread in parts.ahead._threads]
import diffusers
other = weights.locate(PROFILES["sdxl"], Settings(weights_dir=Path(sys.argv[1])))
print(json.dumps([seen[0], seen[-1], parts.ahead.bytes_read, other.parts().ahead is None]))
"""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    disk = Disk(monkeypatch)
    yield disk
    disk.gate.set()


def answer(worker: Worker, payload: object, progress: Progress | None = None, job_id: str = "job-1") -> dict[str, Any]:
    return run(payload, job_id=job_id, worker=worker, progress=progress or Progress())


def low_expert(twins: Path) -> Path:
    return next((twins / "wan22_i2v_svi/transformer_2").glob("*.safetensors")).resolve()


def test_files_are_read_before_the_libraries_are_imported(twins: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_PARTS, twins], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported, order, bytes_read, none_afterwards = json.loads(done.stdout)
    assert imported == [False, False]
    assert order == ["wan_vae", "umt5_xxl", "transformer", "transformer_2"]
    files = [next(twins.glob(f"*/{name}/*.safetensors")) for name in ("wan_vae", "umt5_xxl")]
    files += (twins / "wan22_i2v_svi").glob("transformer*/*.safetensors")
    assert bytes_read == sum(path.stat().st_size for path in files)
    assert none_afterwards  # nothing is left to import, and the next model is read at once


def test_first_job_says_where_its_loading_went(worker: Worker) -> None:
    first = answer(worker, SVI)["timings_s"]
    assert {"load", "load_import", "load_read", "load_wait"} <= set(first)
    assert "load_to_card" not in first  # there is no card here
    assert first["load_import"] <= first["load"]
    second = answer(worker, SVI, job_id="job-2")["timings_s"]
    assert not {"load_read", "load_wait"} & set(second)
    assert readers() == []


def test_bad_request_that_only_the_backend_sees_leaves_no_reader(worker: Worker, disk: Disk) -> None:
    with pytest.raises(InvalidInput):
        answer(worker, {**SVI, "loras_multipliers": ["1;0"]})
    assert readers() == []


def test_cancel_while_weights_come_ends_the_job_and_the_reading(worker: Worker, disk: Disk, twins: Path) -> None:
    disk.held = lambda path, _: path == low_expert(twins)
    disk.gate.clear()
    timers = [threading.Timer(0.2, lambda: progress.cancelled.set()), threading.Timer(0.4, disk.gate.set)]

    def waits_next(update: Update) -> None:
        if (update.stage, update.step) == ("denoise", 2):  # the high-noise steps are done
            for timer in timers:
                timer.start()

    progress = Progress(waits_next)
    with pytest.raises(Cancelled):
        answer(worker, SVI, progress)
    assert readers() == []
    assert answer(worker, SVI, job_id="job-2")["num_frames"] == 9
    assert worker.models.loads == 1


def test_weights_that_cannot_be_read_fail_the_job_and_the_next_loads_anew(
    worker: Worker, disk: Disk, twins: Path
) -> None:
    disk.fails = lambda path, _: path == low_expert(twins)
    with pytest.raises(WeightsCorrupt, match="cannot be read"):
        answer(worker, SVI)
    assert readers() == []
    disk.fails = lambda *_: False
    second = answer(worker, SVI, job_id="job-2")
    assert (second["num_frames"], "load_read" in second["timings_s"]) == (9, True)


def test_bad_request_does_not_wait_for_libraries_that_another_thread_imports(settings: Settings) -> None:
    inside, over = threading.Event(), threading.Event()

    def import_for_long() -> None:
        with importing():
            inside.set()
            over.wait()

    thread = threading.Thread(target=import_for_long)
    thread.start()
    try:
        inside.wait()
        with pytest.raises(InvalidInput):  # or else this waits for ever
            answer(Worker(settings, ModelHandler(settings)), SVI | {"video_length": 0})
    finally:
        over.set()
        thread.join()
