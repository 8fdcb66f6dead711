"""An HTTP proxy that breaks chosen requests on their way to a real server.

Faults, in the words of a network: `503` and `500` answer without asking the server; `reset` cuts the
connection in the middle of the request's body; `lost` lets the server do its work and cuts the connection
before the answer; `cut` ends it in the middle of the answer's body; `hang` never answers; `ok-error` is an error
document under status 200; `flip` changes one bit of the body.
"""

import asyncio
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

Fault = Literal["503", "500", "reset", "lost", "cut", "hang", "ok-error", "flip"]
FAULTS: tuple[Fault, ...] = ("503", "500", "reset", "lost", "hang", "ok-error")
ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>broken on purpose</Message></Error>"


@dataclass(frozen=True)
class Request:
    """What went through: `target` is path and query."""

    method: str
    target: str
    headers: dict[str, str]
    fault: Fault | None


class FaultProxy:
    """Listens on its own port, in its own thread; a fault takes one request out of the line."""

    def __init__(self, upstream_port: int) -> None:
        self.requests: list[Request] = []
        self.bytes_per_s: float | None = None
        """Slow every request's body down to this, to have time to kill the sender."""
        self.rewrite_head: Callable[[bytes], bytes] = bytes
        """Change the head of every answer."""
        self._upstream_port = upstream_port
        self._faults: deque[tuple[Fault, str]] = deque()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        # Bound and never listening: while the server is out, nobody else is given its port.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]

    def __enter__(self) -> Self:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._place.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def inject(self, fault: Fault, times: int = 1, *, matching: str = "") -> None:
        """Break the next `times` requests whose "METHOD target" matches the regular expression."""
        self._faults.extend([(fault, matching)] * times)

    def reset(self) -> None:
        """As new, but for the port."""
        self._faults.clear()
        self.requests.clear()
        self.bytes_per_s = None
        self.rewrite_head = bytes

    @property
    def pending_faults(self) -> int:
        return len(self._faults)

    def open(self) -> None:
        """Take connections, on the port of last time."""
        self._run(self._open())

    def close(self) -> None:
        """Refuse connections and cut those that stand: the server is out."""
        self._run(self._close())

    def _run(self, job: "asyncio.coroutines.Coroutine[None, None, None]") -> None:
        asyncio.run_coroutine_threadsafe(job, self._loop).result(timeout=60)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**20, reuse_address=True)

    async def _close(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        await asyncio.sleep(0.01)  # lets the handlers see it

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request; the connection ends with it."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[:2]
        lines = head.decode("latin-1").split("\r\n")[1:-2]
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        fault = self._next_fault(f"{method.decode()} {target.decode()}")
        self.requests.append(Request(method.decode(), target.decode(), headers, fault))
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(headers.get("content-length", 0))
        if fault == "reset":
            await reader.readexactly(size // 2)
            _reset(writer)
            return
        body = await self._read_body(reader, size)
        if fault in ("503", "500", "ok-error"):
            status = "200 OK" if fault == "ok-error" else f"{fault} Broken"
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(ERROR)}\r\n"
                "Connection: close\r\n\r\n".encode()
                + (b"" if method == b"HEAD" else ERROR)
            )
        elif fault == "hang":
            await reader.read()
        else:
            answer = await self._forward(head, _flip(body) if fault == "flip" else body)
            if fault == "lost":
                _reset(writer)
                return
            writer.write(_cut(answer) if fault == "cut" else answer)
        await writer.drain()

    def _next_fault(self, request: str) -> Fault | None:
        for index, (fault, matching) in enumerate(self._faults):
            if re.search(matching, request):
                del self._faults[index]
                return fault
        return None

    async def _read_body(self, reader: asyncio.StreamReader, size: int) -> bytes:
        if self.bytes_per_s is None:
            return await reader.readexactly(size)
        body = b""
        while len(body) < size:
            body += await reader.readexactly(min(16384, size - len(body)))
            await asyncio.sleep(16384 / self.bytes_per_s)
        return body

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        # Neither header is signed. Without keep-alive the answer ends where the connection does.
        head = re.sub(rb"(?im)^(connection|expect):.*\r\n", b"", head)[:-2] + b"Connection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        try:
            writer.write(head + body)
            answer_head, separator, rest = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        return self.rewrite_head(answer_head) + separator + rest


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def _cut(answer: bytes) -> bytes:
    head, separator, body = answer.partition(b"\r\n\r\n")
    return head + separator + body[: len(body) // 2]


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST, as a cable does not but a dead host's router may."""
    link = writer.get_extra_info("socket")
    if link is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
