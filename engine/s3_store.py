"""The two stores on S3: the operator's own bucket, and the bucket of one request."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine import outbox
from engine.bucket import Bucket
from engine.delivery import UNREADABLE, Delivered, job_key, with_suffix
from engine.outbox import Entry
from engine.outputs import MediaFile
from engine.record import Record, make_record, read_record
from engine.s3 import Objects, Patience, connect
from engine.s3_errors import KeyMissing, KeyTaken, RightMissing, StoreUnwell
from engine.upload import upload
from schemas.errors import DeliveryFailed, EncodingFailed, JobTimeout, WorkerShutdown

RECORD_S = 5.0
"""How long a job waits for its record, which serves a second coming of the job and not this answer."""

RECORD_BYTES = 32 * 2**20
"""Largest record that is read. RunPod takes responses up to 20 MB; a chain's `state` alone has 1.2 MB at 1280x720."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """How files are kept in a bucket, whoever owns it."""

    prefix: str
    url_expiry_s: int
    retry_s: float
    pause: Callable[[float], None]

    def patience(self) -> Patience:
        """For all files of a job: as long as the operator set, or until the job's pause ends it."""
        return Patience.lasting(self.retry_s, self.pause)

    def brief(self) -> Patience:
        """For a record, which may neither hold nor fail the job."""
        return Patience.lasting(min(self.retry_s, RECORD_S))

    def key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix.strip("/"), name) if part)

    def entries(self, files: Sequence[MediaFile], job_id: str) -> list[Entry]:
        return [Entry(self.key(job_key(job_id, file.path.name)), file) for file in files]


@dataclass(frozen=True)
class GuestStore:
    """The bucket of a request's `s3Config`. What stands in it is the caller's word, and is not believed.

    What it does not take is lost with the job: to send it later, the caller's keys would have to be kept.
    """

    bucket: Bucket
    terms: Terms

    @cached_property
    def _objects(self) -> Objects:
        """A client of this job's own, so that the caller's keys go when the job goes (see apps.runpod_jobs)."""
        return Objects(self.bucket)

    def deliver(self, files: Sequence[MediaFile], job_id: str) -> list[Delivered]:
        entries = self.terms.entries(files, job_id)
        delivered: list[Delivered] = []
        try:
            _send(self._objects, self.terms, entries, delivered)
        except DeliveryFailed as error:
            lost = entries[len(delivered) :]
            verb = "was" if len(lost) == 1 else "were"
            raise type(error)(f"{error.sentence}; {_keys(lost)} {verb} not stored") from error
        return delivered

    def recall(self, job_id: str, input_sha256: str) -> dict[str, Any] | None:
        """Try the keys, no more: a record here could make the worker answer whatever its owner likes."""
        del input_sha256
        _read(self._objects, self.terms.key(job_key(job_id, "result.json")), self.terms, max_bytes=1)
        return None

    def record(
        self, job_id: str, input_sha256: str, response: dict[str, Any], delivered: Sequence[Delivered]
    ) -> dict[str, Any]:
        key = self.terms.key(job_key(job_id, "result.json"))
        try:
            _write(self._objects, key, make_record(input_sha256, response, delivered), self.terms)
        except DeliveryFailed as error:
            _log.warning("%s was not recorded: %s", key, error.sentence)
        return response


@dataclass(frozen=True)
class S3Store:
    """The operator's bucket. A file that it does not take waits in the outbox, and so do those after it."""

    bucket: Bucket
    terms: Terms
    outbox_dir: Path

    def deliver(self, files: Sequence[MediaFile], job_id: str) -> list[Delivered]:
        entries = self.terms.entries(files, job_id)
        delivered: list[Delivered] = []
        try:
            _send(connect(self.bucket), self.terms, entries, delivered)
        except (DeliveryFailed, JobTimeout, WorkerShutdown) as error:
            told = [f"already stored: {_keys(delivered)}"] if delivered else []
            told += self._keep(entries[len(delivered) :])
            raise type(error)("; ".join([error.sentence, *told])) from error
        return delivered

    def recall(self, job_id: str, input_sha256: str) -> dict[str, Any] | None:
        objects = connect(self.bucket)
        for key in self._record_keys(job_id, input_sha256):
            record = _read(objects, key, self.terms)
            if record is None:
                return None
            if record.input_sha256 == input_sha256:
                return self._answer(objects, record)
        return None

    def record(
        self, job_id: str, input_sha256: str, response: dict[str, Any], delivered: Sequence[Delivered]
    ) -> dict[str, Any]:
        record = make_record(input_sha256, response, delivered)
        try:
            return self._record(connect(self.bucket), job_id, record) or response
        except DeliveryFailed as error:
            _log.warning("the response of %s was not recorded: %s", ", ".join(record.objects), error.sentence)
            return response

    def _record(self, objects: Objects, job_id: str, record: Record) -> dict[str, Any] | None:
        """Write the record, or find the one of a twin that was faster and give way to it, files included."""
        for key in self._record_keys(job_id, record.input_sha256):
            try:
                _write(objects, key, record, self.terms)
                return None
            except KeyTaken:
                standing = _read(objects, key, self.terms)
            if standing is None or standing.input_sha256 != record.input_sha256:
                continue
            answer = self._answer(objects, standing)
            if answer is not None:
                self._discard(objects, record.objects.keys() - standing.objects.keys())
            return answer
        return None

    def _discard(self, objects: Objects, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                objects.delete(key, self.terms.brief())
            except DeliveryFailed as error:
                _log.warning("%s, which nobody was told of, stays: %s", key, error.sentence)

    def _answer(self, objects: Objects, record: Record) -> dict[str, Any] | None:
        try:
            for key, sha256 in record.objects.items():
                if objects.head(key, self.terms.brief()).sha256 != sha256:
                    return None
        except (KeyMissing, RightMissing, StoreUnwell) as error:
            _log.warning("a recorded file cannot be found: %s", error.sentence)
            return None
        return record.answer({key: objects.sign(key, self.terms.url_expiry_s) for key in record.objects})

    def _record_keys(self, job_id: str, input_sha256: str) -> tuple[str, str]:
        """Where the record is: under the job's name, or beside it if the id had another input before."""
        key = self.terms.key(job_key(job_id, "result.json"))
        return key, with_suffix(key, input_sha256[:8])

    def _keep(self, entries: Sequence[Entry]) -> list[str]:
        """Leave in the outbox what it takes; return what the caller is told of it."""
        kept: list[Entry] = []
        lost: list[str] = []
        for entry in entries:
            try:
                outbox.keep(self.outbox_dir, entry)
                kept.append(entry)
            except DeliveryFailed as error:
                lost.append(error.sentence)
        if not kept:
            return lost
        noun = "file is" if len(kept) == 1 else "files are"
        return [f"the {noun} kept and will be stored as {_keys(kept)}", *lost]


def _send(objects: Objects, terms: Terms, entries: Sequence[Entry], delivered: list[Delivered]) -> None:
    """Store one after another, with one patience for all; `delivered` grows by each that stands."""
    patience = terms.patience()
    for entry in entries:
        if delivered:
            patience.pause(0.0)  # a cancel must not wait for the last of them
        try:
            key = upload(objects, entry.file, entry.key, patience)
        except OSError as error:
            raise EncodingFailed(UNREADABLE) from error
        url = objects.sign(key, terms.url_expiry_s)
        delivered.append(Delivered(url, key, "s3", entry.file.sha256, entry.file.size_bytes))


def _keys(files: Iterable[Entry | Delivered]) -> str:
    return ", ".join(file.key for file in files)


def _write(objects: Objects, key: str, record: Record, terms: Terms) -> None:
    body = record.to_bytes()
    objects.create(key, body, "application/json", hashlib.sha256(body).hexdigest(), terms.brief())


def _read(objects: Objects, key: str, terms: Terms, max_bytes: int = RECORD_BYTES) -> Record | None:
    """The record; None if there is none, it may not be read, or the store is unwell: the job goes on."""
    try:
        return read_record(objects.read(key, max_bytes, terms.brief()))
    except (KeyMissing, RightMissing):
        return None
    except StoreUnwell as error:
        _log.warning("%s could not be read: %s", key, error.sentence)
        return None
