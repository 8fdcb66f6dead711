"""Several files of one job: stored together, kept together while the store is out, and never answered in part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import storage
from engine.bucket import REQUEST, Bucket
from engine.outputs import MediaFile
from engine.s3 import Patience, connect
from engine.s3_errors import StoreUnwell
from engine.s3_store import GuestStore, S3Store, Terms
from schemas.errors import Cancelled, JobTimeout, WorkerShutdown, error_response
from tests.servers.buckets import contents, hurried, media_file, settings_for
from tests.servers.fault_proxy import FaultProxy
from tests.servers.swift import Swift

pytest_plugins = ["tests.servers.s3_fixtures"]

INPUT = "1" * 64
FOLDER = "worker/c37bd1a8462d7ad637654ed3043935aa"  # sha256 of b"job-7", first half
KEYS = [f"{FOLDER}/image-{n}.png" for n in range(3)]


@pytest.fixture
def pictures(tmp_path: Path) -> list[MediaFile]:
    return [media_file(tmp_path / f"image-{n}.png", bytes([n]), "image/png") for n in range(3)]


def store_of(bucket: Bucket, folder: Path, retry_s: float = 0.01, pause: Callable[[float], None] = hurried) -> S3Store:
    """With hardly any patience."""
    return S3Store(bucket, Terms("worker", 3600, retry_s, pause), folder / "outbox")


def kept(folder: Path) -> int:
    return len(list((folder / "outbox").iterdir()))


def puts(proxy: FaultProxy, name: str) -> int:
    return sum(request.method == "PUT" and name in request.target for request in proxy.requests)


def test_deliver_keeps_every_file_in_an_outage_and_says_so_once(
    swift: Swift, proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    proxy.close()
    with pytest.raises(StoreUnwell) as caught:
        store_of(bucket, tmp_path).deliver(pictures, "job-7")
    assert error_response(caught.value) == {
        "error": "delivery_failed: the store did not answer; the files are kept and will be stored as"
        f" {FOLDER}/image-0.png, {FOLDER}/image-1.png, {FOLDER}/image-2.png",
        "code": "delivery_failed",
        "retryable": True,
    }
    for picture in pictures:
        picture.path.unlink()  # the worker's folder ends with the job
    proxy.open()
    assert storage.sweep(settings_for(bucket, tmp_path), pause=hurried) == 3
    assert contents(swift, bucket) == {KEYS[0]: b"\x00", KEYS[1]: b"\x01", KEYS[2]: b"\x02"}
    assert kept(tmp_path) == 0


def test_deliver_keeps_the_rest_when_the_store_goes_out_in_between(
    swift: Swift, proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    proxy.inject("503", 50, matching="PUT .*image-1")
    with pytest.raises(StoreUnwell) as caught:
        store_of(bucket, tmp_path).deliver(pictures, "job-7")
    assert caught.value.sentence == (
        f"the store is failing (status 503); already stored: {FOLDER}/image-0.png;"
        f" the files are kept and will be stored as {FOLDER}/image-1.png, {FOLDER}/image-2.png"
    )
    assert list(contents(swift, bucket)) == KEYS[:1]
    assert kept(tmp_path) == 2


def test_deliver_offers_no_further_file_to_a_store_that_did_not_take_one(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    proxy.inject("503", 50, matching="PUT .*image-0")
    with pytest.raises(StoreUnwell):
        store_of(bucket, tmp_path).deliver(pictures, "job-7")
    assert [puts(proxy, f"image-{n}") for n in (1, 2)] == [0, 0]


def test_deliver_has_one_patience_for_all_files(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.9 s the first file waits 0.6 and the second 0.2; each by itself would wait until 0.8."""
    now, pauses = [0.0], []

    def pause(seconds: float) -> None:
        now[0] += seconds
        pauses.append(seconds)

    monkeypatch.setattr("engine.s3.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("engine.s3.random.uniform", lambda _least, most: most)
    proxy.inject("503", 2, matching="PUT .*image-0")
    proxy.inject("503", 50, matching="PUT .*image-1")
    with pytest.raises(StoreUnwell):
        store_of(bucket, tmp_path, 0.9, pause).deliver(pictures, "job-7")
    assert pauses == [0.2, 0.4, 0.0, 0.2]


def test_deliver_keeps_what_it_can_and_names_what_the_outbox_did_not_take(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    pictures[1].path.write_bytes(b"damaged")
    proxy.close()
    with pytest.raises(StoreUnwell) as caught:
        store_of(bucket, tmp_path).deliver(pictures, "job-7")
    assert caught.value.sentence == (
        "the store did not answer;"
        f" the files are kept and will be stored as {FOLDER}/image-0.png, {FOLDER}/image-2.png;"
        f" the outbox could not keep {FOLDER}/image-1.png: the file changed on the worker's disk"
    )
    assert kept(tmp_path) == 2


@pytest.mark.parametrize("ends", [JobTimeout, WorkerShutdown])
def test_deliver_keeps_the_rest_when_the_job_ends_between_two_files(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path, ends: type[Exception]
) -> None:
    with pytest.raises(ends, match=r"over; already stored: .*image-0\.png; the files are kept"):
        store_of(bucket, tmp_path, pause=ending(ends)).deliver(pictures, "job-7")
    assert [puts(proxy, f"image-{n}") for n in range(3)] == [1, 0, 0]
    assert kept(tmp_path) == 2


def test_deliver_drops_the_rest_when_the_job_is_cancelled_between_two_files(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        store_of(bucket, tmp_path, pause=ending(Cancelled)).deliver(pictures, "job-7")
    assert [puts(proxy, f"image-{n}") for n in range(3)] == [1, 0, 0]
    assert not (tmp_path / "outbox").exists()


def ending(kind: type[Exception]) -> Callable[[float], None]:
    def pause(_seconds: float) -> None:
        raise kind("over")

    return pause


def test_recall_gives_nothing_when_one_file_of_several_is_gone(
    bucket: Bucket, pictures: list[MediaFile], tmp_path: Path
) -> None:
    store = store_of(bucket, tmp_path)
    delivered = store.deliver(pictures, "job-7")
    store.record("job-7", INPUT, {"images": [each.url for each in delivered]}, delivered)
    assert len((store.recall("job-7", INPUT) or {})["images"]) == 3
    connect(bucket).delete(KEYS[2], Patience.lasting(10))
    assert store.recall("job-7", INPUT) is None


def test_guest_that_is_out_is_told_every_file_that_was_not_stored(
    proxy: FaultProxy, bucket: Bucket, pictures: list[MediaFile]
) -> None:
    allow = (bucket.endpoint_url.removeprefix("http://"),)
    guest = GuestStore(replace(bucket, labels=REQUEST, guest_allow=allow), Terms("worker", 3600, 0.01, hurried))
    proxy.inject("503", 50, matching="PUT .*image-1")
    with pytest.raises(StoreUnwell) as caught:
        guest.deliver(pictures, "job-7")
    assert caught.value.sentence == (
        f"the store is failing (status 503); {FOLDER}/image-1.png, {FOLDER}/image-2.png were not stored"
    )
