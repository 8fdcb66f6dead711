"""ModelHandler: loads once, keeps what fits, evicts the oldest, gives memory back, and lets one job at the card."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import profiles, weights
from engine.backends import Task
from engine.geometry import VideoShape
from engine.outputs import Frames, Images
from engine.profiles import Profile
from engine.progress import Progress
from engine.settings import Settings
from model_handler import ModelHandler, card_error
from schemas.errors import BadOutput, Cancelled, GpuFault, OutOfMemory
from schemas.input_schema import parse_request
from tests.conftest import data_uri, photo

IMAGE = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 2, "refiner_inference_steps": 4}
VIDEO = {"mode": "video", "num_frames": 5, "num_inference_steps": 1, "height": 64, "width": 64, "fps": 8}


class Rehearsal:
    """A backend of no weights: `act` is what its generate does."""

    def __init__(self, profile: Profile, act: Any) -> None:
        self.profile = profile
        self._act = act
        self.weights = np.zeros(1_000_000)

    def generate(self, task: Task, progress: Progress) -> Images | Frames:
        return self._act(task, progress)

    def unload(self) -> None:
        del self.weights


class Stage:
    """Loads Rehearsals, and remembers each by a weak reference."""

    def __init__(self, act: Any) -> None:
        self.act = act
        self.loaded: list[weakref.ref[Rehearsal]] = []

    def __call__(self, profile: Profile, *_: object) -> Rehearsal:
        backend = Rehearsal(profile, self.act)
        self.loaded.append(weakref.ref(backend))
        return backend

    @property
    def alive(self) -> list[bool]:
        gc.collect()
        return [reference() is not None for reference in self.loaded]


def picture_of(task: Task, _progress: Progress) -> Images | Frames:
    pixels = np.random.default_rng(task.seed).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    if task.profile.backend == "sdxl":
        return Images([pixels[0]])
    return Frames(iter([pixels]), VideoShape(5, 64, 64), 8)


def task_of(payload: dict[str, Any]) -> Task:
    picture = photo(64, 64)
    if payload.get("mode") == "video":
        payload = {**payload, "image_url": data_uri(picture)}
    request = parse_request(payload)
    return Task(profiles.resolve(request), request, 3, {"image_url": picture} if "image_url" in payload else {})


def run(models: ModelHandler, payload: dict[str, Any], folder: Path, progress: Progress | None = None) -> Any:
    task = task_of(payload)
    parts = weights.locate(task.profile, Settings(weights_dir=folder)).parts() if folder.name == "tiny" else None
    return models.generate(task, parts, _work(folder), progress or Progress())


def _work(folder: Path) -> Path:
    work = Path(folder) / "work" if folder.name != "tiny" else folder.parent.parent / "build" / "test-work"
    work.mkdir(parents=True, exist_ok=True)
    return work


def test_second_job_of_a_mode_loads_nothing(tmp_path: Path) -> None:
    models = ModelHandler(Settings(), Stage(picture_of))
    run(models, IMAGE, tmp_path)
    run(models, IMAGE, tmp_path)
    assert models.loads == 1


def test_profiles_that_do_not_fit_together_push_the_oldest_out_and_free_it(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = ModelHandler(Settings(vram_gib=44.5), stage)
    run(models, IMAGE, tmp_path)
    run(models, VIDEO, tmp_path)
    assert stage.alive == [False, True]  # sdxl and wan21 are over 44.5 GiB together
    run(models, IMAGE, tmp_path)
    assert stage.alive == [False, False, True]
    assert models.loads == 3


def test_profiles_that_fit_together_stay(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = ModelHandler(Settings(vram_gib=80.0), stage)
    for payload in (IMAGE, VIDEO, IMAGE, VIDEO):
        run(models, payload, tmp_path)
    assert stage.alive == [True, True]
    assert models.loads == 2


def test_failed_job_leaves_its_profile_loaded_and_the_next_job_works(tmp_path: Path) -> None:
    def fail_once(task: Task, progress: Progress) -> Images | Frames:
        if stage.act is fail_once:
            stage.act = picture_of
            raise BadOutput("flat")
        return picture_of(task, progress)

    stage = Stage(fail_once)
    models = ModelHandler(Settings(), stage)
    with pytest.raises(BadOutput):
        run(models, IMAGE, tmp_path)
    stage.loaded[0]()._act = picture_of
    assert run(models, IMAGE, tmp_path).files
    assert models.loads == 1


def test_out_of_memory_is_tried_once_more_with_the_card_to_itself(tmp_path: Path) -> None:
    attempts: list[int] = []

    def full_at_first(task: Task, progress: Progress) -> Images | Frames:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return picture_of(task, progress)

    stage = Stage(picture_of)
    models = ModelHandler(Settings(vram_gib=80.0), stage)
    run(models, VIDEO, tmp_path)
    stage.act = full_at_first
    assert run(models, IMAGE, tmp_path).files
    assert attempts == [0, 1]
    assert stage.alive == [False, True]  # the other profile had to go


def test_out_of_memory_twice_is_answered_and_the_next_job_works(tmp_path: Path) -> None:
    def full(task: Task, _progress: Progress) -> Images | Frames:
        if task.request.num_images > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return picture_of(task, _progress)

    models = ModelHandler(Settings(), Stage(full))
    with pytest.raises(OutOfMemory, match="smaller size"):
        run(models, {**IMAGE, "num_images": 2}, tmp_path)
    assert run(models, IMAGE, tmp_path).files


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_poisoned_context_is_a_gpu_fault_that_replaces_the_worker(words: str, tmp_path: Path) -> None:
    def fault(*_: object) -> Images | Frames:
        raise RuntimeError(words)

    with pytest.raises(GpuFault) as caught:
        run(ModelHandler(Settings(), Stage(fault)), IMAGE, tmp_path)
    assert caught.value.refresh_worker
    assert words not in caught.value.sentence


def test_other_runtime_errors_are_not_taken_for_the_cards(tmp_path: Path) -> None:
    def bug(*_: object) -> Images | Frames:
        raise RuntimeError("shape mismatch")

    assert card_error(RuntimeError("shape mismatch")) is None
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(ModelHandler(Settings(), Stage(bug)), IMAGE, tmp_path)


def test_two_jobs_are_never_at_the_card_together(tmp_path: Path) -> None:
    inside, most = 0, 0
    gate = threading.Barrier(4)

    def watched(task: Task, progress: Progress) -> Images | Frames:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        made = picture_of(task, progress)
        inside -= 1
        return made

    models = ModelHandler(Settings(), Stage(watched))

    def job() -> None:
        gate.wait()
        run(models, IMAGE, tmp_path)

    threads = [threading.Thread(target=job) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_cancelled_job_frees_the_card_for_the_next(tmp_path: Path) -> None:
    def stops(task: Task, progress: Progress) -> Images | Frames:
        progress.check()
        return picture_of(task, progress)

    models = ModelHandler(Settings(), Stage(stops))
    cancelled = Progress()
    cancelled.cancelled.set()
    with pytest.raises(Cancelled):
        run(models, IMAGE, tmp_path, cancelled)
    assert run(models, IMAGE, tmp_path).files


def test_image_video_image_on_real_twins_gives_the_firsts_memory_back(twins: Path) -> None:
    models = ModelHandler(Settings(weights_dir=twins, vram_gib=44.5))
    first = run(models, IMAGE, twins)
    unet = weakref.ref(models._loaded["sdxl"][1]._parts["unet"])
    run(models, VIDEO, twins)
    gc.collect()
    assert unet() is None
    assert first.files[0].sha256 == run(models, IMAGE, twins).files[0].sha256
    assert models.loads == 3
