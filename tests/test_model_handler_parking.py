"""ModelHandler's profiles that make room for each other: parked and back, or unloaded and loaded anew, never half."""

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_handler
from engine import placing, profiles, weights
from engine.backends import Backend, Task, load_backend
from engine.card import Card
from engine.outputs import Frames, Images
from engine.profiles import Profile
from engine.progress import Progress
from engine.settings import Settings
from engine.standing import Standing
from model_handler import ModelHandler
from schemas.errors import GpuFault
from schemas.input_schema import parse_request
from tests.conftest import photo
from tests.engine.disk import Disk, readers
from tests.test_model_handler import (
    IMAGE,
    LARGE,
    VIDEO,
    Luggage,
    Rehearsal,
    Stage,
    models_of,
    picture_of,
    run,
    task_of,
)

POISON = "CUDA error: an illegal memory access was encountered"


def luggage(stage: Stage, number: int) -> Luggage:
    backend = stage.loaded[number]()
    assert isinstance(backend, Rehearsal)
    return backend.weights


def both(tmp_path: Path) -> tuple[Stage, ModelHandler]:
    """The first on its way out when the second is wanted, on a host that holds everything."""
    stage = Stage(picture_of)
    models = models_of(stage, 44.5, host_gib=200.0)
    run(models, IMAGE, tmp_path)
    return stage, models


def test_profiles_that_do_not_fit_together_take_turns_and_are_loaded_once(tmp_path: Path) -> None:
    stage, models = both(tmp_path)
    for payload in (VIDEO, IMAGE, VIDEO, IMAGE):
        run(models, payload, tmp_path)
    assert models.loads == 2
    assert (models.lot.parkings, models.lot.returns) == (4, 3)
    assert luggage(stage, 0).story == ["park", "bring back"] * 2
    assert luggage(stage, 1).story == ["park", "bring back", "park"]


def test_parked_profile_has_nothing_on_the_card(tmp_path: Path) -> None:
    _, models = both(tmp_path)
    run(models, VIDEO, tmp_path)
    assert list(models._loaded) == ["wan21_i2v_480p"]
    assert models._others_bytes(profiles.PROFILES["wan21_i2v_480p"]) == 0


def test_parked_profile_that_fits_beside_the_other_comes_back_beside_it(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 80.0, host_gib=200.0)
    run(models, VIDEO, tmp_path)
    run(models, {**IMAGE, "height": 2048, "width": 2048, "num_images": 4}, tmp_path)  # 54 GiB beside the weights
    assert luggage(stage, 0).story == ["park"]
    run(models, VIDEO, tmp_path)
    assert list(models._loaded) == ["sdxl", "wan21_i2v_480p"]
    assert (models.loads, models.lot.returns) == (2, 1)


def test_host_without_room_has_it_unloaded(tmp_path: Path) -> None:
    stage = Stage(picture_of)
    models = models_of(stage, 44.5, host_gib=0.0)
    for payload in (IMAGE, VIDEO, IMAGE):
        run(models, payload, tmp_path)
    assert stage.alive == [False, False, True]
    assert (models.loads, models.lot.parkings) == (3, 0)


def test_parked_placement_that_would_not_be_chosen_now_is_loaded_again(tmp_path: Path) -> None:
    stage, models = both(tmp_path)
    run(models, VIDEO, tmp_path)
    run(models, IMAGE, tmp_path)
    run(models, LARGE, tmp_path)  # it was parked resident, and this size must stream
    assert models._loaded["wan21_i2v_480p"].plan.kind == "stream"
    assert stage.alive == [True, False, True]
    run(models, {**IMAGE, "height": 2048, "width": 2432, "num_images": 2}, tmp_path)  # beside which not even that fits
    assert "wan21_i2v_480p" in models.lot
    run(models, VIDEO, tmp_path)  # and streaming is not what a usual one would be placed as
    assert models._loaded["wan21_i2v_480p"].plan.kind == "resident"
    assert models.loads == 4


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory")], ids=repr)
def test_fault_while_parking_unloads_and_the_next_job_loads_anew(fault: Exception, tmp_path: Path) -> None:
    stage, models = both(tmp_path)
    first = luggage(stage, 0)
    first.fault = fault
    run(models, VIDEO, tmp_path)
    assert first.story == ["park", "unload"]
    assert run(models, IMAGE, tmp_path).files
    assert (models.loads, models.lot.returns) == (3, 0)


def test_fault_on_the_way_back_loads_anew_in_the_same_job(tmp_path: Path) -> None:
    stage, models = both(tmp_path)
    first = luggage(stage, 0)
    run(models, VIDEO, tmp_path)
    first.fault = torch.OutOfMemoryError("CUDA out of memory")
    assert run(models, IMAGE, tmp_path).files
    assert first.story == ["park", "bring back", "unload"]
    assert stage.alive == [False, True, True]
    assert (models.loads, models.lot.returns) == (3, 0)


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows when the card is asked for its unused memory."""
    seen: list[str] = []
    monkeypatch.setattr(model_handler, "_give_back_cache", lambda **_: seen.append("asked"))
    return seen


@pytest.mark.parametrize("way", ["out", "back"])
def test_poisoned_card_ends_the_job_and_is_not_touched_again(way: str, tmp_path: Path, given_back: list[str]) -> None:
    stage, models = both(tmp_path)
    first = luggage(stage, 0)
    if way == "back":
        run(models, VIDEO, tmp_path)
    first.fault = RuntimeError(POISON)
    given_back.clear()
    with pytest.raises(GpuFault) as caught:
        run(models, VIDEO if way == "out" else IMAGE, tmp_path)
    assert caught.value.refresh_worker
    assert "unload" not in first.story
    # On the way back the other one has parked before, and given its memory back while the card was well.
    assert given_back == ([] if way == "out" else ["asked"])


def test_card_that_is_well_is_asked_for_its_memory(tmp_path: Path, given_back: list[str]) -> None:
    """What the test above would see if a poisoned card were touched."""
    stage, models = both(tmp_path)
    luggage(stage, 0).fault = MemoryError()
    given_back.clear()
    run(models, VIDEO, tmp_path)
    assert given_back == ["asked"]


def test_out_of_memory_parks_the_neighbour_and_it_comes_back(tmp_path: Path) -> None:
    attempts: list[bool] = []

    def full_at_first(task: Task, progress: Progress) -> Images | Frames:
        attempts.append(task.saves_memory)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return picture_of(task, progress)

    stage = Stage(picture_of)
    models = models_of(stage, 80.0, host_gib=200.0)
    run(models, VIDEO, tmp_path)
    stage.act = full_at_first
    assert run(models, IMAGE, tmp_path).files
    assert attempts == [False, True]
    run(models, VIDEO, tmp_path)
    assert luggage(stage, 0).story == ["park", "bring back"]
    assert models.loads == 2


def test_poison_while_the_neighbour_parks_after_out_of_memory_ends_the_job(
    tmp_path: Path, given_back: list[str]
) -> None:
    def full(_task: Task, _progress: Progress) -> Images | Frames:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage = Stage(picture_of)
    models = models_of(stage, 80.0, host_gib=200.0)
    run(models, VIDEO, tmp_path)
    luggage(stage, 0).fault = RuntimeError(POISON)
    stage.act = full
    given_back.clear()
    with pytest.raises(GpuFault):
        run(models, IMAGE, tmp_path)
    assert given_back == ["asked"]  # after the job that ran out, and not after the fault


def test_seconds_of_the_way_out_and_back_are_parts_of_load(tmp_path: Path) -> None:
    _, models = both(tmp_path)
    first, second, third = Progress(), Progress(), Progress()
    run(models, VIDEO, tmp_path, first)
    run(models, IMAGE, tmp_path, second)
    run(models, IMAGE, tmp_path, third)
    assert {"load_make_room"} == first.timings_s.keys() & {"load_make_room", "load_to_card"}
    assert second.timings_s.keys() >= {"load_make_room", "load_to_card"}
    assert second.timings_s["load"] >= second.timings_s["load_make_room"] + second.timings_s["load_to_card"] - 0.001
    assert not third.timings_s.keys() & {"load_make_room", "load_to_card"}


def test_unload_all_empties_the_lot_too(tmp_path: Path) -> None:
    stage, models = both(tmp_path)
    run(models, VIDEO, tmp_path)
    kept = [luggage(stage, number) for number in (0, 1)]
    models.unload_all()
    assert [each.story for each in kept] == [["park", "unload"], ["unload"]]
    assert stage.alive == [False, False]
    assert "sdxl" not in models.lot


SVI = {"mode": "svi_endframe", "resolution": "32x32", "video_length": 5, "prompt": "the tide", "seed": 7}


class Filmed:
    """A real backend whose frames and pictures are kept as they come."""

    def __init__(self, backend: Backend, seen: list[np.ndarray]) -> None:
        self._backend, self._seen = backend, seen
        self.unload = backend.unload

    @property
    def weights(self) -> Any:
        return self._backend.weights

    def generate(self, task: Task, progress: Progress) -> Images | Frames:
        made = self._backend.generate(task, progress)
        if isinstance(made, Images):
            self._seen += made.pictures
            return made
        return replace(made, chunks=self._kept(made.chunks))

    def _kept(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            self._seen.append(chunk.copy())
            yield chunk


class Studio:
    """A ModelHandler on the real twins, and what its last job made."""

    def __init__(self, twins: Path, folder: Path) -> None:
        self.seen: list[np.ndarray] = []
        self._twins, self._folder = twins, folder

        def load(profile: Profile, parts: Any, card: Card) -> Any:
            return Filmed(load_backend(profile, parts, card), self.seen)

        self.models = ModelHandler(Settings(weights_dir=twins, vram_gib=44.5), load)

    def job(self, payload: dict[str, Any]) -> torch.Tensor:
        if payload["mode" if "mode" in payload else "prompt"] == "svi_endframe":
            given = {name: photo(32, 32, seed) for seed, name in enumerate(("image_start", "image_end"))}
            request = parse_request({**payload, **dict.fromkeys(given, "data:,x")})
            task = Task(profiles.resolve(request), request, 3, given)
        else:
            task = task_of(payload)
        baked = weights.locate(task.profile, Settings(weights_dir=self._twins))
        self.seen.clear()
        self.models.generate(replace(task, profile=baked.profile), baked.parts(), self._folder, Progress())
        return torch.from_numpy(np.concatenate([np.atleast_1d(each).reshape(-1) for each in self.seen]))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Counts every read of weights."""
    return Disk(monkeypatch)


@pytest.fixture
def studio(twins: Path, tmp_path: Path) -> Iterator[Studio]:
    made = Studio(twins, tmp_path)
    yield made
    made.models.unload_all()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("payload", [SVI, VIDEO], ids=["svi_endframe", "video"])
def test_video_image_video_on_real_twins_loads_twice_reads_once_and_is_equal(
    payload: dict[str, Any], studio: Studio, disk: Disk
) -> None:
    models, lot = studio.models, studio.models.lot
    video, image = studio.job(payload), studio.job(IMAGE)
    reads, threads = len(disk.reads), threading.active_count()
    assert (models.loads, lot.parkings, lot.returns, lot.bytes_to_card) == (2, 1, 0, 0)
    first = lot.bytes_to_host
    assert torch.equal(studio.job(payload), video)
    second = lot.bytes_to_host - first
    open_files = descriptors()
    assert torch.equal(studio.job(IMAGE), image)
    assert torch.equal(studio.job(payload), video)
    assert (models.loads, lot.parkings, lot.returns) == (2, 4, 3)
    assert lot.bytes_to_host == first + second  # once each
    assert lot.bytes_to_card == 2 * first + second
    assert min(first, second) > 100_000
    assert len(disk.reads) == reads
    assert readers() == []
    assert threading.active_count() <= threads  # an earlier test's may have ended meanwhile
    assert descriptors() <= open_files


def test_unload_all_on_real_twins_leaves_no_weights(studio: Studio) -> None:
    studio.job(SVI)
    studio.job(IMAGE)
    parked = next(iter(studio.models.lot._parked.values())).weights
    assert parked.held_bytes > 0
    studio.models.unload_all()
    gc.collect()
    assert parked.held_bytes == 0
    assert {each.device.type for each in parked.vae.parameters()} == {"meta"}


def test_fault_in_the_middle_of_parking_a_real_twin_is_followed_by_an_equal_job(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.packing import HostCopy

    video = studio.job(SVI)
    with monkeypatch.context() as patch:
        settle, calls = HostCopy.settle, [0]

        def full(host: HostCopy, i: int) -> None:
            calls[0] += 1
            if calls[0] == 5:
                raise MemoryError
            settle(host, i)

        patch.setattr(HostCopy, "settle", full)
        studio.job(IMAGE)
    assert calls == [5]
    assert torch.equal(studio.job(SVI), video)
    assert (studio.models.loads, studio.models.lot.returns) == (3, 0)


def test_out_of_memory_in_the_middle_of_a_load_is_followed_by_a_whole_one(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing, calls = placing._standing, [0]

    def full_at_first(*args: Any) -> Standing:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return standing(*args)

    with monkeypatch.context() as patch:
        patch.setattr(placing, "_standing", full_at_first)
        video = studio.job(SVI)
    assert (calls, studio.models.loads, readers()) == ([2], 1, [])
    studio.models.unload_all()
    assert torch.equal(studio.job(SVI), video)
