"""A file into a bucket through all that goes wrong on the way: the object is right, or there is an error."""

import gc
import hashlib
import logging
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from engine import upload as upload_module
from engine.bucket import Bucket
from engine.s3 import Objects, Patience, connect
from engine.s3_errors import KeyTaken, StoreUnwell
from engine.upload import take_fingerprint, upload
from schemas.errors import Cancelled, EncodingFailed, JobTimeout, WorkerShutdown
from tests.figures import Count, Figure
from tests.servers.buckets import bucket_at, contents, hurried, media_file, unfinished
from tests.servers.fault_proxy import FAULTS, FaultProxy
from tests.servers.plain_store import PlainStore
from tests.servers.swift import Swift

pytest_plugins = ["tests.servers.s3_fixtures", "tests.figures"]

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "worker/0123456789abcdef0123456789abcdef/video.mp4"
SMALL = 100_000
LARGE = 17 * 2**20  # three parts


def patient() -> Patience:
    return Patience.lasting(60.0, hurried)


def hasty(bucket: Bucket) -> Objects:
    """A client that takes a second of silence for a hang; on a busy machine the store is silent for half of that."""
    return connect(replace(bucket, read_timeout_s=1.0))


def check_arrival(swift: Swift, bucket: Bucket, file, key: str = KEY) -> None:
    """One object, byte for byte the file, and nothing half-done beside it."""
    found = contents(swift, bucket)
    assert list(found) == [key]
    assert hashlib.sha256(found[key]).hexdigest() == file.sha256
    assert unfinished(swift, bucket) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_upload_survives_eight_faults_in_a_row(swift, proxy, bucket, make_file, fault) -> None:
    file = make_file(SMALL)
    proxy.inject(fault, 8)
    assert upload(hasty(bucket), file, KEY, patient()) == KEY
    assert proxy.pending_faults == 0
    check_arrival(swift, bucket, file)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("lost", "POST .*uploads"),
        ("503", "PUT .*partNumber=2"),
        ("lost", "POST .*uploadId"),
        ("503", "HEAD "),
        ("500", "GET .*uploads"),
    ],
)
def test_upload_in_parts_survives_faults_at_every_step(swift, proxy, bucket, make_file, fault, step) -> None:
    file = make_file(LARGE)
    proxy.inject(fault, 2, matching=step)
    assert upload(connect(bucket), file, KEY, patient()) == KEY
    assert proxy.pending_faults == 0
    check_arrival(swift, bucket, file)


def test_upload_resends_a_part_and_not_the_file(proxy, bucket, make_file) -> None:
    proxy.inject("reset", 2, matching="PUT .*partNumber=2")
    upload(connect(bucket), make_file(LARGE), KEY, patient())
    sent = [request.target.split("partNumber=")[1][0] for request in proxy.requests if request.method == "PUT"]
    assert sent == ["1", "2", "2", "2", "3"]


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("size", "count"),
    [*((SMALL, count) for count in range(9)), (LARGE, 1), (LARGE, 8)],
    ids=[*(f"whole-{count}" for count in range(9)), "parts-1", "parts-8"],
)
def test_upload_survives_the_whole_matrix(swift, proxy, bucket, make_file, size, fault, count, figure: Figure) -> None:
    file = make_file(size)
    proxy.inject(fault, count)
    assert upload(hasty(bucket), file, KEY, patient()) == KEY
    assert proxy.pending_faults == 0
    check_arrival(swift, bucket, file)
    figure("uploads right through 0 to 8 faults in a row of 6 kinds, whole and in parts", Count(1, 1))


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", ["POST .*uploads", "PUT .*partNumber=2", "POST .*uploadId"])
def test_upload_in_parts_survives_eight_faults_at_each_step(
    swift, proxy, bucket, make_file, fault, step, figure: Figure
) -> None:
    file = make_file(LARGE)
    proxy.inject(fault, 8, matching=step)
    assert upload(hasty(bucket), file, KEY, patient()) == KEY
    assert proxy.pending_faults == 0
    check_arrival(swift, bucket, file)
    figure("uploads right through 8 faults at one step of an upload in parts", Count(1, 1))


def test_upload_waits_for_a_store_that_is_out(swift, proxy, bucket, make_file) -> None:
    check_outage(1.0, swift, proxy, bucket, make_file(SMALL))


@pytest.mark.soak
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["single", "parts"])
def test_upload_waits_out_thirty_seconds_in_real_time(swift, proxy, bucket, make_file, size, figure: Figure) -> None:
    check_outage(30.0, swift, proxy, bucket, make_file(size))
    figure("uploads right after 30 s of refused connections", Count(1, 1))


def check_outage(seconds: float, swift: Swift, proxy: FaultProxy, bucket: Bucket, file) -> None:
    """Refuse connections, come back in the middle of the wait; the pauses are the real ones."""
    proxy.close()
    started = time.monotonic()
    threading.Timer(seconds, proxy.open).start()
    assert upload(connect(bucket), file, KEY, Patience.lasting(180.0)) == KEY
    assert time.monotonic() - started >= seconds
    check_arrival(swift, bucket, file)


def test_upload_fails_when_patience_ends(swift, proxy, bucket, make_file) -> None:
    """Also the control of the tests above: without patience one fault is enough."""
    proxy.inject("503", 1)
    with pytest.raises(StoreUnwell):
        upload(connect(bucket), make_file(SMALL), KEY, Patience.lasting(0.0))
    assert contents(swift, bucket) == {}


def test_upload_in_parts_that_fails_leaves_no_parts_behind(swift, proxy, bucket, make_file) -> None:
    proxy.inject("503", 1, matching="PUT .*partNumber=3")
    with pytest.raises(StoreUnwell):
        upload(connect(bucket), make_file(LARGE), KEY, Patience.lasting(0.0))
    assert (contents(swift, bucket), unfinished(swift, bucket)) == ({}, [])


def test_upload_in_parts_would_leave_them_behind_without_the_cleaning(
    swift, proxy, bucket, make_file, monkeypatch
) -> None:
    monkeypatch.setattr(upload_module, "_clean_up", lambda *_: None)
    proxy.inject("503", 1, matching="PUT .*partNumber=3")
    with pytest.raises(StoreUnwell):
        upload(connect(bucket), make_file(LARGE), KEY, Patience.lasting(0.0))
    assert unfinished(swift, bucket) == [KEY]


def test_upload_in_parts_fails_for_its_own_reason_when_the_parts_cannot_be_removed(
    proxy, bucket, make_file, caplog
) -> None:
    proxy.inject("503", 1, matching="PUT .*partNumber=2")
    proxy.inject("500", 1, matching="DELETE")
    with pytest.raises(StoreUnwell, match="status 503"):
        upload(connect(bucket), make_file(LARGE), KEY, Patience.lasting(0.0))
    assert "were left behind: the store is failing (status 500)" in caplog.text


def test_upload_in_parts_does_not_clean_up_when_the_worker_is_taken_away(proxy, bucket, make_file) -> None:
    def pause(seconds: float) -> None:
        if seconds:
            raise WorkerShutdown("the platform takes the worker away")

    proxy.inject("503", 1, matching="PUT .*partNumber=2")
    with pytest.raises(WorkerShutdown):
        upload(connect(bucket), make_file(LARGE), KEY, Patience.lasting(60.0, pause))
    assert [request.method for request in proxy.requests] == ["POST", "PUT", "PUT"]


@pytest.mark.parametrize(("ends", "left"), [(Cancelled, []), (JobTimeout, [KEY])])
def test_upload_in_parts_that_all_goes_well_ends_between_two_parts_when_the_job_does(
    swift, proxy, bucket, make_file, ends, left
) -> None:
    """After a timeout there is no time to clean up; whoever delivers the file from the outbox does."""

    def pause(_seconds: float) -> None:
        if any("partNumber=1" in request.target for request in proxy.requests):
            raise ends("over")

    with pytest.raises(ends):
        upload(connect(bucket), make_file(LARGE), KEY, Patience.lasting(60.0, pause))
    assert not [request for request in proxy.requests if "partNumber=2" in request.target]
    assert (contents(swift, bucket), unfinished(swift, bucket)) == ({}, left)


def test_upload_in_parts_gives_way_at_once_when_a_faster_twin_has_ended_it(
    swift, proxy, bucket, make_file, monkeypatch
) -> None:
    file, put_part, twins = make_file(LARGE), Objects.put_part, []

    def put_part_late(self, key, upload_id, number, body, patience):
        if number == 2 and not twins:
            twins.append(upload_id)
            upload(connect(bucket), file, KEY, patient())
        return put_part(self, key, upload_id, number, body, patience)

    monkeypatch.setattr(Objects, "put_part", put_part_late)
    assert upload(connect(bucket), file, KEY, patient()) == KEY
    late = [request for request in proxy.requests if twins[0] in request.target and request.method == "PUT"]
    # 150 if it asked on until its patience ended. Not always 2: the store does not read a part that it refuses, and
    # its answer can be lost with the connection.
    assert len(late) < 20
    check_arrival(swift, bucket, file)


def test_upload_starts_anew_when_the_store_lost_a_part(swift, proxy, bucket, make_file, monkeypatch) -> None:
    file, put_part, lost = make_file(LARGE), Objects.put_part, []

    def put_part_lossy(self, key, upload_id, number, body, patience):
        if number == 2 and not lost:
            lost.append(number)
            return f'"{hashlib.md5(body).hexdigest()}"'
        return put_part(self, key, upload_id, number, body, patience)

    monkeypatch.setattr(Objects, "put_part", put_part_lossy)
    assert upload(connect(bucket), file, KEY, patient()) == KEY
    ends = [r.target for r in proxy.requests if r.method == "POST" and "uploadId=" in r.target]
    assert len(ends) == 2
    check_arrival(swift, bucket, file)


def test_upload_tries_again_when_the_object_is_gone_as_it_is_read_back(make_file, monkeypatch) -> None:
    """A twin that found the same damage has deleted it."""
    sha256_of, asked = Objects.sha256_of, []

    def sha256_of_later(self, key, patience):
        if not asked:
            self.delete(key, patience)
        asked.append(key)
        return sha256_of(self, key, patience)

    monkeypatch.setattr(Objects, "sha256_of", sha256_of_later)
    file = make_file(SMALL)
    with PlainStore("opaque-etag") as store:
        assert upload(connect(bucket_at(store.endpoint)), file, KEY, patient()) == KEY
        assert store.objects[KEY].body == file.path.read_bytes()


def test_upload_cleans_up_what_a_killed_worker_left(swift, bucket, make_file) -> None:
    file = make_file(LARGE)
    connect(bucket).start_upload(KEY, "video/mp4", file.sha256, patient())
    connect(bucket).start_upload(KEY + "x", "video/mp4", file.sha256, patient())  # another key: not ours to end
    upload(connect(bucket), file, KEY, patient())
    assert unfinished(swift, bucket) == [KEY + "x"]


def test_upload_twice_is_one_object(swift, bucket, make_file) -> None:
    file = make_file(SMALL)
    assert [upload(connect(bucket), file, KEY, patient()) for _ in range(2)] == [KEY, KEY]
    check_arrival(swift, bucket, file)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["single", "parts"])
def test_upload_by_twins_at_once_is_one_object(swift, bucket, make_file, size) -> None:
    file = make_file(size)
    with ThreadPoolExecutor(3) as pool:
        keys = list(pool.map(lambda _: upload(connect(bucket), file, KEY, patient()), range(3)))
    assert keys == [KEY] * 3
    check_arrival(swift, bucket, file)


def test_upload_replaces_no_other_file(swift, bucket, tmp_path) -> None:
    first = media_file(tmp_path / "first.mp4", b"first")
    second = media_file(tmp_path / "second.mp4", b"second")
    other = "worker/0123456789abcdef0123456789abcdef/video-16367aac.mp4"  # sha256 of b"second" begins so
    assert upload(connect(bucket), first, KEY, patient()) == KEY
    assert upload(connect(bucket), second, KEY, patient()) == other
    assert contents(swift, bucket) == {KEY: b"first", other: b"second"}


def test_upload_would_replace_it_without_the_condition(swift, bucket, tmp_path, monkeypatch) -> None:
    """The control: the second file takes the first one's place."""

    def write_at_once(self, _key, patience, write) -> None:
        self._ask(patience, lambda client: write(client, {}))

    monkeypatch.setattr(Objects, "_create", write_at_once)
    upload(connect(bucket), media_file(tmp_path / "first.mp4", b"first"), KEY, patient())
    upload(connect(bucket), media_file(tmp_path / "second.mp4", b"second"), KEY, patient())
    assert contents(swift, bucket) == {KEY: b"second"}


def test_upload_refuses_a_file_that_changed_on_disk(swift, bucket, make_file) -> None:
    file = make_file(SMALL)
    file.path.write_bytes(b"\0" * SMALL)
    with pytest.raises(EncodingFailed):
        upload(connect(bucket), file, KEY, patient())
    assert contents(swift, bucket) == {}


def test_fingerprint_of_a_file_in_parts_is_the_stores_etag(bucket, make_file) -> None:
    file = make_file(LARGE)
    upload(connect(bucket), file, KEY, patient())
    etag = connect(bucket).head(KEY, patient()).etag
    assert etag.endswith("-3")
    assert take_fingerprint(file.path).etag == etag


def test_fingerprint_of_a_small_file_is_its_md5(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"frames")
    assert take_fingerprint(tmp_path / "file").etag == "dcdc1ac079a91d513a5a759b0fb9c1dc"


@pytest.mark.parametrize("quirks", [(), ("no-checksums",), ("no-algorithm",), ("no-checksums", "no-conditions")])
def test_upload_keeps_bytes_intact_on_a_store_with_quirks(make_file, quirks) -> None:
    file = make_file(SMALL)
    with PlainStore(*quirks) as store:
        assert upload(connect(bucket_at(store.endpoint)), file, KEY, patient()) == KEY
        assert store.objects[KEY].body == file.path.read_bytes()
        assert store.objects[KEY].headers["Content-Type"] == "video/mp4"


def test_boto3_as_it_comes_fails_on_a_store_without_checksums() -> None:
    """The control of the test above."""
    with PlainStore("no-checksums") as store:
        client = boto3.session.Session().client(
            "s3", endpoint_url=store.endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
        )
        with pytest.raises(ClientError, match="NotImplemented"):
            client.put_object(Bucket="bucket", Key=KEY, Body=b"x")


def test_upload_replaces_nothing_on_a_store_without_conditional_writes(make_file) -> None:
    first, second = make_file(SMALL), make_file(SMALL)
    with PlainStore("no-conditions") as store:
        objects = connect(bucket_at(store.endpoint))
        upload(objects, first, KEY, patient())
        assert upload(objects, first, KEY, patient()) == KEY
        upload(objects, second, KEY, patient())
        assert sorted(len(each.body) for each in store.objects.values()) == [SMALL, SMALL]
        assert store.objects[KEY].body == first.path.read_bytes()


@pytest.mark.parametrize("quirks", [("flip",), ("truncate",), ("flip", "opaque-etag"), ("truncate", "no-conditions")])
def test_upload_never_accepts_an_object_that_is_not_the_file(make_file, quirks) -> None:
    with PlainStore(*quirks) as store:
        with pytest.raises(StoreUnwell, match="the store kept other bytes than it was sent"):
            upload(connect(bucket_at(store.endpoint)), make_file(SMALL), KEY, Patience.lasting(0.5))
        assert store.objects == {}


def test_upload_never_believes_a_store_that_loses_what_it_took(make_file) -> None:
    with PlainStore("lose") as store, pytest.raises(StoreUnwell, match="the store lost the file after it took it"):
        upload(connect(bucket_at(store.endpoint)), make_file(SMALL), KEY, Patience.lasting(0.5))


@pytest.mark.parametrize("quirk", ["flip", "truncate"])
def test_upload_without_verification_would_accept_it(make_file, monkeypatch, quirk) -> None:
    """The control: what the store answered to the write says nothing."""
    monkeypatch.setattr(upload_module, "verify", lambda *_: None)
    file = make_file(SMALL)
    with PlainStore(quirk) as store:
        assert upload(connect(bucket_at(store.endpoint)), file, KEY, Patience.lasting(0.5)) == KEY
        assert store.objects[KEY].body != file.path.read_bytes()


def test_upload_reads_back_where_the_etag_is_no_md5(make_file) -> None:
    with PlainStore("opaque-etag") as store:
        assert upload(connect(bucket_at(store.endpoint)), make_file(SMALL), KEY, patient()) == KEY
        assert [method for method, _ in store.requests] == ["PUT", "HEAD", "GET"]


def test_upload_fails_at_once_on_a_store_that_forgets_metadata(make_file) -> None:
    with (
        PlainStore("no-metadata") as store,
        pytest.raises(KeyTaken, match="did not keep the file's checksum"),
    ):
        upload(connect(bucket_at(store.endpoint)), make_file(SMALL), KEY, Patience.lasting(60.0))


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from engine.s3 import Patience, connect
from engine.upload import upload
from tests.servers.buckets import bucket_at, media_file
endpoint, name, access, secret, path, key = sys.argv[1:]
file = media_file(Path(path + ".copy"), Path(path).read_bytes())
print("started", flush=True)
objects = connect(bucket_at(endpoint, name, access, secret))
print(upload(objects, file, key, Patience.lasting(60.0)), flush=True)
"""


def check_kill(swift, proxy, bucket, file, after_s: float) -> None:
    """Kill a sender with SIGKILL, then run the same upload again."""
    command = [
        sys.executable,
        "-c",
        KILLED,
        bucket.endpoint_url,
        bucket.name,
        swift.access_key,
        swift.secret_key,
    ]
    sender = subprocess.Popen([*command, str(file.path), KEY], cwd=ROOT, stdout=subprocess.PIPE)
    assert sender.stdout.readline() == b"started\n"
    time.sleep(after_s)
    sender.kill()
    said = sender.communicate()[0]
    assert (KEY in contents(swift, bucket)) or said == b""
    proxy.bytes_per_s = None
    assert upload(connect(bucket), file, KEY, patient()) == KEY
    check_arrival(swift, bucket, file)


def test_upload_is_right_when_run_again_after_a_kill(swift, proxy, bucket, make_file) -> None:
    proxy.bytes_per_s = 60 * 2**20
    check_kill(swift, proxy, bucket, make_file(LARGE), 0.5)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_upload_is_right_after_twenty_kills(swift, proxy, bucket, make_file, seed, figure: Figure) -> None:
    proxy.bytes_per_s = 60 * 2**20
    check_kill(swift, proxy, bucket, make_file(LARGE), random.Random(seed).uniform(0.0, 1.5))
    figure("right objects after kill -9 in the upload", Count(1, 1))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_three_hundred_guests_leave_memory_and_descriptors_flat(swift, bucket, make_file) -> None:
    """Each has keys, and so a client, of its own."""
    direct = replace(bucket, endpoint_url=swift.endpoint, guest_allow=(f"127.0.0.1:{swift.port}",))
    file = make_file(300_000)
    check_flat(300, lambda count: deliver_and_delete(Objects(direct), file, f"worker/{count:032x}/video.mp4"))


@pytest.mark.soak
def test_a_leak_of_a_hundred_kilobytes_a_job_would_be_seen() -> None:
    kept = []

    def leak(_number: int) -> None:
        kept.append(mmap.mmap(-1, 100_000))  # pages of its own: the heap may hold megabytes that earlier tests freed
        kept[-1].write(os.urandom(100_000))

    with pytest.raises(AssertionError):
        check_flat(300, leak)


def deliver_and_delete(objects: Objects, file, key: str) -> None:
    upload(objects, file, key, patient())
    objects.sign(key, 60)
    objects.delete(key, patient())


def check_flat(count: int, job) -> None:
    """Run the job; after the first hundred, memory and descriptors stay where they are."""
    base = (0, 0)
    for number in range(count):
        job(number)
        if number == 100:
            gc.collect()
            base = resident_bytes(), open_descriptors()
    gc.collect()
    grown = resident_bytes() - base[0], open_descriptors() - base[1]
    logging.getLogger(__name__).warning("%d jobs: %d kB, %d descriptors more", count, grown[0] // 1024, grown[1])
    assert grown[0] < 16 * 2**20
    assert grown[1] <= 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
