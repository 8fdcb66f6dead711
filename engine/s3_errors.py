"""How an S3 store fails, in our words. The store's own words reach nobody: they may hold hosts and keys."""

import re
from http.client import HTTPException

from engine.bucket import Labels
from schemas.errors import DeliveryFailed

_RETRY_STATUS = frozenset({408, 409, 425, 429})
_RETRY_CODES = frozenset({
    "BadDigest", "IncompleteBody", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "XAmzContentSHA256Mismatch",
})  # fmt: skip


class StoreUnwell(DeliveryFailed):
    """An outage, or a request that was damaged on its way: worth another try."""


class StoreRefused(DeliveryFailed):
    """The store understood and said no. The same request will fail again."""

    retryable = False


class UploadGone(StoreRefused):
    """A multipart upload, or a part of it, is no longer there: finished, cleaned up by somebody, or lost."""


class KeyTaken(StoreRefused):
    """An object stands under this key already."""


class KeyMissing(StoreRefused):
    """No object stands under this key."""


class RightMissing(StoreRefused):
    """These keys may not do this. S3 says so too of a missing object to keys that may not list."""


class ConditionUnknown(StoreRefused):
    """The store has no conditional writes."""


def understand(error: Exception, labels: Labels) -> DeliveryFailed:
    """What a request raised as one of ours, its sentence free of hosts, keys and the store's own words."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        answer = error.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _understand_answer(status, str(answer.get("Error", {}).get("Code", "")), labels)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StoreRefused(f"the store's certificate is not valid for {labels.endpoint}")
    if isinstance(
        error, (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, OSError, HTTPException)
    ):
        return StoreUnwell("the store did not answer")
    return StoreRefused(f"the store cannot be used with these settings; check {labels.endpoint} and {labels.name}")


def _understand_answer(status: int, code: str, labels: Labels) -> DeliveryFailed:
    if code in ("NoSuchUpload", "InvalidPart"):
        return UploadGone("the upload was cleaned up while it ran, or the store lost a part of it")
    if code == "PreconditionFailed" or status in (304, 412):  # 304: MinIO before 2024
        return KeyTaken("the key is taken")
    if code == "NotImplemented" or status == 501:
        return ConditionUnknown("the store lacks a function that delivery needs")
    if code in _RETRY_CODES or status in _RETRY_STATUS or status >= 500:
        return StoreUnwell(f"the store is failing (status {status})")
    sentences = {
        "InvalidAccessKeyId": f"the store does not know the access key; check {labels.access_key}",
        "SignatureDoesNotMatch": f"the store says that the secret key is wrong; check {labels.secret_key}",
        "NoSuchBucket": f"the bucket does not exist; check {labels.name} and {labels.endpoint}",
        "AuthorizationHeaderMalformed": f"the region is not the bucket's; check {labels.region}",
        "PermanentRedirect": f"the bucket is in another region; check {labels.endpoint} and {labels.region}",
        "RequestTimeTooSkewed": "the store says that this worker's clock is wrong by more than it accepts",
    }
    if code in sentences:
        return StoreRefused(sentences[code])
    if status == 404:
        return KeyMissing(f"the store has no such bucket or object; check {labels.name} and {labels.endpoint}")
    if status == 403:
        return RightMissing(f"the keys may not read and write this bucket; check the rights of {labels.access_key}")
    word = code if re.fullmatch(r"[A-Za-z]{1,40}", code) else f"status {status}"
    return StoreRefused(f"the store refused the file ({word})")
