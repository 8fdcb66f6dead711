"""A connection to a stranger's host: looked up once, its addresses judged, one wall clock for all, its bytes counted.

`engine.fetch` reads pictures over it, `engine.guest_wire` sends files. The two differ in what they say of a failure, so
here everything fails as OSError or HTTPException, and the verdict on the addresses is theirs.
"""

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any

from engine.addresses import Address
from engine.urls import Target

Resolve = Callable[[str, int], list[str]]
"""Host and port -> its addresses as text. Called once a connection, in a thread, and may raise OSError."""

MAX_LOOKUPS = 8  # lookups still running, the abandoned ones included
MAX_TRIES = 8  # addresses of one host that are tried: a name with thousands would have us knock at thousands of doors
CHUNK_BYTES = 2**16

_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)


class Deadline:
    """One wall clock for everything that is done over a connection."""

    def __init__(self, timeout_s: float) -> None:
        self._ends = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, more than zero. Raises TimeoutError when there are none."""
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def system_resolver(host: str, port: int) -> list[str]:
    """Every address the system gives for a name or for any spelling of an address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def look_up(target: Target, deadline: Deadline, resolve: Resolve) -> list[Address]:
    """Every address of the host, in a thread of its own: a lookup cannot be interrupted, so it is left behind.

    Those left behind are bounded; each ends when the system's resolver gives up.

    Raises:
        OSError: no such name. TimeoutError: no answer before the deadline. RuntimeError: no thread can be started.
    """
    if not _lookups.acquire(timeout=deadline.left_s()):
        raise TimeoutError
    found: list[Address] = []
    failure: list[OSError | ValueError] = []

    def ask() -> None:
        try:
            found.extend(ip_address(text) for text in resolve(target.host, target.port))
        except (OSError, ValueError) as error:
            failure.append(error)
        finally:
            _lookups.release()

    thread = threading.Thread(target=ask, name="lookup", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _lookups.release()  # `ask`, which would have done it, never runs
        raise
    thread.join(deadline.left_s())
    if thread.is_alive():
        raise TimeoutError
    if failure:  # ValueError: a name that no resolver can carry
        raise OSError("the name did not resolve") from failure[0]
    return found


def connect(target: Target, addresses: Sequence[Address], deadline: Deadline) -> socket.socket:
    """Connect to the first of these very addresses that answers, at most MAX_TRIES of them.

    Each gets an equal share of the time that is left to accept; the TLS handshake gets all of it.

    Raises:
        ssl.SSLCertVerificationError: the certificate is not the host's. OSError: none answered.
    """
    failure = OSError("the host has no address")
    tried = addresses[:MAX_TRIES]
    for index, address in enumerate(tried):
        try:
            return _connect_to(address, target, deadline, len(tried) - index)
        except ssl.SSLCertVerificationError:
            raise
        except OSError as error:
            failure = error
    raise failure


def _connect_to(address: Address, target: Target, deadline: Deadline, shares: int) -> socket.socket:
    # A system without IPv6 refuses even the socket, so this too is one address that does not answer.
    connection = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    try:
        connection.settimeout(deadline.left_s() / shares)
        connection.connect((str(address), target.port))
        return _encrypt(connection, target, deadline) if target.scheme == "https" else connection
    except BaseException:
        connection.close()
        raise


def _encrypt(connection: socket.socket, target: Target, deadline: Deadline) -> socket.socket:
    """TLS with the host's name proven. Python gives the whole handshake one timeout, however many reads it takes."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    connection.settimeout(deadline.left_s())
    return context.wrap_socket(connection, server_hostname=target.host)


class Flooded(OSError):
    """More bytes came in than the answer may have, however it is framed."""


class Wire(io.RawIOBase):
    """A connected socket whose every call gets the time that is left, and which counts what comes in.

    `left_bytes`: how many more may come; at first those of the head. Whoever has read that sets what the body may have.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline, head_bytes: int) -> None:
        self._connection = connection
        self._deadline = deadline
        self.left_bytes = head_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._deadline.left_s())
        count = self._connection.recv_into(buffer)
        self.left_bytes -= count
        if self.left_bytes < 0:
            raise Flooded
        return count

    def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._connection.settimeout(self._deadline.left_s())
            view = view[self._connection.send(view[:CHUNK_BYTES]) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What `http.client.HTTPResponse` reads from; all it asks of a socket."""
        return _Reader(self, CHUNK_BYTES)


class _Reader(io.BufferedReader):
    """http.client takes a minus before the size of a chunk, and would read so many bytes."""

    def read(self, size: int | None = None, /) -> bytes:
        if size is not None and size < 0:
            raise HTTPException("a chunk of negative size")
        return super().read(size)
