"""What a worker cannot hold, through handler.run on the twins: refused before it costs anything, or saved in tiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import admission, disk, inputs, video
from engine.admission import Gate
from engine.backends import Backend, load_backend
from engine.chain_state import ChainState, pack_state
from engine.outputs import Frames, MediaFile
from engine.progress import Progress
from engine.settings import Settings
from handler import Worker, run
from model_handler import SAVED_MEMORY, ModelHandler
from schemas.errors import DiskFull, FetchFailed, InvalidInput, OutOfMemory, RequestTooLarge
from schemas.request import Request
from tests.conftest import data_uri, photo

NOWHERE = "http://127.0.0.1:9/picture.png"  # refused by the fetch, if it is ever asked
PICTURE = data_uri(photo())
VIDEO = {
    "mode": "video", "prompt": "a fox", "height": 288, "width": 320, "num_frames": 5, "num_inference_steps": 1,
    "guidance_scale": 1, "seed": 5, "image_url": PICTURE,
}  # fmt: skip
SVI = {
    "mode": "svi_endframe", "prompt": "a fox", "resolution": "320x288", "video_length": 5, "num_inference_steps": 2,
    "seed": 5, "image_start": PICTURE, "image_end": data_uri(photo(seed=1)),
}  # fmt: skip
IMAGE = {
    "prompt": "a fox", "height": 640, "width": 576, "num_inference_steps": 1, "refiner_inference_steps": 4, "seed": 5,
}  # fmt: skip
SMALL_VIDEO = {**VIDEO, "height": 64, "width": 64}


def answer(worker: Worker, payload: object) -> dict[str, Any]:
    return run(payload, job_id="job-1", worker=worker, progress=Progress())


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames of each video as they go to the encoder, (F, H, W, 3)."""
    films: list[np.ndarray] = []
    write = video.write_mp4

    def write_and_keep(frames: Frames, path: Path) -> MediaFile:
        chunks: list[np.ndarray] = []

        def seen() -> Iterator[Any]:
            for chunk in frames.chunks:
                chunks.append(chunk)
                yield chunk

        file = write(replace(frames, chunks=seen()), path)
        films.append(np.concatenate(chunks))
        return file

    monkeypatch.setattr(video, "write_mp4", write_and_keep)
    return films


@dataclass
class FakeCard:
    """Loads backends whose decoders run out of memory, as the card's allocator would, over an area of latents."""

    most_latents: int

    def load(self, *arguments: Any) -> Backend:
        backend: Any = load_backend(*arguments)
        vae = backend._parts["vae"] if backend.profile.backend == "sdxl" else backend._placed.decoder
        vae.decoder.register_forward_pre_hook(self._allocate)
        return backend

    def _allocate(self, _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        batch, height, width = arguments[0].shape[0], *arguments[0].shape[-2:]
        if batch * height * width > self.most_latents:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def small_card(settings: Settings, most_latents: int) -> Worker:
    return Worker(settings, ModelHandler(settings, FakeCard(most_latents).load))


def test_request_that_cannot_fit_is_refused_before_anything_is_fetched_or_loaded(worker: Worker) -> None:
    with pytest.raises(RequestTooLarge, match="what fits: 1280x1280 with 113 frames, or 1232x1232 with 161 frames"):
        answer(worker, {**VIDEO, "image_url": NOWHERE, "height": 1280, "width": 1280, "num_frames": 161})
    assert worker.models.loads == 0


def test_without_admission_the_same_request_goes_on_to_fetch(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "admit", lambda *_: None)
    with pytest.raises(FetchFailed):
        answer(worker, {**VIDEO, "image_url": NOWHERE, "height": 1280, "width": 1280, "num_frames": 161})


def test_picture_too_large_to_be_changed_is_refused_before_loading(worker: Worker) -> None:
    picture = data_uri(photo().resize((4096, 4096)), "jpeg")
    with pytest.raises(RequestTooLarge, match="1 picture of 4096x4096 would take"):
        answer(worker, {"prompt": "a fox", "image_url": picture})
    assert worker.models.loads == 0


SMALL_SVI = {**SVI, "resolution": "96x64", "num_inference_steps": None}
ENDED = ChainState(torch.zeros(1, 16, 1, 8, 8), seed=5, next_index=1, anchor_sha256=bytes(32))
STATE = pack_state(ENDED)
NOT_NUMBERS = pack_state(replace(ENDED, motion=ENDED.motion / 0))
IMPOSSIBLE = [
    ({"loras_multipliers": "1;0 0;1"}, "loras_multipliers: has 2 entries; this profile has 4 LoRAs"),
    ({"state": STATE, "video_length": 13}, "state: holds 1 latents of 64x64; this job goes on from 1 latents of 96x64"),
    (
        {"video_length": 13, "resolution": "64x64", "state": NOT_NUMBERS},
        "state: holds values that are no numbers",
    ),
    (
        {"switch_threshold": 2, "num_inference_steps": 2},
        "switch_threshold: 2 gives 2 high + 0 low steps, and each expert needs at least one; with the steps at "
        "t = 1000.00, 4.98 it must be from 4.99 to below 1000.00",
    ),
    (
        {"return_state": True, "video_length": 5, "frame_policy": "window"},
        "return_state: needs a clip of at least 9 frames, got 5",
    ),
]
"""What no card can run, with the sentence that refuses it."""


@pytest.fixture
def loaded_media(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of the requests whose pictures were fetched."""
    modes: list[str] = []
    load = inputs.load

    def load_and_count(request: Request, *arguments: Any) -> inputs.Media:
        modes.append(request.mode)
        return load(request, *arguments)

    monkeypatch.setattr(inputs, "load", load_and_count)
    return modes


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=[next(iter(fields)) for fields, _ in IMPOSSIBLE])
def test_request_that_no_card_can_run_is_refused_before_anything_is_fetched_or_loaded(
    worker: Worker, loaded_media: list[str], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        answer(worker, {**SMALL_SVI, **fields})
    assert caught.value.sentence == sentence
    assert (loaded_media, worker.models.loads) == ([], 0)


@pytest.fixture(scope="module")
def loaded_worker(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One for several requests, which find the model that the first of them has loaded."""
    folder = tmp_path_factory.mktemp("worker")
    settings = Settings(weights_dir=twins, output_dir=folder / "output", outbox_dir=folder / "outbox")
    worker = Worker(settings, ModelHandler(settings))
    yield worker
    worker.models.unload_all()


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=[next(iter(fields)) for fields, _ in IMPOSSIBLE])
def test_without_the_early_look_the_same_is_refused_after_loading(
    loaded_worker: Worker,
    loaded_media: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    sentence: str,
) -> None:
    for name in ("check_inputs", "check_plan"):
        monkeypatch.setattr(admission, name, lambda *_: None)
    with pytest.raises(InvalidInput) as caught:
        answer(loaded_worker, {**SMALL_SVI, **fields})
    assert caught.value.sentence == sentence
    assert (loaded_media, loaded_worker.models.loads) == (["svi_endframe"], 1)


def test_picture_too_long_for_the_models_least_side_is_refused_before_loading(worker: Worker) -> None:
    long = data_uri(photo(64, 3200))
    with pytest.raises(InvalidInput, match="resolution: must have sides of at least 32, got 672x16"):
        answer(worker, {**SMALL_SVI, "resolution": None, "image_start": long})
    assert worker.models.loads == 0


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (VIDEO, "320x288 with 5 frames would be 0.000461 gigapixels of work"),
        (SVI, "320x288 with 5 frames would be 0.000922 gigapixels of work"),
        (IMAGE, "1 picture of 576x640 would be 0.00147 gigapixels of work"),
    ],
    ids=["video", "svi_endframe", "image"],
)
def test_work_over_the_operators_bound_is_refused(settings: Settings, payload: dict[str, Any], words: str) -> None:
    bounded = replace(settings, max_work_gpx=0.0001)
    worker = Worker(bounded, ModelHandler(bounded))
    with pytest.raises(RequestTooLarge, match=words):
        answer(worker, payload)
    assert worker.models.loads == 0


def test_full_disk_is_told_before_the_card_works(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", 2**60)
    with pytest.raises(DiskFull):
        answer(worker, SMALL_VIDEO)
    assert worker.models.loads == 0


@pytest.mark.parametrize(
    "payload", [pytest.param(VIDEO, id="video", marks=pytest.mark.soak), pytest.param(SVI, id="svi_endframe")]
)
def test_card_that_runs_out_while_decoding_is_saved_by_tiles(
    settings: Settings, rendered: list[np.ndarray], payload: dict[str, Any]
) -> None:
    card = FakeCard(32 * 32)
    worker = Worker(settings, ModelHandler(settings, card.load))
    assert SAVED_MEMORY in answer(worker, payload)["warnings"]
    card.most_latents = 36 * 40
    assert SAVED_MEMORY not in answer(worker, payload)["warnings"]
    assert worker.models.loads == 1
    tiled, whole = (film.astype(int) for film in rendered)
    assert 0 < abs(tiled - whole).max() <= 6  # levels of 255; 3 seen


def test_picture_is_saved_by_tiles_too(settings: Settings) -> None:
    response = answer(small_card(settings, 64 * 64), {**IMAGE, "num_images": 2})
    assert SAVED_MEMORY in response["warnings"]
    assert (response["width"], response["height"], len(response["images"])) == (576, 640, 2)


def test_card_too_small_even_for_tiles_is_answered_and_the_next_job_works(settings: Settings) -> None:
    worker = small_card(settings, 8 * 8)
    with pytest.raises(OutOfMemory, match=r"also in tiles and with the card to itself; try \d+x\d+ with 5 frames"):
        answer(worker, VIDEO)
    response = answer(worker, SMALL_VIDEO)
    assert SAVED_MEMORY not in response["warnings"]
    assert worker.models.loads == 1


def test_without_tiles_the_second_run_fails_like_the_first(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_one_piece(decode: Callable[[torch.Tensor], Any], latents: torch.Tensor) -> Any:
        return decode(latents)

    monkeypatch.setattr("engine.tiled_decode.decode_tiled", in_one_piece)
    with pytest.raises(OutOfMemory):
        answer(small_card(settings, 32 * 32), VIDEO)
