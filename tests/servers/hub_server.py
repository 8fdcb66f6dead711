"""A Hugging Face hub on loopback: the calls that the client makes for one model repository, with faults to order.

Speaks /api/models/<repo>/revision/<rev>, /api/models/<repo>/tree/<rev>/<folder> and /<repo>/resolve/<rev>/<path> with
ranges. Large files (*.safetensors) are listed with a sha256 as LFS does, small ones with git's blob id.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Faults:
    """What goes wrong. Paths are <repo>/<path>."""

    cut_after: dict[str, int] = field(default_factory=dict)
    """path -> bytes after which every transfer of it is cut."""
    wrong_bytes: set[str] = field(default_factory=set)
    """paths whose bytes are flipped on the way; their listing tells the truth."""
    missing: set[str] = field(default_factory=set)
    """paths that are listed and answer 404."""
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    """repo -> (HTTP status, X-Error-Code) for every call."""
    redirect_to: str = ""
    """Address of another server that every file is on, as the hub's large files are."""


class HubServer:
    """Serves the repositories in `root`, <owner>/<name>/..., until the context ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults = Faults()
        self.sent: list[tuple[str, int, int]] = []
        """(path, first byte, bytes sent) of every file transfer."""
        self.calls: list[str] = []
        """Every path that was asked for."""
        self.tokens: set[str] = set()
        """Every Authorization header that came."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def entries(self, repo: str, folder: str) -> list[dict[str, Any]]:
        """The tree API's answer for one folder."""
        base = self.root / repo
        found = []
        for path in sorted((base / folder).iterdir()):
            name = path.relative_to(base).as_posix()
            if path.is_dir():
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
                continue
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": blob, "size": len(data), "path": name}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.calls.append(self.path)
            hub.tokens.add(self.headers.get("Authorization", ""))
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
                self._with_repo(match[1], lambda: self._json({"id": match[1], "sha": COMMIT, "siblings": []}))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                self._with_repo(match[1], lambda: self._tree(match[1], match[3] or ""))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
                self._with_repo(match[1], lambda: self._file(match[1], match[3]))
            else:
                self._refuse(404, "")

        def _with_repo(self, repo: str, answer: Any) -> None:
            if repo in hub.faults.status:
                self._refuse(*hub.faults.status[repo])
            elif not (hub.root / repo).is_dir():
                self._refuse(404, "RepoNotFound")
            else:
                answer()

        def _tree(self, repo: str, folder: str) -> None:
            if (hub.root / repo / folder).is_dir():
                self._json(hub.entries(repo, folder))
            else:
                self._refuse(404, "EntryNotFound")

        def _file(self, repo: str, name: str) -> None:
            key = f"{repo}/{name}"
            if hub.faults.redirect_to:
                self.send_response(302)
                self.send_header("Location", hub.faults.redirect_to + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if key in hub.faults.missing:
                self._refuse(404, "EntryNotFound")
                return
            data = (hub.root / repo / name).read_bytes()
            if key in hub.faults.wrong_bytes:
                data = bytes(byte ^ 0xFF for byte in data)
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            body = data[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = body[: max(hub.faults.cut_after.get(key, len(data)) - start, 0)]
            hub.sent.append((key, start, len(sent)))
            self.wfile.write(sent)
            if len(sent) < len(body):
                self.close_connection = True

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the tests read `sent` and `calls`."""

    return Handler
