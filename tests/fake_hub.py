"""A model hub on localhost: the few addresses that huggingface_hub asks for, and a log of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model and what was asked of it.

    Attributes:
        model: its id.
        folder: its files.
        address: of the server.
        served: bytes of each file's content that were sent, in the order of the requests.
    """

    model: str
    folder: Path
    address: str = ""
    served: list[tuple[str, int]] = field(default_factory=list)

    def sent(self, name: str) -> int:
        """Bytes of one file's content that were sent so far."""
        return sum(count for path, count in self.served if path == name)

    def files(self) -> list[dict[str, Any]]:
        """What the hub's listing says of each file."""
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.folder.iterdir())
        ]


class Handler(BaseHTTPRequestHandler):
    """Answers from ``server.hub``."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Listings and files."""
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        info = f"/api/models/{hub.model}"
        if path in (info, f"{info}/revision/main", f"{info}/revision/{COMMIT}"):
            names = [{"rfilename": file["path"]} for file in hub.files()]
            self._json({"id": hub.model, "sha": COMMIT, "siblings": names, "private": False})
        elif path.startswith(f"{info}/tree/"):
            self._json(hub.files())
        else:
            self._file(path, head=False)

    def do_HEAD(self) -> None:
        """Size and etag of a file."""
        self._file(unquote(urlsplit(self.path).path), head=True)

    def do_POST(self) -> None:
        """What is known of some paths."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        hub: Hub = self.server.hub
        if "/paths-info/" in self.path:
            try:
                wanted = json.loads(body)["paths"]
            except ValueError:
                wanted = re.findall(r"paths=([^&]*)", unquote(body))
            self._json([file for file in hub.files() if file["path"] in wanted])
        else:
            self.send_error(404)

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, path: str, head: bool) -> None:
        hub: Hub = self.server.hub
        found = re.fullmatch(rf"/{re.escape(hub.model)}/resolve/[^/]+/(.+)", path)
        file = hub.folder / found[1] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        start, end = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(end, int(asked[2] or end) + 1)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not head:
            hub.served.append((file.name, end - start))
            self.wfile.write(data[start:end])


@contextmanager
def serve(model: str, folder: Path) -> Iterator[Hub]:
    """A hub with one model, for as long as the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(model, folder, f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
