"""Buckets on the S3 servers: how to name them, what is in them, and files to put there."""

import functools
import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from engine.bucket import Bucket
from engine.outputs import MediaFile
from engine.settings import Secret, Settings
from tests.servers.swift import Swift


def media_file(path: Path, body: bytes, content_type: str = "video/mp4") -> MediaFile:
    path.write_bytes(body)
    return MediaFile(path, content_type, 480, 832, 81, len(body), hashlib.sha256(body).hexdigest(), 16.0, 5.0625)


def bucket_at(endpoint: str, name: str = "bucket", access_key: str = "key", secret_key: str = "secret") -> Bucket:
    return Bucket(endpoint, name, "us-east-1", "path", Secret(access_key), Secret(secret_key))


def settings_for(bucket: Bucket, folder: Path, **changes: str) -> Settings:
    """What an operator sets for this bucket."""
    return Settings.from_env({
        "BUCKET_ENDPOINT_URL": f"{bucket.endpoint_url}/{bucket.name}",
        "BUCKET_ACCESS_KEY_ID": str(bucket.access_key_id),
        "BUCKET_SECRET_ACCESS_KEY": str(bucket.secret_access_key),
        "WORKER_OUTBOX_DIR": str(folder / "outbox"),
        **changes,
    })  # fmt: skip


@functools.cache
def client_of(swift: Swift) -> Any:
    """A client of the tests' own, past the proxy and past our code."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=swift.endpoint,
        aws_access_key_id=swift.access_key,
        aws_secret_access_key=swift.secret_key,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


def empty_bucket(swift: Swift, name: str) -> None:
    """Make the bucket, or take everything out of it."""
    client = client_of(swift)
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)
    for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", []):
        client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
    for each in client.list_objects_v2(Bucket=name).get("Contents", []):
        client.delete_object(Bucket=name, Key=each["Key"])


def contents(swift: Swift, bucket: Bucket) -> dict[str, bytes]:
    """Every object of the bucket."""
    client = client_of(swift)
    keys = [each["Key"] for each in client.list_objects_v2(Bucket=bucket.name).get("Contents", [])]
    return {key: client.get_object(Bucket=bucket.name, Key=key)["Body"].read() for key in keys}


def unfinished(swift: Swift, bucket: Bucket) -> list[str]:
    uploads = client_of(swift).list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    return [upload["Key"] for upload in uploads]


def hurried(seconds: float) -> None:
    """A pause for tests: a retry loop as it is, twenty times faster."""
    time.sleep(seconds / 20)
