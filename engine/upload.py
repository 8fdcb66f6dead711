"""A finished file into a bucket: whole or in parts, never over another object, and proven to be there."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.delivery import with_suffix
from engine.outputs import MediaFile
from engine.s3 import Objects, Patience
from engine.s3_errors import KeyMissing, KeyTaken, StoreUnwell, UploadGone
from schemas.errors import DeliveryFailed, EncodingFailed, JobTimeout, WorkerShutdown

PART_BYTES = 8 * 2**20
MULTIPART_BYTES = 16 * 2**20
"""Files above this go in parts, so that a fault costs one part and not the whole file."""
CLEANUP_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprint:
    """What the bytes on disk are now: our SHA-256, and their ETag in a store whose ETags are MD5 sums."""

    sha256: str
    etag: str


def upload(objects: Objects, file: MediaFile, key: str, patience: Patience) -> str:
    """Store `file` and return its key: `key`, or `key` with the hash in its name if that is taken.

    Sending the same file twice, at once or after an answer was lost, ends in one object.

    Raises:
        EncodingFailed: the file on disk is not the one that was verified.
        StoreRefused: the store will not have it.
        StoreUnwell: the patience ran out.
    """
    fingerprint = take_fingerprint(file.path)
    if fingerprint.sha256 != file.sha256:
        raise EncodingFailed("the file changed on the worker's disk after it was verified")
    for candidate in (key, with_suffix(key, file.sha256[:8])):
        with suppress(KeyTaken):
            patience.persist(partial(_put_and_verify, objects, file, candidate, fingerprint.etag, patience))
            _log.info("stored %s, %d bytes", candidate, file.size_bytes)
            return candidate
    raise KeyTaken("the store did not keep the file's checksum, or the key belongs to another file")


def take_fingerprint(path: Path) -> Fingerprint:
    """Read the file once. A multipart ETag is the MD5 of the parts' MD5 sums, a hyphen, and their number."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    sums = []
    for part in _parts(path):
        sha256.update(part)
        md5.update(part)
        sums.append(hashlib.md5(part, usedforsecurity=False).digest())
    if path.stat().st_size > MULTIPART_BYTES:
        return Fingerprint(
            sha256.hexdigest(),
            f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}",
        )
    return Fingerprint(sha256.hexdigest(), md5.hexdigest())


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while part := source.read(PART_BYTES):
            yield part


def _put_and_verify(objects: Objects, file: MediaFile, key: str, etag: str, patience: Patience) -> None:
    """One attempt at one key. Raises KeyTaken if what stands there is not this file."""
    # By this file, if an earlier answer was lost or a twin of this job was faster: the verification tells.
    with suppress(KeyTaken, UploadGone):
        if file.size_bytes > MULTIPART_BYTES:
            _put_in_parts(objects, file, key, patience)
        else:
            objects.create(key, file.path.read_bytes(), file.content_type, file.sha256, patience)
    verify(objects, file, key, etag, patience)


def verify(objects: Objects, file: MediaFile, key: str, etag: str, patience: Patience) -> None:
    """Return only if the object under `key` is this file, byte for byte.

    Metadata proves whose object it is, not that its bytes arrived. Those are proven by the store's ETag where
    it is the MD5 we expect, otherwise (SSE-KMS, other part rules) by reading the object back.

    Raises:
        KeyTaken: the object is not this file.
        StoreUnwell: it should be this file but is missing or damaged; a damaged one has been deleted.
    """
    try:
        head = objects.head(key, patience)
        if head.sha256 != file.sha256:
            raise KeyTaken("the key belongs to another file")
        is_size = head.size_bytes == file.size_bytes
        if is_size and (head.etag == etag or objects.sha256_of(key, patience) == file.sha256):
            return
    except KeyMissing as error:
        raise StoreUnwell("the store lost the file after it took it") from error
    objects.delete(key, patience)
    raise StoreUnwell("the store kept other bytes than it was sent")


def _put_in_parts(objects: Objects, file: MediaFile, key: str, patience: Patience) -> None:
    """Send the file in parts, one after another, and leave no unfinished upload behind."""
    upload_id = objects.start_upload(key, file.content_type, file.sha256, patience)
    etags = []
    try:
        for number, part in enumerate(_parts(file.path), 1):
            patience.pause(0.0)
            etags.append(objects.put_part(key, upload_id, number, part, patience))
        objects.finish_upload(key, upload_id, etags, patience)
    except (JobTimeout, WorkerShutdown):
        raise  # there is no time; whoever delivers the file later cleans up
    except BaseException:
        _clean_up(objects, key, [upload_id], Patience.lasting(0.0))
        raise
    _clean_up(objects, key, None, Patience.lasting(CLEANUP_S))


def _clean_up(objects: Objects, key: str, upload_ids: list[str] | None, patience: Patience) -> None:
    """Abort these uploads, or all under `key`: once the object stands, none of them can be needed.

    They come from answers that were lost and from workers that were killed. If the store is out of reach they
    stay, which costs the operator storage until a lifecycle rule ends them, and the job nothing.
    """
    try:
        for upload_id in objects.unfinished_uploads(key, patience) if upload_ids is None else upload_ids:
            objects.abort_upload(key, upload_id, patience)
    except DeliveryFailed as error:
        _log.warning("unfinished uploads of %s were left behind: %s", key, error.sentence)
