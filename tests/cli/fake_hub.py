"""As much of the Hugging Face hub as huggingface-hub needs to download a model, on a port of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf")  # files of Git LFS, of which the hub gives SHA-256


class FakeHub:
    """`files` of the one repository there is; `requests`: (method, path, Range header)."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository = repository
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.breaks_after: int | None = None
        """Bytes of a file after which the connection ends, once."""
        self.url = ""

    def served(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


def etag(name: str, content: bytes) -> str:
    """SHA-256 of large files, git's checksum of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(name: str, content: bytes) -> dict:
    """What the hub says of a file."""
    said = {"rfilename": name, "size": len(content), "blobId": etag(name, content)}
    if name.endswith(LARGE):
        said["lfs"] = {"size": len(content), "sha256": etag(name, content), "pointerSize": 134}
        said["blobId"] = hashlib.sha1(content).hexdigest()
    return said


def tree_entry(sibling: dict) -> dict:
    """The same in the hub's other words."""
    said = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
    if "lfs" in sibling:
        said["lfs"] = sibling["lfs"] | {"oid": sibling["lfs"]["sha256"]}
    return said


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve it; `hub.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, with_content: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers["Range"]))
            if path.startswith(f"/api/models/{hub.repository}"):
                self._info(path)
            elif path.startswith(f"/{hub.repository}/resolve/"):
                self._file(path.rpartition("/")[2], with_content)
            else:
                self._refuse(404, "RepoNotFound")

        def _info(self, path: str) -> None:
            if path.rpartition("/")[2] not in ("main", COMMIT, hub.repository.rpartition("/")[2]):
                self._refuse(404, "RevisionNotFound")
                return
            siblings = [sibling(name, content) for name, content in hub.files.items()]
            said = {"id": hub.repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            if "/tree/" in path:
                said = [tree_entry(found) for found in siblings]
            text = json.dumps(said).encode()
            self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(text))})
            self.wfile.write(text)

        def _file(self, name: str, with_content: bool) -> None:
            content = hub.files.get(name)
            if content is None:
                self._refuse(404, "EntryNotFound")
                return
            begin = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            headers["Content-Length"] = str(len(content) - begin)
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self._head(206 if begin else 200, headers)
            if with_content:
                self._send(name, content[begin:])

        def _send(self, name: str, content: bytes) -> None:
            if hub.breaks_after is not None and name.endswith(LARGE):
                self.wfile.write(content[: hub.breaks_after])
                hub.breaks_after = None
                self.close_connection = True
                return
            self.wfile.write(content)

        def _refuse(self, status: int, code: str) -> None:
            self._head(status, {"X-Error-Code": code, "Content-Length": "0"})

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Keep test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
