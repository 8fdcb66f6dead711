"""A connection to a stranger's host: looked up once, its addresses judged, one wall clock for all of it.

`engine.fetch` reads pictures over it, `engine.guest_wire` sends files. The two differ in what they say of a failure, so
here everything fails as OSError, and the verdict on the addresses is theirs.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from engine.addresses import Address
from engine.urls import Target

Resolve = Callable[[str, int], list[str]]
"""Host and port -> its addresses as text. Called once a connection, in a thread, and may raise OSError."""

MAX_LOOKUPS = 8  # lookups still running, the abandoned ones included

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
        OSError: no such name. TimeoutError: no answer before the deadline.
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
    thread.start()
    thread.join(deadline.left_s())
    if thread.is_alive():
        raise TimeoutError
    if failure:  # ValueError: a name that no resolver can carry
        raise OSError("the name did not resolve") from failure[0]
    return found


def connect(target: Target, addresses: Sequence[Address], deadline: Deadline) -> socket.socket:
    """Connect to the first of these very addresses that answers; each gets an equal share of the time that is left.

    Raises:
        ssl.SSLCertVerificationError: the certificate is not the host's. OSError: none answered.
    """
    failure = OSError("the host has no address")
    for index, address in enumerate(addresses):
        connection = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
        try:
            connection.settimeout(deadline.left_s() / (len(addresses) - index))
            connection.connect((str(address), target.port))
            return _encrypt(connection, target, deadline) if target.scheme == "https" else connection
        except ssl.SSLCertVerificationError:
            connection.close()
            raise
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _encrypt(connection: socket.socket, target: Target, deadline: Deadline) -> socket.socket:
    """TLS with the host's name proven. Python gives the whole handshake one timeout, however many reads it takes."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    connection.settimeout(deadline.left_s())
    return context.wrap_socket(connection, server_hostname=target.host)
