"""A store that keeps raw bodies in memory and checks nothing, with the quirks of real ones to switch on.

Quirks: `no-checksums` answers 501 to any `x-amz-checksum-*` header; `no-algorithm` answers 400 to
`x-amz-sdk-checksum-algorithm`; `no-conditions` answers 501 to a conditional write; `flip` keeps a body with one bit
changed, `truncate` without its second half; `lose` takes an object and has none; `no-metadata` forgets `x-amz-meta-*`;
`opaque-etag` has ETags that are no MD5, as with SSE-KMS; `no-signed-urls` opens nothing without an Authorization
header; `redirect` sends everybody elsewhere.
"""

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class StoredObject:
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class PlainStore:
    """One bucket of any name, single PUTs only."""

    def __init__(self, *quirks: str, redirect_to: str = "") -> None:
        self.quirks = set(quirks)
        self.redirect_to = redirect_to
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[tuple[str, str]] = []
        store = self

        class Handler(_Handler):
            pass

        Handler.store = store
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: PlainStore

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        quirks = self.store.quirks
        names = [name.lower() for name in self.headers]
        key = self._key()
        if "no-checksums" in quirks and any(name.startswith("x-amz-checksum-") for name in names):
            return self._answer(501, code="NotImplemented")
        if "no-algorithm" in quirks and "x-amz-sdk-checksum-algorithm" in names:
            return self._answer(400, code="InvalidArgument")
        if "if-none-match" in names:
            if "no-conditions" in quirks:
                return self._answer(501, code="NotImplemented")
            if key in self.store.objects:
                return self._answer(412, code="PreconditionFailed")
        if "flip" in quirks:
            body = bytes([body[0] ^ 1]) + body[1:]
        if "truncate" in quirks:
            body = body[: len(body) // 2]
        if "lose" in quirks:
            return self._answer(200)
        kept = {
            name: value
            for name, value in self.headers.items()
            if name.lower() == "content-type"
            or (name.lower().startswith("x-amz-meta-") and "no-metadata" not in quirks)
        }
        self.store.objects[key] = StoredObject(body, kept | {"ETag": self._etag(body)})
        return self._answer(200)

    def do_HEAD(self) -> None:
        self._give(with_body=False)

    def do_GET(self) -> None:
        if "no-signed-urls" in self.store.quirks and "X-Amz-Signature" in self.path:
            return self._answer(403, code="AccessDenied")
        return self._give(with_body=True)

    def do_DELETE(self) -> None:
        self.store.objects.pop(self._key(), None)
        self._answer(204)

    def _give(self, *, with_body: bool) -> None:
        found = self.store.objects.get(self._key())
        if found is None:
            return self._answer(404, code="NoSuchKey", with_body=with_body)
        return self._answer(200, found.headers, found.body, with_body=with_body)

    def _key(self) -> str:
        """The key; also where every request is noted."""
        self.store.requests.append((self.command, self.path))
        return unquote(urlsplit(self.path).path).split("/", 2)[-1]

    def _etag(self, body: bytes) -> str:
        return '"opaque"' if "opaque-etag" in self.store.quirks else f'"{hashlib.md5(body).hexdigest()}"'

    def _answer(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        code: str = "",
        with_body: bool = True,
    ) -> None:
        if code:
            body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        if "redirect" in self.store.quirks:
            status, headers = 307, {"Location": self.store.redirect_to}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
