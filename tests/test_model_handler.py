"""ModelHandler: loads once, keeps what fits, evicts the oldest, gives memory back, and lets one job at the card."""

import gc
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_handler
from engine import profiles, weights
from engine.backends import Task
from engine.card import Card
from engine.card_errors import card_error
from engine.geometry import VideoShape
from engine.outputs import Frames, Images
from engine.profiles import Profile
from engine.progress import Progress
from engine.settings import Settings
from model_handler import SAVED_MEMORY, ModelHandler
from schemas.errors import BadOutput, Cancelled, GpuFault, OutOfMemory, RequestTooLarge
from schemas.input_schema import parse_request
from tests.conftest import data_uri, photo

IMAGE = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 2, "refiner_inference_steps": 4}
VIDEO = {"mode": "video", "num_frames": 5, "num_inference_steps": 1, "height": 64, "width": 64, "fps": 8}


class Luggage:
    """Weights of a Rehearsal: what happens to them, in words."""

    is_whole = True
    needed_bytes = 100
    held_bytes = 0

    def __init__(self) -> None:
        self.story: list[str] = []
        self.fault: Exception | None = None
        """Raised by whatever is done next, once."""

    def park(self) -> int:
        return self._do("park")

    def bring_back(self) -> int:
        return self._do("bring back")

    def unload(self) -> None:
        self._do("unload")

    def _do(self, what: str) -> int:
        self.story.append(what)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        return 100


class Rehearsal:
    """A backend of no weights: `act` is what its generate does."""

    def __init__(self, profile: Profile, act: Any) -> None:
        self.profile = profile
        self._act = act
        self.weights = Luggage()

    def generate(self, task: Task, progress: Progress) -> Images | Frames:
        return self._act(task, progress)

    def finish(self) -> None:
        self.weights.story.append("finish")

    def unload(self) -> None:
        self.weights.unload()


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


def models_of(stage: Any, vram_gib: float | None = None, host_gib: float = 0.0) -> ModelHandler:
    """`host_gib`: what the host has left; with nothing, whoever makes room is unloaded."""
    return ModelHandler(Settings(vram_gib=vram_gib), stage, lambda: int(host_gib * 2**30))


def run(models: ModelHandler, payload: dict[str, Any], folder: Path, progress: Progress | None = None) -> Any:
    task = task_of(payload)
    parts = weights.locate(task.profile, Settings(weights_dir=folder)).parts() if folder.name == "tiny" else None
    return models.generate(task, parts, _work(folder), progress or Progress())


def _work(folder: Path) -> Path:
    work = Path(folder) / "work" if folder.name != "tiny" else folder.parent.parent / "build" / "test-work"
    work.mkdir(parents=True, exist_ok=True)
    return work


def test_second_job_of_a_mode_loads_nothing(tmp_path: Path) -> None:
    models = models_of(Stage(picture_of))
    run(models, IMAGE, tmp_path)
    run(models, IMAGE, tmp_path)
    assert models.loads == 1


def test_profiles_that_do_not_fit_together_push_the_oldest_out_and_free_it(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 44.5)
    run(models, IMAGE, tmp_path)
    run(models, VIDEO, tmp_path)
    assert stage.alive == [False, True]  # sdxl and wan21 are over 44.5 GiB together
    run(models, IMAGE, tmp_path)
    assert stage.alive == [False, False, True]
    assert models.loads == 3


def test_profiles_that_fit_together_stay(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 80.0)
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
    models = models_of(stage)
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
    models = models_of(stage, 80.0)
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

    models = models_of(Stage(full))
    with pytest.raises(OutOfMemory, match=r"; try 2 pictures of 400x400, or 1 picture of 512x512$"):
        run(models, {**IMAGE, "num_images": 2, "height": 512, "width": 512}, tmp_path)
    assert run(models, IMAGE, tmp_path).files


def test_second_run_after_out_of_memory_saves_memory_and_says_so(tmp_path: Path) -> None:
    seen: list[bool] = []

    def full_unless_saving(task: Task, progress: Progress) -> Images | Frames:
        seen.append(task.saves_memory)
        if not task.saves_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return picture_of(task, progress)

    stage = Stage(full_unless_saving)
    models = models_of(stage)
    assert run(models, IMAGE, tmp_path).notes == (SAVED_MEMORY,)
    stage.loaded[0]()._act = picture_of
    assert run(models, IMAGE, tmp_path).notes == ()  # the next job decodes in one piece again
    assert seen == [False, True]


def test_out_of_memory_is_answered_when_nothing_holds_its_tensors_any_more(tmp_path: Path) -> None:
    held: list[weakref.ref[Any]] = []

    def full(_task: Task, _progress: Progress) -> Images | Frames:
        activations = np.zeros(1_000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory) as caught:
        run(models_of(Stage(full)), IMAGE, tmp_path)
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_library_without_room_for_its_workspace_is_out_of_memory_and_no_fault(words: str) -> None:
    assert isinstance(card_error(RuntimeError(words)), OutOfMemory)


LARGE = {**VIDEO, "height": 1280, "width": 1280, "num_frames": 81}


def test_request_too_large_for_any_placement_loads_nothing(tmp_path: Path) -> None:
    models = models_of(Stage(picture_of), 44.5)
    with pytest.raises(RequestTooLarge, match="what fits: 1280x1280 with 113 frames"):
        run(models, {**LARGE, "num_frames": 161}, tmp_path)
    assert models.loads == 0


def test_request_without_room_in_the_loaded_placement_loads_it_again_and_keeps_that(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 44.5)
    kinds = []
    for payload in (VIDEO, LARGE, LARGE, VIDEO):
        run(models, payload, tmp_path)
        kinds.append(models._loaded["wan21_i2v_480p"].plan.kind)
    assert kinds == ["resident", "stream", "stream", "stream"]  # streaming costs a small one nothing that shows
    assert models.loads == 2
    assert stage.alive == [False, True]


def test_request_with_room_in_the_loaded_placement_loads_nothing(tmp_path: Path) -> None:
    models = models_of(Stage(picture_of), 44.5)
    run(models, VIDEO, tmp_path)
    run(models, {**VIDEO, "height": 480, "width": 832, "num_frames": 161}, tmp_path)
    assert models.loads == 1


def test_backend_is_told_the_largest_clip_that_it_must_have_room_for(tmp_path: Path) -> None:
    shapes: list[VideoShape | None] = []

    def load(profile: Profile, _parts: object, card: Card) -> Rehearsal:
        shapes.append(card.shape)
        return Rehearsal(profile, picture_of)

    models = models_of(load, 44.5)
    run(models, VIDEO, tmp_path)
    run(models, LARGE, tmp_path)
    assert shapes == [VideoShape(81, 480, 832), VideoShape(81, 1280, 1280)]


def test_card_without_room_for_the_usual_size_still_runs_a_smaller_one(tmp_path: Path) -> None:
    models = models_of(Stage(picture_of), 12.0)
    with pytest.raises(RequestTooLarge):
        run(models, IMAGE | {"height": 1024, "width": 1024}, tmp_path)
    assert run(models, IMAGE, tmp_path).files


def test_large_request_pushes_a_neighbour_out_that_a_small_one_leaves(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 80.0)
    run(models, IMAGE, tmp_path)
    run(models, VIDEO, tmp_path)
    assert stage.alive == [True, True]
    run(models, IMAGE | {"height": 2048, "width": 2048, "num_images": 4}, tmp_path)  # 54 GiB beside the weights
    assert stage.alive == [True, False]
    assert models.loads == 2


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
        run(models_of(Stage(fault)), IMAGE, tmp_path)
    assert caught.value.refresh_worker
    assert words not in caught.value.sentence


def test_fault_that_shows_only_when_the_card_gives_memory_back_replaces_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fault)
    with pytest.raises(GpuFault):
        model_handler._give_back_cache()


def test_host_without_room_for_the_encoders_beside_a_card_is_told_and_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models_of(Stage(picture_of), 44.5, host_gib=16.0).limits.host_bytes is None  # nothing is beside a CPU
    monkeypatch.setattr(model_handler, "device", lambda: "cuda")
    models = models_of(Stage(picture_of), 44.5, host_gib=16.0)
    assert models.limits.host_bytes == 12 * 2**30  # the lot's margin is left alone
    with pytest.raises(RequestTooLarge, match=r"would take 12\.9 GiB of host memory, and this host has 12\.0 GiB"):
        run(models, {**VIDEO, "height": 480, "width": 832, "num_frames": 81}, tmp_path)
    assert models.loads == 0
    roomy = models_of(Stage(picture_of), 44.5, host_gib=17.0)
    assert run(roomy, VIDEO, tmp_path).files


def test_other_runtime_errors_are_not_taken_for_the_cards(tmp_path: Path) -> None:
    def bug(*_: object) -> Images | Frames:
        raise RuntimeError("shape mismatch")

    assert card_error(RuntimeError("shape mismatch")) is None
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(models_of(Stage(bug)), IMAGE, tmp_path)


def most_at_the_card_of_four(models: ModelHandler, stage: Stage, folder: Path, alone_s: float) -> int:
    """Four jobs at once, each on the card until another one is, or for `alone_s`."""
    inside: set[int] = set()
    most = 0
    company = threading.Event()
    gate = threading.Barrier(4)

    def watched(task: Task, progress: Progress) -> Images | Frames:
        nonlocal most
        inside.add(threading.get_ident())
        most = max(most, len(inside))
        if most > 1:
            company.set()
        company.wait(alone_s)
        inside.remove(threading.get_ident())
        return picture_of(task, progress)

    def job(number: int) -> None:
        gate.wait()
        run(models, IMAGE, folder / str(number))

    stage.act = watched
    for backend in stage.loaded:
        backend()._act = watched
    threads = [threading.Thread(target=job, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_two_jobs_are_never_at_the_card_together(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    assert most_at_the_card_of_four(models_of(stage), stage, tmp_path, alone_s=0.3) == 1


def test_without_the_lock_they_would_be(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage)
    models._lock = nullcontext()
    run(models, IMAGE, tmp_path)  # loaded once, by one
    assert most_at_the_card_of_four(models, stage, tmp_path, alone_s=60.0) > 1


def test_cancelled_job_frees_the_card_for_the_next(tmp_path: Path) -> None:
    def stops(task: Task, progress: Progress) -> Images | Frames:
        progress.check()
        return picture_of(task, progress)

    models = models_of(Stage(stops))
    cancelled = Progress()
    cancelled.cancelled.set()
    with pytest.raises(Cancelled):
        run(models, IMAGE, tmp_path, cancelled)
    assert run(models, IMAGE, tmp_path).files


def test_image_video_image_on_real_twins_gives_the_firsts_memory_back(twins: Path) -> None:
    models = ModelHandler(Settings(weights_dir=twins, vram_gib=44.5), free_host_bytes=lambda: 0)
    first = run(models, IMAGE, twins)
    unet = weakref.ref(models._loaded["sdxl"].backend._parts["unet"])
    run(models, VIDEO, twins)
    gc.collect()
    assert unet() is None
    assert first.files[0].sha256 == run(models, IMAGE, twins).files[0].sha256
    assert models.loads == 3
