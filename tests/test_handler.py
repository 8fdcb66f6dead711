"""The story of a request, end to end on the tiny twins: the response, the file, the errors, and what is left behind."""

import errno
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import model_handler
from engine import video
from engine.outputs import Frames, MediaFile
from engine.progress import Progress, Update
from engine.settings import Settings
from handler import Worker, run
from model_handler import ModelHandler
from schemas.errors import Cancelled, DeliveryFailed, DiskFull, InvalidInput, InvalidMedia, WeightsMissing
from tests.conftest import ROOT, data_uri, decode_video, photo

IMAGE = {
    "prompt": "a red fox",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "refiner_inference_steps": 4,
    "seed": 5,
}
VIDEO = {
    "mode": "video", "prompt": "a fox", "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "seed": 5,
    "image_url": data_uri(photo()),
}  # fmt: skip
SVI = {
    "mode": "svi_endframe", "prompt": "a fox", "resolution": "96x64", "video_length": 9, "seed": 5,
    "image_start": data_uri(photo()), "image_end": data_uri(photo(seed=1)),
}  # fmt: skip


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hash of each video's frames as they go to the encoder, whose own choices may differ from run to run."""
    digests: list[str] = []
    write = video.write_mp4

    def write_and_hash(frames: Frames, path: Path) -> MediaFile:
        digest = hashlib.sha256()

        def seen() -> Iterator[Any]:
            for chunk in frames.chunks:
                digest.update(chunk.tobytes())
                yield chunk

        file = write(replace(frames, chunks=seen()), path)
        digests.append(digest.hexdigest())
        return file

    monkeypatch.setattr(video, "write_mp4", write_and_hash)
    return digests


def answer(worker: Worker, payload: object, progress: Progress | None = None) -> dict[str, Any]:
    return run(payload, job_id="job-1", worker=worker, progress=progress or Progress())


def test_image_answers_what_worker_sdxl_answers_and_more(worker: Worker) -> None:
    response = answer(worker, IMAGE)
    assert response["image_url"] == response["images"][0]
    assert response["image_url"].startswith("data:image/png;base64,")
    assert response["seed"] == 5
    assert response["profile"] == "tiny/sdxl"
    assert (response["width"], response["height"], response["content_type"]) == (64, 64, "image/png")
    assert {"load", "denoise", "decode", "upload"} <= set(response["timings_s"])
    json.dumps(response, allow_nan=False)


@pytest.mark.parametrize(
    ("output_format", "magic"), [("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF"), ("png", b"\x89PNG")]
)
def test_image_comes_in_the_format_asked_for(worker: Worker, output_format: str, magic: bytes) -> None:
    import base64

    response = answer(worker, {**IMAGE, "output_format": output_format})
    assert response["content_type"] == f"image/{output_format}"
    assert base64.b64decode(response["image_url"].split(",")[1]).startswith(magic)


@pytest.mark.parametrize("payload", [VIDEO, SVI], ids=["video", "svi_endframe"])
def test_video_answers_with_what_the_file_holds(worker: Worker, payload: dict[str, Any]) -> None:
    response = answer(worker, payload)
    frames = decode_video(response["video_url"])
    assert Path(response["video_url"]).is_absolute()
    assert frames.shape == (9, 64, 96, 3)
    assert (response["num_frames"], response["height"], response["width"]) == (9, 64, 96)
    assert response["fps"] == 16
    assert response["duration_s"] == pytest.approx(9 / 16, abs=1 / 16)
    assert response["size_bytes"] == Path(response["video_url"]).stat().st_size
    assert response["profile"].startswith("tiny/")


@pytest.mark.parametrize("payload", [IMAGE, VIDEO, SVI], ids=["image", "video", "svi_endframe"])
def test_effective_posted_again_makes_the_same(worker: Worker, rendered: list[str], payload: dict[str, Any]) -> None:
    first = answer(worker, payload)
    again = {**first["effective"], **{k: v for k, v in payload.items() if k.startswith("image_")}}
    second = answer(worker, again)
    assert second["effective"] == first["effective"]
    assert second.get("image_url") == first.get("image_url")
    assert len(set(rendered)) == len(rendered) // 2


def test_lora_strengths_of_one_request_change_its_video_and_no_other(worker: Worker, rendered: list[str]) -> None:
    for extra in ({}, {"loras_multipliers": "0;0 0;0 5;0 0;5"}, {}):
        answer(worker, {**SVI, **extra})
    plain, strong, again = rendered
    assert plain == again
    assert strong != plain


def test_picture_hash_in_effective_is_that_of_the_file_sent(worker: Worker) -> None:
    import base64

    data = base64.b64decode(VIDEO["image_url"].split(",")[1])
    assert answer(worker, VIDEO)["effective"]["image_url"] == f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_seed_is_drawn_and_echoed_when_none_is_given(worker: Worker) -> None:
    seeds = {answer(worker, {**IMAGE, "seed": None})["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seed_zero_is_a_seed(worker: Worker) -> None:
    assert answer(worker, {**IMAGE, "seed": 0})["seed"] == 0


def test_bad_request_loads_nothing(worker: Worker) -> None:
    with pytest.raises(InvalidInput):
        answer(worker, {"prompt": 3, "hieght": 64})
    assert worker.models.loads == 0


def test_bad_picture_loads_nothing(worker: Worker) -> None:
    with pytest.raises(InvalidMedia):
        answer(worker, {**VIDEO, "image_url": "data:image/png;base64,aGVsbG8="})
    assert worker.models.loads == 0


def test_missing_weights_name_the_places_searched(tmp_path: Path) -> None:
    settings = Settings(weights_dir=tmp_path)
    with pytest.raises(WeightsMissing, match="WORKER_WEIGHTS_DIR"):
        answer(Worker(settings, ModelHandler(settings)), IMAGE)


def finish(worker: Worker) -> None:
    answer(worker, VIDEO)


def cancel(worker: Worker) -> None:
    progress = Progress(lambda update: progress.cancelled.set() if update.stage == "decode" else None)
    with pytest.raises(Cancelled):
        answer(worker, VIDEO, progress)
    assert not list(worker.settings.output_dir.rglob("*.mp4"))


def fail_to_deliver(worker: Worker) -> None:
    worker.settings.output_dir.write_text("a file where the folder should be")
    with pytest.raises(DeliveryFailed):
        answer(worker, VIDEO)


ENDINGS = [finish, cancel, fail_to_deliver]


@pytest.mark.parametrize("end", ENDINGS)
def test_job_leaves_no_work_folder_however_it_ends(
    end: Callable[[Worker], None], worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    end(worker)
    assert not list(tmp_path.glob("job-*"))


@pytest.mark.parametrize("end", ENDINGS)
def test_job_would_leave_its_work_folder_without_the_removal(
    end: Callable[[Worker], None], worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def kept(prefix: str) -> Iterator[str]:
        yield tempfile.mkdtemp(prefix=prefix)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", kept)
    end(worker)
    assert len(list(tmp_path.glob("job-*"))) == 1


@pytest.mark.parametrize("place", ["the folder", "a file"])
def test_full_disk_is_told_as_such_wherever_it_shows(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/job-x")

    if place == "the folder":
        monkeypatch.setattr(tempfile, "mkdtemp", full)
    else:
        monkeypatch.setattr(model_handler, "write_picture", full)
    with pytest.raises(DiskFull, match=r"^the worker's disk is full$"):
        answer(worker, IMAGE)


def test_progress_covers_the_whole_job(worker: Worker) -> None:
    updates: list[Update] = []
    answer(worker, VIDEO, Progress(updates.append))
    stages = list(dict.fromkeys(update.stage for update in updates))
    assert stages == ["fetch", "load", "encode", "denoise", "decode", "upload"]
    assert [u.percent for u in updates] == sorted(u.percent for u in updates)


def test_same_request_in_two_processes_gives_identical_frames(
    worker: Worker, rendered: list[str], twins: Path, tmp_path: Path
) -> None:
    code = (
        "import hashlib, json, sys\n"
        "from pathlib import Path\n"
        "import engine.video as video\n"
        "from engine.progress import Progress\n"
        "from engine.settings import Settings\n"
        "from handler import Worker, run\n"
        "from model_handler import ModelHandler\n"
        "digest = hashlib.sha256()\n"
        "real = video.write_mp4\n"
        "def write(frames, path):\n"
        "    def seen(chunks):\n"
        "        for chunk in chunks:\n"
        "            digest.update(chunk.tobytes())\n"
        "            yield chunk\n"
        "    return real(type(frames)(seen(frames.chunks), frames.shape, frames.fps), path)\n"
        "video.write_mp4 = write\n"
        f"settings = Settings(weights_dir=Path({str(twins)!r}), output_dir=Path({str(tmp_path)!r}))\n"
        "worker = Worker(settings, ModelHandler(settings))\n"
        "for payload in json.loads(sys.stdin.read()):\n"
        "    digest = hashlib.sha256()\n"
        "    run(payload, job_id='j', worker=worker, progress=Progress())\n"
        "    print(digest.hexdigest())\n"
    )

    payloads = [IMAGE, {**VIDEO, "seed": 6, "guidance_scale": 1.0}, VIDEO]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        input=json.dumps(payloads),
        capture_output=True,
        text=True,
        check=True,
    )
    _, other, among_others = done.stdout.split()
    answer(worker, VIDEO)
    assert rendered == [among_others]
    assert other != among_others
