"""What may be sent as a job's answer, and the answers kept for jobs that are delivered twice."""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas.errors import InternalError, OutputTooLarge, error_response

MAX_ERROR_CHARACTERS = 4000
MAX_ERROR_BYTES = 100_000


@dataclass(frozen=True)
class Answer:
    """A response as JSON that can be sent. Each reader gets a fresh dict, for the SDK pops keys from it.

    `is_final`: the same job deserves the same answer again. `is_fault`: this process must not run another.
    """

    body: bytes
    is_final: bool
    is_fault: bool

    def response(self) -> dict[str, Any]:
        response: dict[str, Any] = json.loads(self.body)
        return response


def seal(response: dict[str, Any], limit_bytes: int) -> Answer:
    """Check that a response can be sent: the SDK only logs that it cannot, and the caller hears nothing.

    Raises:
        InternalError: not a filled dict, or not JSON: bytes, NaN, a lone surrogate.
        OutputTooLarge: RunPod would refuse it.
    """
    if not isinstance(response, dict) or not response:
        raise InternalError("the worker made no result")
    try:
        body = json.dumps(response, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InternalError("the worker made a result that cannot be sent") from error
    size_bytes = len(body) + len('{"output": }')
    if size_bytes > limit_bytes:
        raise OutputTooLarge(
            f"the response has {size_bytes} bytes and RunPod takes {limit_bytes}; set BUCKET_ENDPOINT_URL, "
            "BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY on the endpoint to receive a URL instead"
        )
    return Answer(body, is_final=True, is_fault=response.get("refresh_worker") is True)


def seal_error(error: BaseException) -> Answer:
    """Make the answer of a failed job. It can always be sent, without lone surrogates and endless lists."""
    response = error_response(error)
    if len(json.dumps(response)) > MAX_ERROR_BYTES:
        response["error"] = response["error"][:MAX_ERROR_CHARACTERS] + " …"
        response.pop("problems", None)
    body = json.dumps(response, ensure_ascii=False).encode("utf-8", "replace")
    return Answer(body, is_final=not response["retryable"], is_fault=response.get("refresh_worker") is True)


class FirstAnswers:
    """The last final answers by job id and input: a job is delivered again if the platform is in doubt.

    `max_age_s`: so long an answer is good for; the URLs in it expire.
    """

    def __init__(
        self,
        max_age_s: float,
        max_answers: int = 64,
        max_bytes: int = 32 * 2**20,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_age_s = max_age_s
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._now = now
        self._size_bytes = 0
        self._answers: OrderedDict[tuple[str, str], tuple[float, Answer]] = OrderedDict()

    def recall(self, job: dict[str, Any]) -> Answer | None:
        key = _key(job)
        if key is None or key not in self._answers:
            return None
        since, answer = self._answers[key]
        return answer if self._now() - since <= self._max_age_s else None

    def remember(self, job: dict[str, Any], answer: Answer) -> None:
        key = _key(job)
        if key is None or not answer.is_final or len(answer.body) > self._max_bytes:
            return
        self._forget(key)
        self._answers[key] = (self._now(), answer)
        self._size_bytes += len(answer.body)
        while self._size_bytes > self._max_bytes or len(self._answers) > self._max_answers:
            self._forget(next(iter(self._answers)))

    def _forget(self, key: tuple[str, str]) -> None:
        if key in self._answers:
            _, answer = self._answers.pop(key)
            self._size_bytes -= len(answer.body)


def _key(job: dict[str, Any]) -> tuple[str, str] | None:
    """Tell jobs apart: the same id with another input is another job. None: too strange to be remembered."""
    try:
        asked = json.dumps([job.get("input"), job.get("s3Config")], sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
    return str(job["id"]), hashlib.sha256(asked.encode()).hexdigest()
