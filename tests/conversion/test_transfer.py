"""Bytes of one file over a line that breaks, against a server whose answers are written down one by one."""

import ast
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx2
import huggingface_hub
import pytest
from conftest import ROOT
from fake_hub import REPO, FakeHub
from huggingface_hub import close_session, constants

from lit_llama.conversion import download as module
from lit_llama.conversion.download import download, transfer
from lit_llama.errors import ResourceError

DATA = bytes(range(256)) * 40


class Answer(NamedTuple):
    """An answer of the server.

    Args:
        status: Of HTTP.
        body: What is sent of it.
        headers: Besides the length.
        length: Bytes that are announced; None for those of the body.
    """

    status: int
    body: bytes
    headers: dict[str, str]
    length: int | None = None


class Server:
    """A server that gives its answers in order, the last one again and again, and notes the headers of requests."""

    def __init__(self, *answers: Answer, host: str = "127.0.0.1") -> None:
        self.answers, self.requests = list(answers), list[dict[str, str]]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append(dict(self.headers.items()))
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                self.send_response(answer.status)
                length = len(answer.body) if answer.length is None else answer.length
                for name, value in (answer.headers | {"Content-Length": str(length), "Connection": "close"}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = True

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://{host}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that were waited for, which take none."""
    found: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    close_session()
    yield found
    close_session()


def rest(start: int, body: bytes = DATA) -> Answer:
    return Answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})


def received(server: Server, path: Path, before: bytes = b"") -> bytes:
    path.write_bytes(before)
    with path.open("ab") as output:
        transfer(f"{server.url}/file", output, len(DATA), "file")
    return path.read_bytes()


def test_each_attempt_asks_for_what_is_missing(waits: list[float], tmp_path: Path) -> None:
    """Catches bytes that are fetched twice, or lost, where the line breaks again and again."""
    cut = [Answer(200, DATA[:100], {}, len(DATA))]
    cut += [rest(start)._replace(body=DATA[start : start + 100], length=len(DATA) - start) for start in (100, 200)]
    server = Server(*cut, rest(300))
    assert received(server, tmp_path / "part") == DATA
    assert server.ranges() == [None, "bytes=100-", "bytes=200-", "bytes=300-"] and waits == [1.0] * 3
    assert received(Server(rest(5000)), tmp_path / "part", DATA[:5000]) == DATA


def test_a_file_that_is_there_is_not_asked_for(waits: list[float], tmp_path: Path) -> None:
    """Catches a request for the bytes behind the end, which servers refuse."""
    server = Server(Answer(416, b"", {}))
    assert received(server, tmp_path / "part", DATA) == DATA and server.requests == []


def test_attempts_that_bring_nothing_come_to_an_end(waits: list[float], tmp_path: Path) -> None:
    """Catches a loop without an end: a line that breaks at once, an answer that is empty, a server that is gone."""
    for answer, error in (
        (Answer(200, b"", {}, 99), httpx2.RemoteProtocolError),
        (Answer(200, b"", {}), ResourceError),
    ):
        server = Server(answer)
        with pytest.raises(error):
            received(server, tmp_path / "part")
        assert len(server.requests) == 6
    server.server.server_close()
    server.server.shutdown()
    waits.clear()
    with pytest.raises(httpx2.ConnectError):
        received(server, tmp_path / "part")
    assert waits == [1.0] * 5


def test_a_server_that_sends_all_again_replaces_what_was_there(waits: list[float], tmp_path: Path) -> None:
    """Catches a file whose beginning stands in it twice, where a proxy takes no notice of Range."""
    assert received(Server(Answer(200, DATA, {})), tmp_path / "part", DATA[:5000]) == DATA


def test_other_bytes_than_those_asked_for_are_not_taken(waits: list[float], tmp_path: Path) -> None:
    """Catches a piece of the file in the wrong place, and a server that never stops."""
    with pytest.raises(httpx2.RemoteProtocolError, match="bytes from 5000 on were asked for"):
        received(Server(rest(4000)), tmp_path / "part", DATA[:5000])
    assert (tmp_path / "part").read_bytes() == DATA[:5000]
    with pytest.raises(ResourceError, match=rf"sends more than {len(DATA):,} bytes"):
        received(Server(Answer(200, DATA + b"x" * (1 << 20), {})), tmp_path / "part")
    assert len((tmp_path / "part").read_bytes()) <= len(DATA)


def test_a_hub_that_asks_for_patience_gets_it(waits: list[float], tmp_path: Path) -> None:
    """Catches a download that ends at a limit of requests, and one that does not wait as long as it is told."""
    many = [Answer(429, b"", {"Retry-After": seconds}) for seconds in ("17", "99999", "soon")]
    assert received(Server(*many, Answer(200, DATA, {})), tmp_path / "part") == DATA
    assert waits == [17.0, 300.0, 1.0]


def test_the_token_goes_to_the_hub_and_nowhere_else(
    waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a token that is sent on to the storage behind the Hub, or sent although the user forbids it."""
    storage = Server(Answer(200, DATA, {}), host="localhost")
    hub = Server(Answer(302, b"", {"Location": f"{storage.url}/blob"}))
    assert received(hub, tmp_path / "part") == DATA
    assert hub.requests[0]["Authorization"] == "Bearer hf_secret" and "Authorization" not in storage.requests[0]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert received(hub, tmp_path / "part") == DATA and "Authorization" not in hub.requests[1]


def test_attempts_are_one_line(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a line for each attempt, and those that huggingface_hub would log."""
    hub.cuts |= {"model.safetensors": 20_000}
    with caplog.at_level(logging.INFO):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "again" in line] == [
        f"{hub.endpoint} does not answer as it should, trying again ..."
    ]
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


def test_names_of_huggingface_hub_are_documented_ones() -> None:
    """Catches a name that the next release may take away; two environment variables are read where it keeps them."""
    assert int(huggingface_hub.__version__.split(".")[0]) == 2, "look at the names again"
    exported = set(huggingface_hub.__all__)
    documented = {  # docs/package_reference of 2.4.0: utilities, hf_api
        "huggingface_hub.utils": {"hf_raise_for_status"},
        "huggingface_hub.hf_api": {"RepoSibling"},
        "huggingface_hub.errors": {name for name in dir(huggingface_hub.errors) if name.endswith(("Error", "Enabled"))},
        "huggingface_hub": exported | {"constants"},
    }
    found = 0
    for path in sorted((ROOT / "lit_llama").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huggingface_hub"):
                names = {alias.name for alias in node.names}
                assert names <= documented.get(node.module or "", set()), f"{path}:{node.lineno}"
                found += len(names)
    assert found > 5
    read = set(re.findall(r"constants\.(\w+)", Path(module.__file__).read_text("utf-8")))
    assert read == {"HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    assert constants.HF_HUB_DOWNLOAD_TIMEOUT > 0 and isinstance(constants.HF_HUB_DISABLE_IMPLICIT_TOKEN, bool)
