"""A request whose file goes to a real S3 server: the URL plays, and the same job delivered twice is made once."""

import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from engine.bucket import Bucket
from engine.progress import Progress
from engine.storage import sweep
from handler import Worker, run
from model_handler import ModelHandler
from schemas.errors import DeliveryFailed
from tests.conftest import decode_video
from tests.servers.buckets import contents, settings_for
from tests.servers.fault_proxy import FaultProxy
from tests.servers.swift import Swift
from tests.test_handler import IMAGE, VIDEO

pytest_plugins = ["tests.servers.s3_fixtures"]


def worker_for(bucket: Bucket, twins: Path, folder: Path, **changes: str) -> Worker:
    settings = replace(settings_for(bucket, folder, **changes), weights_dir=twins)
    return Worker(settings, ModelHandler(settings))


def test_video_in_the_bucket_opens_as_a_video_and_plays(bucket: Bucket, twins: Path, tmp_path: Path) -> None:
    response = run(VIDEO, job_id="job-1", worker=worker_for(bucket, twins, tmp_path), progress=Progress())
    with urllib.request.urlopen(response["video_url"]) as stream:
        assert stream.headers["Content-Type"] == "video/mp4"
        (tmp_path / "fetched.mp4").write_bytes(stream.read())
    assert (tmp_path / "fetched.mp4").stat().st_size == response["size_bytes"]
    assert decode_video(tmp_path / "fetched.mp4").shape == (9, 64, 96, 3)


def test_job_delivered_twice_is_answered_from_the_first_result(bucket: Bucket, twins: Path, tmp_path: Path) -> None:
    first_worker, second_worker = (worker_for(bucket, twins, tmp_path) for _ in range(2))
    first = run(VIDEO, job_id="job-2", worker=first_worker, progress=Progress())
    second = run(VIDEO, job_id="job-2", worker=second_worker, progress=Progress())
    assert second_worker.models.loads == 0
    assert {**second, "video_url": ""} == {**first, "video_url": ""}


def test_same_id_with_another_input_is_another_job(bucket: Bucket, twins: Path, tmp_path: Path) -> None:
    worker = worker_for(bucket, twins, tmp_path)
    first = run(VIDEO, job_id="job-3", worker=worker, progress=Progress())
    second = run({**VIDEO, "seed": 6}, job_id="job-3", worker=worker, progress=Progress())
    assert (first["seed"], second["seed"]) == (5, 6)


def test_job_of_several_pictures_loses_none_in_an_outage_and_answers_with_all_when_it_comes_again(
    swift: Swift, proxy: FaultProxy, bucket: Bucket, twins: Path, tmp_path: Path
) -> None:
    worker = worker_for(bucket, twins, tmp_path, BUCKET_RETRY_S="0.01")
    pictures = {**IMAGE, "num_images": 3}
    proxy.close()
    with pytest.raises(DeliveryFailed, match=r"the files are kept and will be stored as .*image-0.*image-1.*image-2"):
        run(pictures, job_id="job-4", worker=worker, progress=Progress())
    proxy.open()
    assert sweep(worker.settings) == 3
    swept = contents(swift, bucket)
    assert [key.rpartition("/")[2] for key in sorted(swept)] == ["image-0.png", "image-1.png", "image-2.png"]
    made = run(pictures, job_id="job-4", worker=worker, progress=Progress())
    assert [opened(url) for url in made["images"]] == [swept[key] for key in sorted(swept)]
    late_worker = worker_for(bucket, twins, tmp_path)
    again = run(pictures, job_id="job-4", worker=late_worker, progress=Progress())
    assert late_worker.models.loads == 0
    assert [opened(url) for url in again["images"]] == [swept[key] for key in sorted(swept)]


def opened(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())
