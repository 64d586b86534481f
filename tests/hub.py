"""A local Hugging Face hub, and its cache layout: for tests without a network."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(folder: Path, *, repo: str, cache: Path) -> Path:
    """Copy `folder` into a cache laid out as huggingface_hub's; returns the snapshot."""
    base = cache / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / COMMIT
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMIT)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = base / "blobs" / etag(file)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path(*[".."] * (len(link.relative_to(base).parts) - 1)) / "blobs" / blob.name
        )
    return snapshot


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """Which folders are served as which repositories, and the requests received."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    endpoint: str = ""
    wait_s: float = 0  # pause after each MiB of a file
    sending: bool = False  # a file larger than that is on its way
    requests: list[str] = field(default_factory=list)  # paths, in order


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(path)
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repo in hub.gated:
            self._refuse(403, "GatedRepo")
        elif repo not in hub.repos:
            self._refuse(404, "RepoNotFound")
        elif f"/{repo}/revision/" in path:
            self._send(json.dumps({"id": repo, "sha": COMMIT}).encode())
        elif f"/{repo}/tree/" in path:
            self._send(json.dumps(_tree(hub.repos[repo])).encode())
        else:
            file = hub.repos[repo] / path.partition(f"/{COMMIT}/")[2]
            self._send(file.read_bytes(), body=body, tag=etag(file))

    def _refuse(self, code: int, reason: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, *, body: bool = True, tag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if not body:
            return
        with suppress(OSError):  # the client has gone
            for first in range(0, len(content), 2**20):
                self.wfile.write(content[first : first + 2**20])
                self.server.hub.sending |= first > 0
                time.sleep(self.server.hub.wait_s)


def _tree(folder: Path) -> list[dict[str, object]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        {
            "type": "file",
            "path": file.relative_to(folder).as_posix(),
            "size": file.stat().st_size,
            "oid": etag(file),
        }
        for file in files
    ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve as huggingface.co does, on a local port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub, hub.endpoint = hub, f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
