"""Data sets of a Hub on localhost: the few requests that the datasets library makes of one."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


@contextmanager
def data_hub(repo: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve one repository; gives the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if found := re.fullmatch(rf"/datasets/{repo}/resolve/[^/]+/(.+)", path):
                self._send_file(found[1])
            elif re.fullmatch(rf"/api/datasets/{repo}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": name} for name in files]
                self._send_json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
            elif found := re.fullmatch(rf"/api/datasets/{repo}/tree/[^/]+/?(.*)", path):
                self._send_json(self._tree(found[1], parse_qs(url.query).get("recursive") == ["true"]))
            else:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
            start = f"{folder}/" if folder else ""
            below = {name: name.removeprefix(start) for name in files if name.startswith(start)}
            folders = {start + rest.split("/")[0] for rest in below.values() if "/" in rest}
            found: list[dict[str, object]] = [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
            for name, rest in below.items():
                if recursive or "/" not in rest:
                    digest = hashlib.sha1(files[name]).hexdigest()
                    found.append({"type": "file", "path": name, "size": len(files[name]), "oid": digest})
            return found

        def _send_file(self, name: str) -> None:
            if name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            digest = hashlib.sha1(files[name]).hexdigest()
            self._send(200, files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
