"""What every store promises, and the names under which files are kept."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.outputs import MediaFile
from schemas.errors import EncodingFailed

UNREADABLE = "the finished file cannot be read from the worker's disk"

_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*\.[a-z0-9]+")


@dataclass(frozen=True)
class Delivered:
    """A file that is where the response says it is."""

    url: str
    """What the response shows: a signed URL, an absolute path, or a data URI."""
    key: str
    """Its name in the store. It says nothing about the caller: the job's id is in it as a hash."""
    kind: Literal["s3", "local", "inline"]
    sha256: str
    size_bytes: int


class Store(Protocol):
    """One job's way out. Nothing is returned that is not already safe."""

    def deliver(self, files: Sequence[MediaFile], job_id: str) -> list[Delivered]:
        """Put all files of the job where the caller can get them; return one for each, in their order.

        A file keeps its own name, such as `video.mp4`, no two of a job the same. The same job id and name lead to
        the same place; another file that stands there is never replaced.

        Raises:
            DeliveryFailed: names the keys; `retryable` says whether the same request may succeed later.
            OutputTooLarge: only the response could carry a file, and it is too large for that.
            EncodingFailed: a file on the worker's disk is gone, or not the one that was verified.
        """

    def recall(self, job_id: str, input_sha256: str) -> dict[str, Any] | None:
        """The recorded response of this job with this very input, if all its files stand; URLs signed afresh.

        Raises:
            DeliveryFailed: the store refuses these keys; better known now than after the card has worked.
        """

    def record(
        self, job_id: str, input_sha256: str, response: dict[str, Any], delivered: Sequence[Delivered]
    ) -> dict[str, Any]:
        """Keep the response beside its files; return the one to answer with, an earlier one if that stands.

        Never fails: an answer that could not be recorded is still an answer.
        """


def job_key(job_id: str, name: str) -> str:
    """`<hash of the job id>/<name>`: any id makes a harmless key, the same id always the same one.

    `name`: a file's name such as `video.mp4`, in lower case; ours, never the caller's.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return f"{hashlib.sha256(job_id.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}/{name}"


def with_suffix(key: str, suffix: str) -> str:
    """`a/b.mp4` and `x` as `a/b-x.mp4`."""
    stem, dot, extension = key.rpartition(".")
    return f"{stem}-{suffix}{dot}{extension}"


def data_uri(file: MediaFile) -> str:
    """Raises EncodingFailed: the file cannot be read."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise EncodingFailed(UNREADABLE) from error
    return f"data:{file.content_type};base64,{base64.b64encode(content).decode('ascii')}"


def data_uri_bytes(file: MediaFile) -> int:
    """Length of `data_uri(file)`, without making it."""
    return len(f"data:{file.content_type};base64,") + 4 * -(-file.size_bytes // 3)
