"""A judge behind a local endpoint that answers as it is told."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.evaluate.judge import Judge, judge_prompt, judged, make_judge
from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.tasks import Item, Task
from lit_llama.text.message import Conversation, instruct

Reply = Callable[[str, int], tuple[int, str]]


class Endpoint(ThreadingHTTPServer):
    """Replies to a prompt and the number of its request with a status and a text."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.seen, self.keys = reply, list[str](), set[str | None]()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        self.server.seen.append(prompt)
        self.server.keys.add(self.headers["authorization"])
        status, text = self.server.reply(prompt, len(self.server.seen))
        found = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(found)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Endpoint]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(reply: Reply) -> Endpoint:
        servers.append(server := Endpoint(reply))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ANSWERS = [("bad", "good"), ("good", "bad"), ("good", "good"), ("bad", "bad too"), ("odd", "strange")]
TASK = Task(name="t", items=tuple(Item(instruct(f"question {n}", row=n)) for n in range(5)), metrics=("stopped",))


def rows() -> list[Rows]:
    return [
        Rows(name, Path(name), {("t", "answer", n): {"answer": pair[place]} for n, pair in enumerate(ANSWERS)})
        for place, name in enumerate(("base", "tuned"))
    ]


def by_quality(prompt: str, _: int) -> tuple[int, str]:
    """Prefers what is good, the first of two bad ones, and says nothing clear of what is odd."""
    first, second = re.findall(r"_answer>\n(.*)\n</", prompt)
    if "odd" in (first, second):
        return 200, "Well."
    return 200, f"Verdict: second? No.\n**Verdict:** {'second' if (first, second) == ('bad', 'good') else 'first'}"


def judge(server: Endpoint, **more: Any) -> Judge:
    return Judge(url=server.url, model="m", key="secret", **({"wait": 0.001} | more))


def test_only_what_wins_in_both_orders_has_won(serve: Callable[[Reply], Endpoint], tmp_path: Path) -> None:
    """A judge that likes the first answer giving half of all points to either, or orders that are mixed up."""
    server = serve(by_quality)
    found = judge(server).compare(rows(), [TASK], tmp_path)["comparisons"][0]
    counts = {key: found[key] for key in ("won", "lost", "tied", "swayed", "unclear")}
    assert counts == {"won": 1, "lost": 1, "tied": 3, "swayed": 1, "unclear": 1}
    assert found["win_rate"]["value"] == 0.5 and found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    assert len(server.seen) == 8, "equal answers need no judge"
    assert server.keys == {"Bearer secret"} and "secret" not in (tmp_path / "judged.jsonl").read_text()
    kept = (tmp_path / "judged.jsonl").read_bytes()
    judge(server).compare(rows(), [TASK], tmp_path)
    assert len(server.seen) == 8 and (tmp_path / "judged.jsonl").read_bytes() == kept
    assert [judged(*pair) for pair in (("tie", "first"), ("second", "second"))] == ["tied", "tied"]


def test_what_passes_is_asked_again_and_the_rest_named(serve: Callable[[Reply], Endpoint], tmp_path: Path) -> None:
    """Hours of verdicts lost to one busy moment, or a wrong key that is tried for minutes."""
    (tmp_path / "flaky").mkdir()
    flaky = serve(lambda prompt, count: (429, "slow down") if count % 2 else by_quality(prompt, count))
    assert judge(flaky, together=1).compare(rows(), [TASK], tmp_path / "flaky")["comparisons"][0]["won"] == 1
    (tmp_path / "other").mkdir()
    dead = serve(lambda *_: (503, "no"))
    with pytest.raises(ResourceError, match=r"does not answer after 3 attempts, status 503.*goes on from there"):
        judge(dead, tries=3, together=1).compare(rows(), [TASK], tmp_path / "other")
    denied = serve(lambda *_: (401, "wrong key"))
    with pytest.raises(UserError, match=r"refuses the question, status 401.*wrong key") as caught:
        judge(denied).compare(rows(), [TASK], tmp_path)
    assert "secret" not in str(caught.value)


def test_a_question_holds_its_reference_and_its_turns() -> None:
    turns = ({"role": "user", "content": "one {first}"}, {"role": "assistant", "content": "two"})
    prompt = judge_prompt(Conversation((*turns, {"role": "assistant", "content": "wanted"})), "{second}", "b")
    assert "user: one {first}\n\nassistant: two" in prompt and "wanted" in prompt and "\n{second}\n" in prompt
    assert "correct_answer" not in judge_prompt(instruct("a"), "b", "c")


def test_flags_that_make_no_judge_are_refused() -> None:
    assert make_judge(None, None, "key") is None
    with pytest.raises(UserError, match="--judge_url is given without --judge_model"):
        make_judge("http://x/v1", None, None)
    with pytest.raises(UserError, match="expected a URL"):
        make_judge("localhost:8000", "m", None)
