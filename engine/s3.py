"""Requests to one S3 bucket. boto3 is made and asked here; `s3_errors` reads its failures, `guest_wire` its requests.

boto3's own retries are off: ours last as long as the outage may, and never repeat a request that was
understood and refused. Bodies are signed (SigV4 with the SHA-256 of the body), so that a store which checks
signatures cannot take a damaged one. No other checksum header is sent: stores that are not AWS answer some of
them with an error, or write the aws-chunked framing into the object (boto3 issues 4392 and 4435).
"""

import functools
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPException
from typing import Any, TypeVar

from engine.bucket import Bucket
from engine.guest_wire import GuestWire
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

T = TypeVar("T")

READ_BYTES = 2**20

_session_lock = threading.Lock()
"""boto3's sessions are for one thread at a time; the outbox is swept beside jobs."""


@dataclass(frozen=True)
class Patience:
    """How long a store may be unwell. `pause` sleeps between tries and may raise to end the wait.

    A file in parts calls it with 0 before each of them: a cancel or a deadline must not wait for the last one.
    """

    until: float
    """On the clock of `time.monotonic`."""
    pause: Callable[[float], None] = time.sleep

    @classmethod
    def lasting(cls, budget_s: float, pause: Callable[[float], None] = time.sleep) -> "Patience":
        return cls(time.monotonic() + budget_s, pause)

    def persist(self, call: Callable[[], T]) -> T:
        """Call until it is not StoreUnwell or the time is up; then raise what it raised last.

        The pauses are "full jitter": uniform up to a bound that doubles from 0.2 s to 10 s.
        """
        bound_s = 0.2
        while True:
            try:
                return call()
            except StoreUnwell:
                delay_s = random.uniform(0, bound_s)
                if time.monotonic() + delay_s > self.until:
                    raise
            self.pause(delay_s)
            bound_s = min(2 * bound_s, 10.0)


@dataclass(frozen=True)
class Head:
    """What the store says of an object."""

    size_bytes: int
    etag: str
    sha256: str | None
    """Our own metadata, None on an object that is not ours."""


@functools.lru_cache(maxsize=8)
def connect(bucket: Bucket) -> "Objects":
    """The one client of these credentials: one for every job costs time, and a connection."""
    return Objects(bucket)


class Objects:
    """The objects of one bucket. Every method may raise StoreRefused, and StoreUnwell when patience ends."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._client = _client(bucket)
        self._has_conditions = True

    def create(self, key: str, body: bytes, content_type: str, sha256: str, patience: Patience) -> None:
        """Write an object where none stands. Raises KeyTaken, also if a try went unheard."""
        self._create(
            key,
            patience,
            lambda client, condition: client.put_object(
                Bucket=self.bucket.name,
                Key=key,
                Body=body,
                ContentType=content_type,
                Metadata={"sha256": sha256},
                **condition,
            ),
        )

    def start_upload(self, key: str, content_type: str, sha256: str, patience: Patience) -> str:
        """Begin a multipart upload and return its id."""
        return self._ask(
            patience,
            lambda client: client.create_multipart_upload(
                Bucket=self.bucket.name, Key=key, ContentType=content_type, Metadata={"sha256": sha256}
            )["UploadId"],
        )

    def put_part(self, key: str, upload_id: str, number: int, body: bytes, patience: Patience) -> str:
        """Send one part and return its ETag. Raises UploadGone."""
        return self._ask(
            patience,
            lambda client: client.upload_part(
                Bucket=self.bucket.name, Key=key, UploadId=upload_id, PartNumber=number, Body=body
            )["ETag"],
        )

    def finish_upload(self, key: str, upload_id: str, etags: list[str], patience: Patience) -> None:
        """Make the parts an object where none stands. Raises KeyTaken or UploadGone, also if a try went unheard."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        self._create(
            key,
            patience,
            lambda client, condition: client.complete_multipart_upload(
                Bucket=self.bucket.name,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **condition,
            ),
        )

    def abort_upload(self, key: str, upload_id: str, patience: Patience) -> None:
        """End an upload; one that is gone has ended."""
        with suppress(UploadGone, KeyMissing):
            self._ask(
                patience,
                lambda client: client.abort_multipart_upload(Bucket=self.bucket.name, Key=key, UploadId=upload_id),
            )

    def unfinished_uploads(self, key: str, patience: Patience) -> list[str]:
        """Ids of the multipart uploads begun under exactly this key."""
        answer = self._ask(patience, lambda client: client.list_multipart_uploads(Bucket=self.bucket.name, Prefix=key))
        return [upload["UploadId"] for upload in answer.get("Uploads", []) if upload["Key"] == key]

    def head(self, key: str, patience: Patience) -> Head:
        """Raises KeyMissing."""

        def ask_head(client: Any) -> Head:
            answer = client.head_object(Bucket=self.bucket.name, Key=key)
            metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
            return Head(answer["ContentLength"], str(answer.get("ETag", "")).strip('"'), metadata.get("sha256"))

        return self._ask(patience, ask_head)

    def read(self, key: str, max_bytes: int, patience: Patience) -> bytes:
        """The object's bytes, at most `max_bytes` of them. Raises KeyMissing."""

        def read_some(client: Any) -> bytes:
            answer = client.get_object(Bucket=self.bucket.name, Key=key)
            with closing(answer["Body"]) as body:
                return _whole(body.read(max_bytes), min(answer.get("ContentLength", 0), max_bytes))

        return self._ask(patience, read_some)

    def sha256_of(self, key: str, patience: Patience) -> str:
        """Read the whole object back, a piece at a time."""

        def read_all(client: Any) -> str:
            digest = hashlib.sha256()
            with closing(client.get_object(Bucket=self.bucket.name, Key=key)["Body"]) as body:
                for piece in body.iter_chunks(READ_BYTES):
                    digest.update(piece)
            return digest.hexdigest()

        return self._ask(patience, read_all)

    def delete(self, key: str, patience: Patience) -> None:
        self._ask(patience, lambda client: client.delete_object(Bucket=self.bucket.name, Key=key))

    def sign(self, key: str, expiry_s: int) -> str:
        """A URL that opens the object for `expiry_s` seconds. Asks nobody."""
        return str(
            self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket.name, "Key": key}, ExpiresIn=expiry_s
            )
        )

    def open_signed(self, key: str, expiry_s: int, patience: Patience) -> bytes | None:
        """What somebody gets who has nothing but a signed URL; None if the store refuses it."""
        from botocore.awsrequest import AWSRequest
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        url = self.sign(key, expiry_s)
        session = URLLib3Session(
            timeout=(self.bucket.connect_timeout_s, self.bucket.read_timeout_s), proxies=get_environ_proxies(url)
        )

        def open_it(_client: Any) -> bytes | None:
            answer = session.send(AWSRequest("GET", url).prepare())
            if answer.status_code >= 500 and answer.status_code != 501:
                raise StoreUnwell(f"the store is failing (status {answer.status_code})")
            if answer.status_code != 200:
                return None
            return _whole(answer.content, int(answer.headers.get("Content-Length", 0)))

        try:
            return self._ask(patience, open_it)
        finally:
            session.close()

    def clock_skew_s(self, patience: Patience) -> float:
        """Seconds that this machine's clock is ahead of the store's, whatever else the store says."""
        from botocore.exceptions import ClientError

        def ask_date(client: Any) -> float:
            try:
                answer = client.head_bucket(Bucket=self.bucket.name)
            except ClientError as error:
                answer = error.response
            date = parsedate_tz(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))
            return time.time() - mktime_tz(date) if date else 0.0

        return self._ask(patience, ask_date)

    def _ask(self, patience: Patience, call: Callable[[Any], T]) -> T:
        return patience.persist(lambda: self._ask_once(call))

    def _ask_once(self, call: Callable[[Any], T]) -> T:
        """One request; a foreign exception becomes ours here and nowhere else."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            return call(self._client)
        except (BotoCoreError, ClientError, ResponseParserError, OSError, HTTPException) as error:
            raise understand(error, self.bucket.labels) from error
        except KeyError as error:  # something between us and the store may say 200 on its own
            raise StoreUnwell("the store's answer lacks what such an answer has") from error

    def _create(self, key: str, patience: Patience, write: Callable[[Any, dict[str, str]], object]) -> None:
        if self._has_conditions:
            try:
                self._ask(patience, lambda client: write(client, {"IfNoneMatch": "*"}))
                return
            except ConditionUnknown:
                self._has_conditions = False
        with suppress(KeyMissing, RightMissing):
            self.head(key, patience)
            raise KeyTaken("the key is taken")
        self._ask(patience, lambda client: write(client, {}))


def _whole(body: bytes, size_bytes: int) -> bytes:
    """The body, unless the connection ended within it, which boto3 reports only of a body read without a limit."""
    if len(body) < size_bytes:
        raise StoreUnwell("the store's answer was cut")
    return body


@functools.cache
def _session() -> Any:
    """What boto3 knows of S3 and of its endpoints, read once for all clients. It holds nobody's keys.

    A client has a class of its own, which refers to itself as every class does. Once the client is gone, that class
    waits for a full garbage collection, and with it all that a session of its own would have read: 34,000 objects,
    11 MiB. Python begins one when there are four or five of them; the holes that they leave stay with the process.
    """
    import boto3.session

    return boto3.session.Session()


def _client(bucket: Bucket) -> Any:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    # At DEBUG botocore prints every header, signatures included.
    logging.getLogger("botocore").setLevel(logging.INFO)
    config = Config(
        signature_version="s3v4",  # boto3 signs URLs for a custom endpoint with SigV2 otherwise
        s3={"addressing_style": bucket.addressing, "payload_signing_enabled": True},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"total_max_attempts": 1},
        connect_timeout=bucket.connect_timeout_s,
        read_timeout=bucket.read_timeout_s,
        tcp_keepalive=True,
    )
    try:
        with _session_lock:
            client = _session().client(
                "s3",
                endpoint_url=bucket.endpoint_url,
                region_name=bucket.region,
                aws_access_key_id=str(bucket.access_key_id),
                aws_secret_access_key=str(bucket.secret_access_key),
                config=config,
            )
    except (BotoCoreError, ValueError) as error:
        raise StoreRefused(f"the store cannot be used with these settings; check {bucket.labels.endpoint}") from error
    client.meta.events.register("before-call.s3", _follow_no_redirect)
    if bucket.guest_allow is not None:
        client.meta.events.register("before-send.s3", GuestWire(bucket.guest_allow))
    return client


def _follow_no_redirect(context: dict[str, Any], **_event: Any) -> None:
    """Tell botocore that it has been redirected already.

    It would ask a store that redirects for the bucket's region, in a request that is redirected again, until
    Python's stack ends. A wrong region becomes an error that names the setting: URLs signed for it would not
    open either.
    """
    context.get("s3_redirect", {})["redirected"] = True
