"""A web server on loopback that does what a script says, byte by byte, and counts who comes."""

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Peer:
    """Use as a context manager. `script` gets each connection and decides everything that is said on it.

    `hits` counts connections, `requests` holds the heads that came in (for scripts that read them).
    """

    script: Callable[["Peer", socket.socket], None]
    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    port: int = 0
    hits: int = 0
    requests: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """SNI of each TLS connection."""
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Peer":
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, self.port), family=family, backlog=64)
        self.port = self._listener.getsockname()[1]
        if self.tls is not None:
            self.tls.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    @property
    def allow(self) -> tuple[str, ...]:
        """The allow-list entry that lets the worker come here."""
        return (f"{self.host}:{self.port}",)

    def url(self, path: str = "/") -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{path}"

    def read_head(self, connection: socket.socket) -> str:
        data = b""
        while b"\r\n\r\n" not in data and (chunk := connection.recv(4096)):
            data += chunk
        head = data.decode("latin-1")
        self.requests.append(head)
        return head

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        with suppress(OSError), connection:
            if self.tls is None:
                self.script(self, connection)
            else:
                with self.tls.wrap_socket(connection, server_side=True) as secure:
                    self.script(self, secure)


def serve(body: bytes = b"picture", status: str = "200 OK", headers: str = "") -> Callable[[Peer, socket.socket], None]:
    """One whole answer. `headers`: further lines, each ending in CRLF; without a Content-Length one is added."""

    def script(peer: Peer, connection: socket.socket) -> None:
        peer.read_head(connection)
        length = "" if "Content-Length" in headers else f"Content-Length: {len(body)}\r\n"
        connection.sendall(f"HTTP/1.1 {status}\r\n{headers}{length}\r\n".encode() + body)

    return script


def redirect(location: str, status: str = "302 Found", body: bytes = b"") -> Callable[[Peer, socket.socket], None]:
    return serve(body, status, f"Location: {location}\r\n")


def send_raw(data: bytes) -> Callable[[Peer, socket.socket], None]:
    """Whatever the request, these bytes and the end of the connection."""

    def script(peer: Peer, connection: socket.socket) -> None:
        peer.read_head(connection)
        connection.sendall(data)

    return script


def send_for_ever(head: bytes, piece: bytes, every_s: float = 0.0) -> Callable[[Peer, socket.socket], None]:
    """The head, then the same piece until the other side or the test has had enough."""

    def script(peer: Peer, connection: socket.socket) -> None:
        peer.read_head(connection)
        connection.sendall(head)
        while not peer.stopping.wait(every_s) if every_s else not peer.stopping.is_set():
            connection.sendall(piece)

    return script


def hold(peer: Peer, connection: socket.socket) -> None:
    """Accept, and never say anything."""
    peer.stopping.wait(60)
