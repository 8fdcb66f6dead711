"""Requests to a bucket on a real S3 server: what they carry, how they fail, what a signed URL opens."""

import gc
import hashlib
import logging
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from engine import s3
from engine.bucket import ENVIRONMENT, REQUEST, Bucket
from engine.s3 import Objects, Patience, connect
from engine.s3_errors import (
    ConditionUnknown,
    KeyMissing,
    KeyTaken,
    RightMissing,
    StoreRefused,
    StoreUnwell,
    UploadGone,
    understand,
)
from engine.settings import Secret
from schemas.errors import JobTimeout
from tests.servers.buckets import bucket_at, hurried
from tests.servers.fault_proxy import FaultProxy
from tests.servers.plain_store import PlainStore

pytest_plugins = ["tests.servers.s3_fixtures"]

BODY = b"frames" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


def at_once() -> Patience:
    return Patience.lasting(0.0)


def put(objects: Objects, key: str = "a/video.mp4") -> None:
    objects.create(key, BODY, "video/mp4", SHA256, Patience.lasting(20.0, hurried))


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


class Clock:
    """Time that only passes in pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.pauses: list[float] = []
        monkeypatch.setattr("engine.s3.time", SimpleNamespace(monotonic=lambda: self.now))

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_patience_keeps_asking_an_unwell_store_until_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("engine.s3.random.uniform", lambda _low, high: high)
    with pytest.raises(StoreUnwell):
        Patience.lasting(30.0, clock.pause).persist(raising(StoreUnwell("out")))
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]


def test_patience_asks_once_when_the_store_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(StoreRefused):
        Patience.lasting(30.0, clock.pause).persist(raising(StoreRefused("no")))
    assert clock.pauses == []


def test_patience_ends_when_its_pause_says_so() -> None:
    with pytest.raises(JobTimeout):
        Patience.lasting(30.0, raising(JobTimeout("over"))).persist(raising(StoreUnwell("out")))


def raising(error: Exception):
    def call(*_: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", StoreUnwell),
        (500, "InternalError", StoreUnwell),
        (502, "", StoreUnwell),
        (400, "RequestTimeout", StoreUnwell),
        (400, "BadDigest", StoreUnwell),
        (400, "XAmzContentSHA256Mismatch", StoreUnwell),
        (408, "", StoreUnwell),
        (409, "ConditionalRequestConflict", StoreUnwell),
        (429, "TooManyRequests", StoreUnwell),
        (404, "NoSuchUpload", UploadGone),
        (400, "InvalidPart", UploadGone),
        (412, "PreconditionFailed", KeyTaken),
        (304, "", KeyTaken),
        (501, "NotImplemented", ConditionUnknown),
        (404, "NoSuchKey", KeyMissing),
        (404, "404", KeyMissing),
        (403, "AccessDenied", RightMissing),
        (403, "403", RightMissing),
        (403, "SignatureDoesNotMatch", StoreRefused),
        (403, "InvalidAccessKeyId", StoreRefused),
        (403, "RequestTimeTooSkewed", StoreRefused),
        (404, "NoSuchBucket", StoreRefused),
        (400, "EntityTooLarge", StoreRefused),
        (307, "", StoreRefused),
    ],
)
def test_understand_tells_a_failing_store_from_one_that_refuses(status, code, kind) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    assert type(understand(error, ENVIRONMENT)) is kind


@pytest.mark.parametrize(
    ("code", "labels", "sentence"),
    [
        ("SignatureDoesNotMatch", ENVIRONMENT,
         "the store says that the secret key is wrong; check BUCKET_SECRET_ACCESS_KEY"),
        ("SignatureDoesNotMatch", REQUEST,
         "the store says that the secret key is wrong; check s3Config.accessSecret"),
        ("InvalidAccessKeyId", REQUEST, "the store does not know the access key; check s3Config.accessId"),
        ("NoSuchBucket", ENVIRONMENT, "the bucket does not exist; check BUCKET_NAME and BUCKET_ENDPOINT_URL"),
        ("AuthorizationHeaderMalformed", ENVIRONMENT, "the region is not the bucket's; check BUCKET_REGION"),
        ("https://inside.example/?key=AKID", ENVIRONMENT, "the store refused the file (status 400)"),
    ],
)  # fmt: skip
def test_understand_says_which_setting_is_wrong_and_nothing_the_store_wrote(code, labels, sentence) -> None:
    error = ClientError(
        {"Error": {"Code": code, "Message": "AKID at /srv"}, "ResponseMetadata": {"HTTPStatusCode": 400}},
        "PutObject",
    )
    assert understand(error, labels).sentence == sentence


def test_create_keeps_body_type_and_hash(bucket: Bucket) -> None:
    objects = connect(bucket)
    put(objects)
    head = objects.head("a/video.mp4", at_once())
    assert (head.size_bytes, head.sha256, head.etag) == (6000, SHA256, hashlib.md5(BODY).hexdigest())
    assert objects.sha256_of("a/video.mp4", at_once()) == SHA256
    assert get(objects.sign("a/video.mp4", 60))[1]["Content-Type"] == "video/mp4"


def test_create_replaces_nothing(bucket: Bucket) -> None:
    objects = connect(bucket)
    put(objects)
    with pytest.raises(KeyTaken):
        objects.create("a/video.mp4", b"other", "video/mp4", "0" * 64, at_once())
    assert objects.read("a/video.mp4", 10**6, at_once()) == BODY


def test_create_signs_the_body_and_sends_no_other_checksum(bucket: Bucket, proxy: FaultProxy) -> None:
    put(connect(bucket))
    headers = proxy.requests[0].headers
    assert headers["x-amz-content-sha256"] == SHA256
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 ")
    assert "content-encoding" not in headers
    assert not [name for name in headers if name.startswith(("x-amz-checksum", "x-amz-sdk", "x-amz-trailer"))]


def test_a_body_damaged_on_its_way_is_refused_and_sent_again(bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.inject("flip", 2)
    put(connect(bucket))
    assert len(proxy.requests) == 3
    assert connect(bucket).sha256_of("a/video.mp4", at_once()) == SHA256


def test_head_finds_the_hash_in_whatever_case_the_store_answers(bucket: Bucket, proxy: FaultProxy) -> None:
    put(connect(bucket))
    proxy.rewrite_head = lambda head: head.replace(b"x-amz-meta-sha256", b"X-Amz-Meta-Sha256")
    assert connect(bucket).head("a/video.mp4", at_once()).sha256 == SHA256


def test_read_asks_again_when_the_answer_ends_early(bucket: Bucket, proxy: FaultProxy) -> None:
    put(connect(bucket))
    proxy.inject("cut", 2, matching="GET ")
    assert connect(bucket).read("a/video.mp4", 10**6, Patience.lasting(20.0, hurried)) == BODY
    assert [request.fault for request in proxy.requests if request.method == "GET"] == ["cut", "cut", None]


def test_read_gives_no_more_than_it_is_asked_for(bucket: Bucket) -> None:
    put(connect(bucket))
    assert connect(bucket).read("a/video.mp4", 8, at_once()) == b"framesfr"


def test_open_signed_asks_again_when_the_answer_ends_early(bucket: Bucket, proxy: FaultProxy) -> None:
    put(connect(bucket))
    proxy.inject("cut", 1, matching="X-Amz-Signature")
    assert connect(bucket).open_signed("a/video.mp4", 60, Patience.lasting(20.0, hurried)) == BODY


def test_an_answer_without_what_it_must_have_is_an_outage(bucket: Bucket, proxy: FaultProxy) -> None:
    objects = connect(bucket)
    upload_id = objects.start_upload("a/video.mp4", "video/mp4", SHA256, at_once())
    proxy.rewrite_head = lambda head: re.sub(rb"(?im)^etag:.*\r\n", b"", head)
    with pytest.raises(StoreUnwell):
        objects.put_part("a/video.mp4", upload_id, 1, BODY, at_once())


def test_clock_skew_is_none_when_the_store_tells_no_time(bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.rewrite_head = lambda head: re.sub(rb"(?im)^date:.*\r\n", b"Date: soon\r\n", head)
    assert connect(bucket).clock_skew_s(at_once()) == 0.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"secret_access_key": Secret("wrong")},
         "the store says that the secret key is wrong; check BUCKET_SECRET_ACCESS_KEY"),
        ({"name": "missing-bucket"}, "the bucket does not exist; check BUCKET_NAME and BUCKET_ENDPOINT_URL"),
    ],
)  # fmt: skip
def test_a_refusal_comes_at_once_after_one_request(bucket: Bucket, proxy: FaultProxy, change, sentence) -> None:
    objects = connect(replace(bucket, **change))
    started = time.monotonic()
    with pytest.raises(StoreRefused) as caught:
        objects.create("a/video.mp4", BODY, "video/mp4", SHA256, Patience.lasting(60.0))
    assert caught.value.sentence == sentence
    assert caught.value.retryable is False
    assert time.monotonic() - started < 30.0  # half of the patience
    assert len(proxy.requests) == 1


def test_a_closed_port_is_an_outage_and_not_a_refusal(bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.close()
    with pytest.raises(StoreUnwell) as caught:
        connect(bucket).head("a/video.mp4", at_once())
    assert caught.value.sentence == "the store did not answer"
    assert caught.value.retryable is True


def test_sign_opens_the_object_and_parts_of_it(bucket: Bucket) -> None:
    objects = connect(bucket)
    put(objects)
    url = objects.sign("a/video.mp4", 60)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url
    assert "X-Amz-Expires=60" in url
    assert get(url)[2] == BODY
    status, headers, body = get(url, Range="bytes=0-5")
    assert (status, body, headers["Content-Range"]) == (206, b"frames", "bytes 0-5/6000")


def test_sign_opens_nothing_else(bucket: Bucket) -> None:
    objects = connect(bucket)
    put(objects)
    put(objects, "b/video.mp4")
    url = objects.sign("a/video.mp4", 60)
    assert get(url.replace("/a/", "/b/"))[0] == 403
    assert get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=600"))[0] == 403
    assert get(url.split("?")[0])[0] in (400, 403)


def test_sign_expires(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = connect(bucket)
    put(objects)
    signed_at = datetime.now(UTC) - timedelta(seconds=120)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: signed_at)
    assert get(objects.sign("a/video.mp4", 600))[0] == 200
    assert get(objects.sign("a/video.mp4", 60))[0] == 403


def test_connect_has_one_client_for_the_same_keys_and_another_for_others() -> None:
    bucket = bucket_at("http://127.0.0.1:9")
    assert connect(bucket) is connect(bucket_at("http://127.0.0.1:9"))
    assert connect(bucket) is not connect(replace(bucket, secret_access_key=Secret("other")))


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without Python's search for objects that only each other hold: what goes, goes with its last holder."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_guests_client_costs_little_and_leaves_little_behind() -> None:
    """From a session of its own a client is 155,000 blocks of memory, and all but 2,500 stay; this one is 4,700."""
    Objects(bucket_at("http://127.0.0.1:9"))
    before = sys.getallocatedblocks()
    guest = Objects(bucket_at("http://127.0.0.1:9", access_key="guest"))
    assert sys.getallocatedblocks() - before < 20_000
    del guest
    assert sys.getallocatedblocks() - before < 10_000


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("is_right", [True, False])
def test_a_guests_keys_go_with_its_client(bucket: Bucket, is_right: bool) -> None:
    secret = bucket.secret_access_key if is_right else Secret("wrong")
    before = held(secret)
    guest = Objects(replace(bucket, secret_access_key=secret))
    with suppress(KeyMissing, RightMissing):
        guest.head("a/video.mp4", at_once())
    assert held(secret) > before
    del guest
    assert held(secret) == before


def held(secret: Secret) -> int:
    return sum(isinstance(each, Credentials) and each.secret_key == str(secret) for each in gc.get_objects())


@pytest.fixture
def new_session() -> Iterator[None]:
    """boto3 reads the machine's settings anew, and forgets them afterwards."""
    s3._session.cache_clear()
    yield
    s3._session.cache_clear()


@pytest.mark.usefixtures("new_session")
def test_a_machine_with_broken_aws_settings_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StoreRefused, match="the store cannot be used with these settings; check BUCKET_ENDPOINT_URL"):
        Objects(bucket_at("http://127.0.0.1:9"))


def test_redirects_of_a_store_are_not_followed() -> None:
    with PlainStore() as inside, PlainStore("redirect", redirect_to=f"{inside.endpoint}/bucket/a") as store:
        objects = connect(bucket_at(store.endpoint))
        with pytest.raises(StoreRefused):
            objects.read("a", 100, at_once())
        with pytest.raises(StoreRefused):
            put(objects)
    assert [method for method, _ in store.requests] == ["GET", "PUT"]
    assert inside.requests == []


def test_debug_logging_shows_no_key_and_no_signature(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        put(connect(bucket))
        connect(bucket).sign("a/video.mp4", 60)
    assert str(bucket.secret_access_key) not in caplog.text
    assert "Signature" not in caplog.text


def test_storage_imports_without_boto3() -> None:
    code = "import sys, engine.storage, engine.store_check; print('botocore' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
