"""The bytes behind a picture or clip field: http(s) URL, data URI or base64, told apart by their form."""

import binascii
import re
from collections.abc import Callable

from schemas.errors import InvalidMedia

Fetch = Callable[[str], bytes]

_DATA_URI = re.compile(r"data:(?P<type>[\w.+/-]*)(;[\w.+=\"-]*)*?(?P<base64>;base64)?,", re.IGNORECASE | re.ASCII)


def read_media(value: str, kind: str, *, fetch: Fetch, max_bytes: int) -> bytes:
    """Read a field's value. `kind`: "image" or "video", what a data URI must say it is; it is not believed.

    Raises:
        FetchFailed: from `fetch`.
        InvalidMedia: the value has none of the three forms, or holds too much.
    """
    if re.match(r"https?://", value, re.IGNORECASE):
        data = fetch(value)
    elif value[:5].lower() == "data:":
        data = decode_base64(_data_uri_body(value, kind), max_bytes)
    else:
        data = decode_base64(value, max_bytes)
    if len(data) > max_bytes:
        raise InvalidMedia(_too_many_bytes(max_bytes))
    return data


def _data_uri_body(value: str, kind: str) -> str:
    head = _DATA_URI.match(value[:256])
    if head is None or head["base64"] is None:
        raise InvalidMedia("the data URI must read data:<type>;base64,<data>")
    if not head["type"].lower().startswith(kind + "/"):
        raise InvalidMedia(f"the data URI must be of type {kind}/*")
    return value[head.end() :]


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Strict base64 of either alphabet. Line breaks are allowed anywhere, the padding may be left out.

    Raises:
        InvalidMedia: it is not base64, or more than `max_bytes`.
    """
    longest = -(-max_bytes // 3) * 4
    if len(text) > 2 * longest + 2:  # before a copy is made; 2: no encoder breaks lines at every character
        raise InvalidMedia(_too_many_bytes(max_bytes))
    for line_break in "\n\r":
        if line_break in text:
            text = text.replace(line_break, "")
    if len(text) > longest:
        raise InvalidMedia(_too_many_bytes(max_bytes))
    digits = text.rstrip("=")
    padding = len(text) - len(digits)
    if not digits or len(digits) % 4 == 1 or padding > 2 or (padding and len(text) % 4):
        raise InvalidMedia(_NOT_BASE64)
    if "-" in digits or "_" in digits:
        if "+" in digits or "/" in digits:
            raise InvalidMedia(_NOT_BASE64)
        digits = digits.replace("-", "+").replace("_", "/")
    try:
        return binascii.a2b_base64(digits + "=" * (-len(digits) % 4), strict_mode=True)
    except ValueError:  # also for what is not ASCII
        raise InvalidMedia(_NOT_BASE64) from None


_NOT_BASE64 = "must be an http(s) URL, a data URI or base64"


def _too_many_bytes(max_bytes: int) -> str:
    return f"holds more than {max_bytes:,} bytes"
