"""Where a finished file goes: an S3 bucket, the machine's own disk, or the response itself."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import outbox
from engine.bucket import bucket_from_request, bucket_from_settings
from engine.delivery import Delivered, Store, data_uri, data_uri_bytes, job_key, with_suffix
from engine.outputs import MediaFile
from engine.s3 import Patience, connect
from engine.s3_store import GuestStore, S3Store, Terms
from engine.settings import Settings
from engine.upload import take_fingerprint, upload
from schemas.errors import DeliveryFailed, OutputTooLarge, WorkerError

SWEEP_S = 20.0
"""Patience with one entry of the outbox; the next sweep has the same again."""

_log = logging.getLogger(__name__)


def open_store(settings: Settings, s3_config: object = None, *, pause: Callable[[float], None] = time.sleep) -> Store:
    """The store of one job. Opens no connection; the host of a request's endpoint is looked up.

    `s3_config`: the job's own `s3Config` as it came, None if it has none; it goes before the environment.
    `pause` sleeps between the tries of a failing store and may raise to end the wait: JobTimeout and
    WorkerShutdown leave the files in the outbox, Cancelled drops them.

    Raises:
        SettingsError: the environment names no usable bucket.
        InvalidInput: the request's `s3Config` is not one.
    """
    terms = Terms(settings.bucket_prefix, settings.bucket_url_expiry_s, settings.bucket_retry_s, pause)
    if s3_config is not None:
        return GuestStore(bucket_from_request(s3_config, allow=settings.fetch_allow), terms)
    if settings.has_bucket:
        return S3Store(bucket_from_settings(settings), terms, settings.outbox_dir)
    if settings.in_cloud:
        return InlineStore(settings.response_limit_bytes)
    return LocalStore(settings.output_dir)


def sweep(settings: Settings, *, pause: Callable[[float], None] = time.sleep) -> int:
    """Deliver what waits in the outbox; returns how many files went. For a worker's start and idle time."""
    if not settings.has_bucket:
        return 0
    bucket = bucket_from_settings(settings)

    def deliver(entry: outbox.Entry) -> None:
        upload(connect(bucket), entry.file, entry.key, Patience.lasting(SWEEP_S, pause))

    return outbox.sweep(settings.outbox_dir, deliver)


def sweep_outbox(settings: Settings) -> None:
    """`sweep` beside a worker's jobs. A failure of it is no job's: the next start tries again."""
    try:
        sweep(settings)
    except (WorkerError, OSError) as error:
        _log.error("the outbox was not swept: %s", error)


@dataclass(frozen=True)
class InlineStore:
    """The response itself carries the file: the only way out of the cloud without S3."""

    limit_bytes: int

    def deliver(self, files: Sequence[MediaFile], job_id: str) -> list[Delivered]:
        return [self._inlined(file, job_key(job_id, file.path.name)) for file in files]

    def _inlined(self, file: MediaFile, key: str) -> Delivered:
        size_bytes = data_uri_bytes(file)
        if size_bytes > self.limit_bytes:
            raise _too_large(f"the {file.path.name} as base64", size_bytes, self.limit_bytes)
        return Delivered(data_uri(file), key, "inline", file.sha256, file.size_bytes)

    def recall(self, _job_id: str, _input_sha256: str) -> dict[str, Any] | None:
        return None

    def record(
        self, _job_id: str, _input_sha256: str, response: dict[str, Any], _delivered: Sequence[Delivered]
    ) -> dict[str, Any]:
        return response


@dataclass(frozen=True)
class LocalStore:
    """The machine's own disk, for runs outside the cloud. Pictures are data URIs, as worker-sdxl has them.

    Remembers no response: the same command run twice is meant twice.
    """

    folder: Path

    def deliver(self, files: Sequence[MediaFile], job_id: str) -> list[Delivered]:
        return [self._placed(file, job_key(job_id, file.path.name)) for file in files]

    def _placed(self, file: MediaFile, key: str) -> Delivered:
        if file.content_type.startswith("image/"):
            return Delivered(data_uri(file), key, "inline", file.sha256, file.size_bytes)
        try:
            for candidate in (key, with_suffix(key, file.sha256[:8])):
                path = self.folder / candidate
                if _place(file, path):
                    return Delivered(str(path.absolute()), candidate, "local", file.sha256, file.size_bytes)
        except OSError as error:
            raise DeliveryFailed(f"WORKER_OUTPUT_DIR did not take {key} ({error.strerror})") from error
        raise DeliveryFailed(f"WORKER_OUTPUT_DIR holds another file as {key}")

    def recall(self, _job_id: str, _input_sha256: str) -> dict[str, Any] | None:
        return None

    def record(
        self, _job_id: str, _input_sha256: str, response: dict[str, Any], _delivered: Sequence[Delivered]
    ) -> dict[str, Any]:
        return response


def _place(file: MediaFile, path: Path) -> bool:
    """Copy the file to `path`, as a whole, unless another one stands there; True if this file does."""
    if path.exists():
        return take_fingerprint(path).sha256 == file.sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as copy:
        hidden = Path(copy.name)
        try:
            with file.path.open("rb") as source:
                shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
            hidden.chmod(0o644)  # a person's file, unlike the temporary one's 0600
            _name(hidden, path)
        except FileExistsError:  # another run was faster
            return take_fingerprint(path).sha256 == file.sha256
        finally:
            with suppress(OSError):
                hidden.unlink()
    _log.info("wrote %s, %d bytes", path.name, file.size_bytes)
    return True


def _name(hidden: Path, path: Path) -> None:
    """Give a whole file its name, in one step. Raises FileExistsError, as a rename would not."""
    try:
        path.hardlink_to(hidden)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        hidden.replace(path)


def _too_large(what: str, size_bytes: int, limit_bytes: int) -> OutputTooLarge:
    return OutputTooLarge(
        f"{what} is {size_bytes / 1e6:.1f} MB, over the {limit_bytes / 1e6:.1f} MB that a response may have;"
        " to have it in S3, set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY,"
        " or send s3Config"
    )
