"""How requests reach a stranger's S3 endpoint: to a checked address, within one wall clock, with a counted answer.

The operator's own endpoint goes through botocore's pool. One that came in a request could answer with another address
at its second lookup, a byte a minute, or without an end, and its name could take minutes to resolve; here it gets what
`engine.fetch` gives a stranger's URL. One connection a request: a guest's job makes about five.
"""

import http.client
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from engine.addresses import may_connect, parse_allowed
from engine.connection import CHUNK_BYTES, Deadline, Wire, connect, look_up, system_resolver
from engine.s3_errors import StoreRefused
from engine.urls import Target, parse_url
from schemas.errors import FetchFailed

REQUEST_S = 120.0
"""Wall clock of one request: name, connection, an 8 MiB part on its way up, and the answer's head and body."""
REACH_S = 15.0
"""Of these, name, connection and TLS handshake."""
HEAD_BYTES = 2**18
BODY_BYTES = 2**20
"""Largest answer that is kept in memory: error documents and lists of uploads."""


@dataclass(frozen=True)
class GuestWire:
    """A handler of botocore's event `before-send`: its answer takes the place of botocore's own sending."""

    allow: tuple[str, ...]

    def __call__(self, request: Any, **_event: Any) -> Any:
        from botocore.awsrequest import AWSResponse

        deadline = Deadline(REQUEST_S)
        try:
            target = parse_url(request.url)
        except FetchFailed as error:
            raise StoreRefused(error.sentence) from error
        connection = self._reach(target)
        try:
            response = _exchange(connection, target, request, deadline)
        except BaseException:
            connection.close()
            raise
        body = _Body(connection, response, None if request.stream_output else BODY_BYTES)
        return AWSResponse(request.url, response.status, dict(response.headers.items()), body)

    def _reach(self, target: Target) -> socket.socket:
        """Look the host up once, refuse it unless every address may be reached, connect to one of those."""
        deadline = Deadline(min(REACH_S, REQUEST_S))
        addresses = look_up(target, deadline, system_resolver)
        if not may_connect(target.host, target.port, addresses, parse_allowed(self.allow)):
            raise StoreRefused("the store is not allowed; check s3Config.endpointUrl")
        return connect(target, addresses, deadline)


def _exchange(connection: socket.socket, target: Target, request: Any, deadline: Deadline) -> http.client.HTTPResponse:
    """Send the request as botocore signed it; read the answer's head."""
    headers = {_text(name): _text(value) for name, value in request.headers.items()}
    # Neither is signed. The first would have us wait for a word that not every store says.
    headers = {name: value for name, value in headers.items() if name.lower() not in ("expect", "connection")}
    lines = [f"{request.method} {target.path} HTTP/1.1", f"Host: {target.authority}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    wire = Wire(connection, deadline, HEAD_BYTES)
    body = request.body or b""
    wire.send_all("\r\n".join((*lines, "", "")).encode("latin-1"))
    wire.send_all(body if isinstance(body, bytes) else body.read())
    response = http.client.HTTPResponse(cast(socket.socket, wire), method=request.method)
    response.begin()
    wire.left_bytes = sys.maxsize  # _Body counts the rest
    return response


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Body:
    """What botocore asks of an answer's body: `read` for a stream, `stream` for what it keeps in memory."""

    def __init__(self, connection: socket.socket, response: http.client.HTTPResponse, limit_bytes: int | None) -> None:
        self._connection = connection
        self._response = response
        self._limit_bytes = limit_bytes

    def read(self, amt: int | None = None) -> bytes:
        return self._response.read(amt)

    def stream(self, amt: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The whole body. Raises OSError when it is larger than anything a store has to say."""
        count = 0
        try:
            while chunk := self._response.read(amt):
                count += len(chunk)
                if self._limit_bytes is not None and count > self._limit_bytes:
                    raise OSError("the answer has no end")
                yield chunk
        finally:
            self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()
