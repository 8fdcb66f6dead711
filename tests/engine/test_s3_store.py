"""The operator's bucket and a request's bucket, from a finished file to a second delivery of the same job."""

import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from engine import storage
from engine.bucket import REQUEST, Bucket
from engine.outputs import MediaFile
from engine.s3 import Patience, connect
from engine.s3_errors import StoreRefused, StoreUnwell
from engine.s3_store import GuestStore, S3Store, Terms
from engine.settings import Secret
from schemas.errors import Cancelled, EncodingFailed, JobTimeout, WorkerShutdown, error_response
from tests.servers.buckets import contents, hurried, media_file, settings_for

pytest_plugins = ["tests.servers.s3_fixtures"]

INPUT = "1" * 64
OTHER_INPUT = "2" * 64
HASH = "c37bd1a8462d7ad637654ed3043935aa"  # sha256 of b"job-7", first half
FOLDER = f"worker/{HASH}"


def terms(retry_s: float = 60.0, pause=hurried) -> Terms:
    return Terms("worker", 3600, retry_s, pause)


@pytest.fixture
def store(bucket: Bucket, tmp_path) -> S3Store:
    return S3Store(bucket, terms(), tmp_path / "outbox")


@pytest.fixture
def guest(bucket: Bucket) -> GuestStore:
    allow = (bucket.endpoint_url.removeprefix("http://"),)
    return GuestStore(replace(bucket, labels=REQUEST, guest_allow=allow), terms())


def out(store: S3Store) -> S3Store:
    """The same store with no patience."""
    return replace(store, terms=terms(retry_s=0.01))


def opened(url: str) -> tuple[str, bytes]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read()


def two_pictures(folder: Path) -> list[MediaFile]:
    return [media_file(folder / f"image-{n}.png", bytes([n]), "image/png") for n in range(2)]


def finish(store, file, job_id: str = "job-7", input_sha256: str = INPUT, seed: int = 5) -> dict:
    """What the handler does once the file is there."""
    delivered = store.deliver([file], job_id)
    return store.record(job_id, input_sha256, {"video_url": delivered[0].url, "seed": seed}, delivered)


def test_deliver_gives_a_url_that_opens_as_a_video(swift, bucket, store, make_file) -> None:
    file = make_file()
    [delivered] = store.deliver([file], "job-7")
    assert delivered.key == f"{FOLDER}/video.mp4"
    assert (delivered.kind, delivered.sha256, delivered.size_bytes) == ("s3", file.sha256, 100_000)
    assert opened(delivered.url) == ("video/mp4", file.path.read_bytes())
    assert list(contents(swift, bucket)) == [f"{FOLDER}/video.mp4"]


def test_deliver_has_no_prefix_when_the_setting_is_a_slash(bucket, tmp_path, make_file) -> None:
    bare = S3Store(bucket, replace(terms(), prefix="/"), tmp_path)
    assert bare.deliver([make_file()], "job-7")[0].key == f"{HASH}/video.mp4"


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "", ".", "a/b", "\x00", "x" * 5000, "\ud800", "%2e%2e"])
def test_deliver_makes_a_harmless_key_of_any_job_id(store, make_file, job_id) -> None:
    key = store.deliver([make_file(100)], job_id)[0].key
    prefix, folder, name = key.split("/")
    assert (prefix, name) == ("worker", "video.mp4")
    assert len(folder) == 32
    assert set(folder) <= set("0123456789abcdef")


def test_recall_answers_a_second_delivery_with_a_fresh_url(store, make_file) -> None:
    file = make_file()
    first = finish(store, file)
    time.sleep(1.1)  # a signature's time is in whole seconds
    again = store.recall("job-7", INPUT)
    assert again is not None
    assert again["seed"] == 5
    assert again["video_url"] != first["video_url"]
    assert opened(again["video_url"]) == ("video/mp4", file.path.read_bytes())


def test_recall_replaces_urls_wherever_the_response_has_them(store, tmp_path) -> None:
    delivered = store.deliver(two_pictures(tmp_path), "job-7")
    urls = [each.url for each in delivered]
    response = {"images": urls, "image_url": urls[0], "prompt": "a fox", "timings_s": {"load": 0.5}}
    store.record("job-7", INPUT, response, delivered)
    again = store.recall("job-7", INPUT)
    assert [opened(url)[1] for url in again["images"]] == [b"\x00", b"\x01"]
    assert opened(again["image_url"])[1] == b"\x00"
    assert (again["prompt"], again["timings_s"]) == ("a fox", {"load": 0.5})


def test_recall_answers_a_job_whose_response_carries_a_state(store, make_file) -> None:
    [delivered] = store.deliver([make_file()], "job-7")
    state = "x" * 1_228_900  # as long as engine.chain_state makes it at 1280x720
    store.record("job-7", INPUT, {"video_url": delivered.url, "state": state}, [delivered])
    assert store.recall("job-7", INPUT)["state"] == state


def test_recall_knows_nothing_of_a_new_job_and_asks_once(proxy, store) -> None:
    assert store.recall("job-7", INPUT) is None
    assert [request.method for request in proxy.requests] == ["GET"]


def test_recall_does_not_answer_another_input_under_the_same_id(store, make_file) -> None:
    finish(store, make_file())
    assert store.recall("job-7", OTHER_INPUT) is None


def test_record_holds_two_inputs_of_one_id(swift, bucket, store, make_file) -> None:
    first, second = make_file(), make_file()
    finish(store, first, input_sha256=INPUT, seed=1)
    finish(store, second, input_sha256=OTHER_INPUT, seed=2)
    assert store.recall("job-7", INPUT)["seed"] == 1
    answer = store.recall("job-7", OTHER_INPUT)
    assert answer["seed"] == 2
    assert opened(answer["video_url"])[1] == second.path.read_bytes()
    assert sorted(contents(swift, bucket)) == [
        f"{FOLDER}/result-22222222.json",
        f"{FOLDER}/result.json",
        f"{FOLDER}/video-{second.sha256[:8]}.mp4",
        f"{FOLDER}/video.mp4",
    ]


def test_recall_gives_nothing_when_the_file_is_gone(bucket, store, make_file) -> None:
    finish(store, make_file())
    connect(bucket).delete(f"{FOLDER}/video.mp4", Patience.lasting(10))
    assert store.recall("job-7", INPUT) is None


def test_recall_gives_nothing_when_the_record_is_no_record(bucket, store) -> None:
    for body in (b"", b"[]", b'{"input_sha256": 1}', b"[" * 100_000, b"\xff"):
        connect(bucket).delete(f"{FOLDER}/result.json", Patience.lasting(10))
        connect(bucket).create(f"{FOLDER}/result.json", body, "application/json", "", Patience.lasting(10))
        assert store.recall("job-7", INPUT) is None


def test_recall_lets_the_job_run_when_the_store_is_out(proxy, store) -> None:
    proxy.close()
    assert out(store).recall("job-7", INPUT) is None


def test_recall_refuses_before_any_work_when_the_keys_are_wrong(store) -> None:
    wrong = replace(store, bucket=replace(store.bucket, secret_access_key=Secret("wrong")))
    with pytest.raises(StoreRefused, match="the secret key is wrong; check BUCKET_SECRET_ACCESS_KEY"):
        wrong.recall("job-7", INPUT)


def test_record_of_a_slower_twin_gives_way_with_its_files(swift, bucket, store, make_file) -> None:
    first, second = make_file(), make_file()
    [ours] = store.deliver([first], "job-7")
    [twins] = store.deliver([second], "job-7")
    answer = store.record("job-7", INPUT, {"video_url": ours.url, "seed": 1}, [ours])
    late = store.record("job-7", INPUT, {"video_url": twins.url, "seed": 2}, [twins])
    assert (answer["seed"], late["seed"]) == (1, 1)
    assert opened(late["video_url"])[1] == first.path.read_bytes()
    assert sorted(contents(swift, bucket)) == [f"{FOLDER}/result.json", f"{FOLDER}/video.mp4"]


def test_record_of_a_slower_twin_answers_right_when_its_files_cannot_be_deleted(proxy, store, make_file) -> None:
    first, second = (store.deliver([make_file()], "job-7")[0] for _ in range(2))
    store.record("job-7", INPUT, {"video_url": first.url, "seed": 1}, [first])
    proxy.inject("503", 50, matching="DELETE")
    late = out(store).record("job-7", INPUT, {"video_url": second.url, "seed": 2}, [second])
    assert late["seed"] == 1


def test_record_is_kept_when_its_answer_is_lost(proxy, store, make_file) -> None:
    proxy.inject("lost", 1, matching="PUT .*result.json")
    assert finish(store, make_file())["seed"] == 5
    assert store.recall("job-7", INPUT)["seed"] == 5


def test_record_never_fails_the_job(proxy, store, make_file) -> None:
    [delivered] = store.deliver([make_file()], "job-7")
    response = {"video_url": delivered.url}
    proxy.close()
    assert out(store).record("job-7", INPUT, response, [delivered]) == response


def test_deliver_keeps_the_file_in_an_outage_and_the_next_sweep_stores_it(
    swift, proxy, bucket, store, make_file, tmp_path
) -> None:
    file = make_file()
    proxy.close()
    with pytest.raises(StoreUnwell) as caught:
        out(store).deliver([file], "job-7")
    assert error_response(caught.value) == {
        "error": "delivery_failed: the store did not answer;"
        f" the file is kept and will be stored as {FOLDER}/video.mp4",
        "code": "delivery_failed",
        "retryable": True,
    }
    body = file.path.read_bytes()
    file.path.unlink()  # the worker's folder ends with the job
    settings = settings_for(bucket, tmp_path)
    proxy.open()
    assert storage.sweep(settings, pause=hurried) == 1
    assert contents(swift, bucket) == {f"{FOLDER}/video.mp4": body}
    assert list((tmp_path / "outbox").iterdir()) == []


def test_sweep_leaves_everything_while_the_store_is_out(proxy, bucket, store, make_file, tmp_path, monkeypatch) -> None:
    proxy.close()
    with pytest.raises(StoreUnwell):
        out(store).deliver([make_file()], "job-7")
    monkeypatch.setattr(storage, "SWEEP_S", 0.01)
    assert storage.sweep(settings_for(bucket, tmp_path)) == 0
    assert len(list((tmp_path / "outbox").iterdir())) == 1


def test_deliver_says_so_when_the_outbox_fails_too(proxy, store, make_file, tmp_path) -> None:
    (tmp_path / "outbox").write_bytes(b"a file, where a folder should be")
    proxy.close()
    with pytest.raises(StoreUnwell) as caught:
        out(store).deliver([make_file()], "job-7")
    assert caught.value.sentence == (
        f"the store did not answer; the outbox could not keep {FOLDER}/video.mp4 (File exists)"
    )


def test_recall_gives_nothing_when_another_file_stands_in_its_place(bucket, store, make_file) -> None:
    finish(store, make_file())
    connect(bucket).delete(f"{FOLDER}/video.mp4", Patience.lasting(10))
    store.deliver([make_file()], "job-7")
    assert store.recall("job-7", INPUT) is None


def test_deliver_with_wrong_keys_asks_once_and_still_keeps_the_file(proxy, store, make_file, tmp_path) -> None:
    wrong = replace(store, bucket=replace(store.bucket, secret_access_key=Secret("wrong")))
    with pytest.raises(StoreRefused, match="the secret key is wrong") as caught:
        wrong.deliver([make_file()], "job-7")
    assert len(proxy.requests) == 1
    assert caught.value.retryable is False
    assert len(list((tmp_path / "outbox").iterdir())) == 1


@pytest.mark.parametrize("which", ["store", "guest"])
def test_deliver_says_that_the_file_is_gone_when_it_is(request, which, make_file) -> None:
    file = make_file()
    file.path.unlink()
    with pytest.raises(EncodingFailed, match="the finished file cannot be read from the worker's disk"):
        request.getfixturevalue(which).deliver([file], "job-7")


@pytest.mark.parametrize("ends", [JobTimeout, WorkerShutdown])
def test_deliver_keeps_the_file_when_the_wait_is_ended(proxy, bucket, make_file, tmp_path, ends) -> None:
    proxy.close()
    with pytest.raises(ends, match="the file is kept"):
        S3Store(bucket, terms(pause=ending(ends)), tmp_path / "outbox").deliver([make_file()], "job-7")
    assert len(list((tmp_path / "outbox").iterdir())) == 1


def test_deliver_drops_the_file_when_the_job_is_cancelled(proxy, bucket, make_file, tmp_path) -> None:
    proxy.close()
    with pytest.raises(Cancelled):
        S3Store(bucket, terms(pause=ending(Cancelled)), tmp_path / "outbox").deliver([make_file()], "job-7")
    assert not (tmp_path / "outbox").exists()


def ending(kind):
    def pause(_seconds: float) -> None:
        raise kind("over")

    return pause


def test_outbox_holds_no_credentials(proxy, store, make_file, tmp_path) -> None:
    marked = replace(store.bucket, access_key_id=Secret("CANARY-KEY"), secret_access_key=Secret("CANARY-SECRET"))
    with pytest.raises(StoreRefused):
        replace(store, bucket=marked).deliver([make_file()], "job-7")
    files = [path for path in (tmp_path / "outbox").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not [path for path in files if b"CANARY" in path.read_bytes()]


def test_guest_delivers_and_records_in_the_callers_bucket(swift, bucket, guest, make_file) -> None:
    file = make_file()
    answer = finish(guest, file)
    assert opened(answer["video_url"]) == ("video/mp4", file.path.read_bytes())
    assert sorted(contents(swift, bucket)) == [f"{FOLDER}/result.json", f"{FOLDER}/video.mp4"]


def test_guest_believes_no_record_in_the_callers_bucket(store, guest, make_file) -> None:
    finish(store, make_file())
    assert store.recall("job-7", INPUT) is not None  # the control: it is a good record
    assert guest.recall("job-7", INPUT) is None
    later = guest.record("job-7", INPUT, {"seed": 9}, [])
    assert later == {"seed": 9}


def test_guest_with_wrong_keys_is_refused_before_any_work(guest) -> None:
    wrong = replace(guest, bucket=replace(guest.bucket, secret_access_key=Secret("CANARY")))
    with pytest.raises(StoreRefused) as caught:
        wrong.recall("job-7", INPUT)
    assert caught.value.sentence == "the store says that the secret key is wrong; check s3Config.accessSecret"


def test_guests_keys_are_in_no_cache(guest, make_file) -> None:
    before = connect.cache_info()
    finish(guest, make_file())
    assert connect.cache_info() == before


def test_guest_that_is_out_leaves_nothing_behind(proxy, guest, make_file, tmp_path, caplog) -> None:
    proxy.close()
    marked = replace(guest.bucket, secret_access_key=Secret("CANARY"))
    with pytest.raises(StoreUnwell) as caught:
        GuestStore(marked, terms(retry_s=0.01)).deliver([make_file()], "job-7")
    assert caught.value.sentence == f"the store did not answer; {FOLDER}/video.mp4 was not stored"
    assert not (tmp_path / "outbox").exists()
    assert "CANARY" not in caplog.text


def test_log_says_key_and_size_only(store, make_file, caplog) -> None:
    with caplog.at_level("DEBUG", logger="engine"):
        finish(store, make_file())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("engine")] == [
        f"stored {FOLDER}/video.mp4, 100000 bytes"
    ]
