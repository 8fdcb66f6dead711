"""The response of a finished job, kept beside its files: a job that comes twice is generated once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.delivery import Delivered


@dataclass(frozen=True)
class Record:
    """A response with keys where its URLs were: a URL expires, a key does not."""

    input_sha256: str
    objects: dict[str, str]
    """Key -> SHA-256 of the file under it."""
    response: dict[str, Any]

    def to_bytes(self) -> bytes:
        return json.dumps(
            {"input_sha256": self.input_sha256, "objects": self.objects, "response": self.response},
            allow_nan=False,
            indent=1,
        ).encode()

    def answer(self, urls: Mapping[str, str]) -> dict[str, Any]:
        """The response with a URL for each key."""
        answer: dict[str, Any] = _replace(self.response, urls)
        return answer


def make_record(input_sha256: str, response: dict[str, Any], delivered: Sequence[Delivered]) -> Record:
    keys = {each.url: each.key for each in delivered}
    return Record(input_sha256, {each.key: each.sha256 for each in delivered}, _replace(response, keys))


def read_record(body: bytes) -> Record | None:
    """None if it is not a record; a store may hold anything."""
    try:
        found = json.loads(body)
        record = Record(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    is_whole = isinstance(record.response, dict) and isinstance(record.objects, dict)
    return record if is_whole and all(isinstance(each, str) for each in record.objects.values()) else None


def _replace(value: Any, words: Mapping[str, str]) -> Any:
    """`value` with every string that is one of `words` replaced, in lists and objects too."""
    if isinstance(value, str):
        return words.get(value, value)
    if isinstance(value, list):
        return [_replace(each, words) for each in value]
    if isinstance(value, dict):
        return {name: _replace(each, words) for name, each in value.items()}
    return value
