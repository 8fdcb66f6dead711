"""The one place that opens a stranger's URL: checked addresses, one wall clock, counted bytes.

Name, connection, TLS, headers, redirects and body share one deadline: every call on the socket gets the time
that is left, so a peer who sends a byte now and then gains nothing, and no timer thread is needed. The socket
connects to the very address that was checked. The caller learns one and the same sentence of a host that is
closed, forbidden or unknown.
"""

import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import cast

from engine.addresses import Address, Allowed, may_connect, parse_allowed
from engine.connection import CHUNK_BYTES, Deadline, Flooded, Resolve, Wire, connect, look_up, system_resolver
from engine.urls import Target, parse_url
from schemas.errors import FetchFailed

MAX_REDIRECTS = 3
HEAD_BYTES = 2**18  # of one hop: status lines and headers, interim answers included
FRAMING_FACTOR = 2  # bytes on the wire a byte of body, at most; honest chunks add a thousandth

UNREACHABLE = "the URL could not be read: its host does not exist, does not answer, or is not allowed"
TOO_SLOW = "the URL took too long to read"
CUT_SHORT = "the URL's body ended early or is malformed"

_log = logging.getLogger(__name__)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def fetch(
    url: str,
    *,
    timeout_s: float = 20.0,
    max_bytes: int = 20 * 2**20,
    allow: tuple[str, ...] = (),
    resolve: Resolve = system_resolver,
    budget: "FetchBudget | None" = None,
) -> bytes:
    """Read a URL within `timeout_s` seconds of wall clock, redirects included.

    `allow`: hosts, host:port or networks that may be private; see `engine.addresses.parse_allowed`.
    `budget`: what the other fetches of the job have left over, if it is shared.

    Raises:
        FetchFailed: whatever went wrong; the sentence names no address.
    """
    allowed = parse_allowed(allow)

    def read(timeout_s: float, max_bytes: int) -> bytes:
        return _follow(parse_url(url), Deadline(timeout_s), max_bytes, allowed, resolve)

    return read(timeout_s, max_bytes) if budget is None else budget.spend(read, timeout_s, max_bytes)


def check_endpoint(
    url: str, *, allow: tuple[str, ...] = (), resolve: Resolve = system_resolver, timeout_s: float = 5.0
) -> None:
    """Refuse a URL that `fetch` would not connect to, without connecting.

    Raises:
        FetchFailed: the URL is malformed, or one of its host's addresses is not allowed.
    """
    _checked_addresses(parse_url(url), Deadline(timeout_s), parse_allowed(allow), resolve)


class FetchBudget:
    """What the fetches of one job may use together, however many URLs it names. One runs at a time."""

    def __init__(self, *, timeout_s: float = 40.0, max_bytes: int = 40 * 2**20) -> None:
        self._left_s = timeout_s
        self._left_bytes = max_bytes
        self._one_at_a_time = threading.Lock()

    def spend(self, read: Callable[[float, int], bytes], timeout_s: float, max_bytes: int) -> bytes:
        """Call `read` with these limits or with what is left, and take off what it used.

        Raises:
            FetchFailed: nothing is left; or from `read`.
        """
        with self._one_at_a_time:
            if self._left_s <= 0 or self._left_bytes <= 0:
                raise FetchFailed("the request's URLs together take too long or hold too much")
            started = time.monotonic()
            try:
                body = read(min(timeout_s, self._left_s), min(max_bytes, self._left_bytes))
            finally:
                self._left_s -= time.monotonic() - started
            self._left_bytes -= len(body)
            return body


def _follow(
    target: Target, deadline: Deadline, max_bytes: int, allowed: tuple[Allowed, ...], resolve: Resolve
) -> bytes:
    """The body at the end of at most MAX_REDIRECTS redirects, each checked like the first."""
    for _ in range(MAX_REDIRECTS + 1):
        answer = _get(target, deadline, max_bytes, allowed, resolve)
        if isinstance(answer, bytes):
            return answer
        target = answer
    raise FetchFailed(f"the URL redirects more than {MAX_REDIRECTS} times")


def _get(
    target: Target, deadline: Deadline, max_bytes: int, allowed: tuple[Allowed, ...], resolve: Resolve
) -> bytes | Target:
    """One hop: the body, or where it redirects to."""
    addresses = _checked_addresses(target, deadline, allowed, resolve)
    with _connect(target, addresses, deadline) as connection:
        try:
            wire = Wire(connection, deadline, HEAD_BYTES)
            response = _ask(target, wire)
            if response.status in _REDIRECTS:
                return _next_target(target, response)
            wire.left_bytes += FRAMING_FACTOR * max_bytes
            return _read_body(response, max_bytes)
        except TimeoutError as error:
            raise FetchFailed(TOO_SLOW) from error
        except Flooded as error:
            raise FetchFailed(_too_large(max_bytes)) from error
        except (OSError, http.client.HTTPException) as error:
            raise FetchFailed(CUT_SHORT) from error


def _checked_addresses(
    target: Target, deadline: Deadline, allowed: tuple[Allowed, ...], resolve: Resolve
) -> list[Address]:
    """Every address of the host, all of them allowed. The only lookup of this hop."""
    try:
        addresses = look_up(target, deadline, resolve)
    except OSError as error:
        _log.info("fetch: %s did not resolve (%s)", target.host, type(error.__cause__ or error).__name__)
        raise FetchFailed(UNREACHABLE) from error
    if not may_connect(target.host, target.port, addresses, allowed):
        _log.warning("fetch: %s port %d is not allowed", target.host, target.port)
        raise FetchFailed(UNREACHABLE)
    return addresses


def _connect(target: Target, addresses: list[Address], deadline: Deadline) -> socket.socket:
    try:
        return connect(target, addresses, deadline)
    except ssl.SSLCertVerificationError as error:
        raise FetchFailed("the URL's server has no valid certificate") from error
    except OSError as error:
        _log.info("fetch: %s did not answer (%s)", target.host, type(error).__name__)
        raise FetchFailed(UNREACHABLE) from error


def _ask(target: Target, wire: Wire) -> http.client.HTTPResponse:
    """Send the request and read the answer's head."""
    lines = (
        f"GET {target.path} HTTP/1.1",
        f"Host: {target.authority}",
        "User-Agent: svi-worker",
        "Accept: image/png, image/jpeg, image/webp, video/mp4, video/webm, */*;q=0.1",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    wire.send_all("\r\n".join((*lines, "", "")).encode("ascii"))
    response = http.client.HTTPResponse(cast(socket.socket, wire), method="GET")
    response.begin()
    return response


def _next_target(target: Target, response: http.client.HTTPResponse) -> Target:
    """Where a redirect leads; its body stays unread."""
    location = response.headers.get("Location")
    if location is None:
        raise FetchFailed(f"the URL's server answered {response.status} without a Location")
    try:
        written = location.encode("latin-1").decode()  # as http.client decoded it, and as servers mean it: UTF-8
    except UnicodeError as error:
        raise FetchFailed("the URL redirects to a malformed one") from error
    return target.follow(written)


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise FetchFailed(f"the URL's server answered {response.status}")
    content_coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    is_framed_otherwise = "Transfer-Encoding" in response.headers and not response.chunked
    if content_coding != "identity" or is_framed_otherwise:
        raise FetchFailed("the URL's server compresses its answer, which was not asked for")
    declared = response.length
    if declared is not None and declared > max_bytes:
        raise FetchFailed(_too_large(max_bytes))
    body = bytearray()
    while chunk := response.read(CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise FetchFailed(_too_large(max_bytes))
    if declared is not None and len(body) != declared:
        raise FetchFailed(CUT_SHORT)
    return bytes(body)


def _too_large(max_bytes: int) -> str:
    return f"the URL's body is larger than {max_bytes:,} bytes"
