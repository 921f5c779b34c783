"""A Hub on localhost: the few requests that huggingface_hub makes, answered from memory and written down."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace, TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

REPO = "owner/tiny"
CHUNK = 20_000  # bytes that are written at a time
LARGE = (".safetensors", ".bin", ".gguf", ".pth", ".model")


@dataclass
class FakeHub:
    """Repositories by name, each a mapping of paths to contents.

    Args:
        repos: What it holds.
        refusals: Status and X-Error-Code, if any, by a part of the path.
        cuts: After how many bytes of a file, by its path, the connection breaks; once.
        down: After a cut the Hub answers 503 to everything.
        holds: The same as cuts, but the connection stays open and silent until `released`.
        damaged: Paths whose contents arrive with a flipped bit.
        log: Method, path and Range of every request.
    """

    repos: dict[str, dict[str, bytes]]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    down: bool = False
    holds: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """Changes with the contents."""
        parts = [f"{name}:{hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.repos[repo].items())]
        return hashlib.sha1(" ".join(parts).encode()).hexdigest()

    def fetched(self) -> list[str]:
        """Paths of the files that were asked for, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in self.log if "/resolve/" in path]

    def ranges(self, path: str) -> list[str | None]:
        """Range of each request for the contents of a large file."""
        return [asked for _, where, asked in self.log if where.startswith("/blobs/") and where.endswith(f"/{path}")]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append((request.command, path, request.headers["Range"]))
        for part, (status, code) in self.refusals.items():
            if part in path:
                return self._reply(request, status, b"", {"X-Error-Code": code} if code else {})
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if repo not in self.repos:
                return self._reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("", "main", self.commit(repo)):
                return self._reply(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self._reply(request, 200, json.dumps(self._describe(repo)).encode(), {})
        if path.startswith("/blobs/"):  # where the Hub's storage stands
            owner, name, file = path.removeprefix("/blobs/").split("/", 2)
            return self._send(request, file, self.repos[f"{owner}/{name}"][file])
        repo, _, rest = path[1:].partition("/resolve/")
        commit, file = rest.split("/", 1)
        assert commit == self.commit(repo)
        if file.endswith(LARGE):
            return self._reply(request, 302, b"", {"Location": f"{self.endpoint}/blobs/{repo}/{file}"})
        self._send(request, file, self.repos[repo][file])

    def _describe(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.repos[repo].items():
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry |= {"blobId": "0" * 40, "lfs": {"size": len(data), "sha256": digest, "pointerSize": 130}}
            siblings.append(entry)
        return {"id": repo, "sha": self.commit(repo), "siblings": siblings}

    def _send(self, request: BaseHTTPRequestHandler, file: str, data: bytes) -> None:
        if file in self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int((request.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut, hold = self.cuts.pop(file, None), self.holds.pop(file, None)
        stop = cut if cut is not None else hold
        if cut is not None and self.down:
            self.refusals["/"] = (503, "")
        self._reply(request, 206 if start else 200, data[start:], headers, stop and stop - start)
        if hold is not None:
            self.held.set()
            self.released.wait(60)
        request.close_connection = stop is not None

    def _reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        stop: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[:stop])
            request.wfile.flush()


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on localhost with one usable repository, without waiting between retries."""
    from huggingface_hub import close_session, constants

    from lit_llama.conversion import download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the next one reads the environment
    with FakeHub({REPO: dict(files)}) as hub:
        yield hub
    close_session()
