"""The process of a server: its address, its keys, its signals."""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import run_here
from servers import events, service, tiny

from lit_llama.errors import CheckpointError, Interrupted, ResourceError, UserError
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.server import Settings, addresses, listen, read_keys, serve, start
from lit_llama.generate.serve.service import Service

pytestmark = pytest.mark.timeout(60)


def stopped(folder: Path, signals: int) -> tuple[str, list[str], BaseException | None]:
    """What a client of a long stream gets, and what is said, where signals come in the midst of it."""
    llm = tiny(folder)[0]
    made, own, received, said = listen("127.0.0.1", 0), service(folder), [""], list[str]()
    app, url = create_app(own), f"{addresses(made)[0]}/v1/chat/completions"
    token = llm.tokenizer.encode("a")[0]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {token: 100}, "stream": True}
    body["n"] = 1 if signals == 1 else 120

    def talk() -> None:
        try:
            with httpx2.stream("POST", url, json=body, timeout=30) as reply:
                for number, text in enumerate(reply.iter_text()):
                    received[0] += text
                    if number == 1:
                        for _ in range(signals):
                            os.kill(os.getpid(), signal.SIGTERM)
                            time.sleep(0.05)
        except httpx2.HTTPError:
            pass

    client = threading.Thread(target=talk)
    client.start()
    error = None
    try:
        serve(app, made, lambda: lambda: said.append("ended"), drain=30, said=said.append)
    except Interrupted as raised:
        error = raised
    client.join()
    return received[0], said, error


def test_a_first_signal_lets_answers_end(tiny_folder: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    received, said, error = stopped(tiny_folder, 1)
    assert error is None and said == ["stopped; all that was asked is answered", "ended"]
    assert events(received)[-1]["choices"][0]["finish_reason"] == "length"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_signal_ends_all_at_once(tiny_folder: Path) -> None:
    received, said, error = stopped(tiny_folder, 2)
    assert isinstance(error, Interrupted) and error.exit_status == 128 + signal.SIGTERM
    assert "[DONE]" not in received and said == ["ended"]


def test_a_model_that_cannot_be_loaded_ends_the_server(tiny_folder: Path) -> None:
    def load() -> Any:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        serve(create_app(Service()), listen("127.0.0.1", 0), load, drain=1, said=print)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_LLAMA_API_KEY", raising=False)
    assert read_keys(None) == []
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key-of-length\n\nsecond-key-of-length\n")
    monkeypatch.setenv("LIT_LLAMA_API_KEY", "third-key-of-length")
    assert read_keys(file) == ["third-key-of-length", "first-key-of-length", "second-key-of-length"]
    for text, said in (
        ("", "holds no key"),
        ("short", "has 5 characters"),
        ("a key with some blanks", "without blanks"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said) as refused:
            read_keys(file)
        assert "blanks in" not in str(refused.value)  # a key is not printed
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_what_is_refused_before_anything_is_loaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_LLAMA_API_KEY", raising=False)
    with pytest.raises(UserError, match="so a key is needed"):
        start(tiny_folder, {}, Settings(host="0.0.0.0"))
    with pytest.raises(CheckpointError, match="absent"):
        start(tiny_folder / "absent", {}, Settings())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ResourceError, match="name another port"):
        start(tiny_folder, {}, Settings(port=taken.getsockname()[1]))
    with pytest.raises(ResourceError, match="no address of this machine"):
        listen("host.invalid", 1)
    for name in ("max_choices", "max_body", "max_length"):
        with pytest.raises(UserError, match=f"--{name} is 0"):
            Settings(**{name: 0})
    with pytest.raises(UserError, match="--port is 70000"):
        Settings(port=70000)


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (("--batch_size", "0"), 2, "--batch_size is 0"),
        (("--adapters", "a=absent"), 4, "absent"),
        (("--adapters", "a=absent", "--merge_adapter"), 2, "leave one of the two out"),
        (("--draft_dir", "absent"), 4, "absent"),
    ],
)
def test_a_plan_is_refused_as_the_server_would_be(
    tiny_folder: Path, flags: tuple[str, ...], status: int, told: str
) -> None:
    """A plan that says that all fits, of what cannot be loaded."""
    result = run_here("generate/serve.py", "--checkpoint_dir", tiny_folder, "--plan", *flags)
    assert result.returncode == status and told in result.stderr and result.stdout == ""
