"""Every way a request can fail, as one tree.

WorkerError
├── InvalidInput          the request itself: every problem at once
├── FetchFailed           a picture's or video's URL could not be read
├── InvalidMedia          the bytes are not a picture or video we accept
├── RequestTooLarge       valid, but more than this card can hold or this worker may do
├── WeightsMissing        the profile was not baked where we looked
├── WeightsCorrupt        baked, but not what the manifest says
├── OutOfMemory           the card ran out, also after the retry
├── GpuFault              the CUDA context is poisoned; the process must end
├── BadOutput             the model made frames nobody would accept
├── EncodingFailed        the file could not be written or did not verify
├── DiskFull              the worker's disk has no room for the result
├── OutputTooLarge        the result fits no way of delivery
├── DeliveryFailed        the store did not take the file
├── JobTimeout            the soft deadline passed
├── Cancelled             the caller took the job back
├── WorkerShutdown        the platform is taking the worker away
├── Busy                  another job holds the card
├── SettingsError         an environment variable is wrong; said at start
├── CardUnfit             no card, or too small a one, or too small a host beside it; said at start
└── InternalError         a bug of ours; the sentence says nothing else

A foreign exception becomes one of these once, at the edge where it is understood.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one field. `field` is a dotted path, '' for the request as a whole."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class WorkerError(Exception):
    """A failure with a sentence for the caller: no path, address, prompt, key or traceback in it.

    `retryable`: the same request may succeed later, unchanged. `refresh_worker`: this process must not run another.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    refresh_worker: ClassVar[bool] = False

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class InvalidInput(WorkerError):
    """The request breaks the contract; `problems` holds everything found, not only the first."""

    code = "invalid_input"
    http_status = 422

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class FetchFailed(WorkerError):
    """One sentence for a closed port, a blocked address and an unknown name alike, so that it is no port scanner."""

    code = "fetch_failed"
    http_status = 422


class InvalidMedia(WorkerError):
    code = "invalid_media"
    http_status = 422


class RequestTooLarge(WorkerError):
    code = "request_too_large"
    http_status = 422


class WeightsMissing(WorkerError):
    code = "weights_missing"
    http_status = 503


class WeightsCorrupt(WorkerError):
    code = "weights_corrupt"
    http_status = 503


class OutOfMemory(WorkerError):
    code = "out_of_memory"
    http_status = 507


class GpuFault(WorkerError):
    code = "gpu_fault"
    http_status = 500
    retryable = True
    refresh_worker = True


class BadOutput(WorkerError):
    code = "bad_output"
    http_status = 500


class EncodingFailed(WorkerError):
    code = "encoding_failed"
    http_status = 500
    retryable = True


class DiskFull(WorkerError):
    """Retryable: another worker has another disk."""

    code = "disk_full"
    http_status = 507
    retryable = True


class OutputTooLarge(WorkerError):
    code = "output_too_large"
    http_status = 413


class DeliveryFailed(WorkerError):
    code = "delivery_failed"
    http_status = 502
    retryable = True


class JobTimeout(WorkerError):
    code = "timeout"
    http_status = 504


class Cancelled(WorkerError):
    code = "cancelled"
    http_status = 499


class WorkerShutdown(WorkerError):
    code = "worker_shutdown"
    http_status = 503
    retryable = True


class Busy(WorkerError):
    code = "busy"
    http_status = 503
    retryable = True


class SettingsError(WorkerError):
    code = "settings_error"
    http_status = 500


class CardUnfit(WorkerError):
    code = "card_unfit"
    http_status = 503


class InternalError(WorkerError):
    code = "internal"


def error_response(error: BaseException) -> dict[str, Any]:
    """The response of a failed job, in RunPod's shape: `error` is always a non-empty string.

    Anything that is not a WorkerError becomes `internal` with a fixed sentence: its text may hold paths and prompts.
    """
    if not isinstance(error, WorkerError):
        error = InternalError("the worker failed; the operator's log holds the reason under this job's id")
    response: dict[str, Any] = {
        "error": f"{error.code}: {error.sentence}",
        "code": error.code,
        "retryable": error.retryable,
    }
    if isinstance(error, InvalidInput):
        response["problems"] = [{"field": p.field, "message": p.message} for p in error.problems]
    if error.refresh_worker:
        response["refresh_worker"] = True
    json.dumps(response, allow_nan=False).encode()  # what cannot be sent must fail here, not in the SDK
    return response
