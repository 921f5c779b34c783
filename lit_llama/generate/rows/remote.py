"""A teacher behind an API as OpenAI's: several requests at a time, and patience with one that is slow, busy or down."""

import email.utils
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.rows.teacher import Ask, Key, Reply
from lit_llama.wording import param

_MOST = 16 << 20
"""Bytes of an answer, beyond which an endpoint is not listened to."""
_TRIES = 8
"""Of a prompt, where other prompts are answered meanwhile."""
_SHOWN = 160
_LOCAL = ("localhost", "127.0.0.1", "::1")
_OWN_FAULT = (400, 413, 422)
"""Statuses that are about one prompt, so that the others go on."""


class _Again(Exception):
    """An attempt to reach the endpoint failed, and another one may not.

    Args:
        why: For people.
        after: Seconds that the endpoint asks to wait.
    """

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


@dataclass(frozen=True)
class Waits:
    """Times that things may take.

    Args:
        patience: Seconds without any answer, after which the run ends.
        timeout: Seconds of one request, however much comes in that time.
        first: Seconds until the second try; each later one takes twice as long.
        longest: Seconds between tries, at most.
    """

    patience: float = 3600.0
    timeout: float = 600.0
    first: float = 1.0
    longest: float = 60.0


class RemoteTeacher:
    """An endpoint.

    Args:
        endpoint: Its address up to /v1.
        model: Name of the model there; None for the only one it has.
        key_variable: Environment variable with its key; nothing is sent where it is not set.
        concurrency: Requests at the same time.
        waits: How long things take.

    Raises:
        UserError: The address is none, the key would go over the net in the clear, or there is no such model.
        ResourceError: The endpoint cannot be reached in time, to be asked for its models.
    """

    seeded = False

    def __init__(
        self,
        endpoint: str,
        *,
        model: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        waits: Waits | None = None,
    ) -> None:
        import httpx2

        if concurrency < 1:
            raise UserError(parameter="concurrency", value=concurrency, expected="1 or more")
        self._endpoint, self._waits = endpoint.rstrip("/"), waits or Waits()
        key = os.environ.get(key_variable, "").strip()
        _check_address(endpoint, key, key_variable)
        # Redirects are not followed: the key would go where nobody has sent it.
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(min(60.0, self._waits.timeout), read=self._waits.timeout),
            follow_redirects=False,
        )
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._success, self._not_before = time.monotonic(), 0.0
        self._todo: queue.Queue[tuple[Key, Ask] | None] = queue.Queue()
        self._done: queue.Queue[tuple[Key, Reply] | BaseException] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._concurrency = concurrency
        self._model = model or self._only_model()
        self.name = self.identity = f"{self._endpoint} {self._model}"

    def check(self, ask: Ask) -> None:
        """Refuse what an endpoint cannot be asked for."""
        if ask.user_turn:
            raise UserError(
                f"an endpoint gives no user's turn to go on with: this recipe needs {param('checkpoint_dir')}"
            )

    def add(self, key: Key, ask: Ask) -> None:
        """Queue a prompt for the endpoint."""
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._concurrency)]
            for thread in self._threads:
                thread.start()
        self._todo.put((key, ask))

    def wait(self) -> list[tuple[Key, Reply]]:
        """Wait for replies of the endpoint.

        Raises:
            ResourceError: The endpoint has answered nothing for too long.
            UserError: It refuses the key or the model.
        """
        found: list[tuple[Key, Reply]] = []
        try:
            done = self._done.get(timeout=0.2)
            while True:
                if isinstance(done, BaseException):
                    raise done
                found.append(done)
                done = self._done.get_nowait()
        except queue.Empty:
            return found

    def close(self) -> None:
        """End the threads, and close the connections."""
        self._closed.set()
        for _ in self._threads:
            self._todo.put(None)
        self._client.close()

    def _work(self) -> None:
        while (task := self._todo.get()) is not None and not self._closed.is_set():
            key, ask = task
            try:
                reply = self._persist(lambda key=key, ask=ask: self._answer(key, ask))  # type: ignore[misc]
            except BaseException as error:
                self._done.put(error)
                return
            self._done.put((key, reply))

    def _persist(self, call: Callable[[], Reply]) -> Reply:
        """Try again and again, with longer and longer waits.

        Raises:
            ResourceError: Nobody got an answer for too long.
        """
        begun, tries = time.monotonic(), 0
        while True:
            self._pause(self._not_before - time.monotonic())
            try:
                reply = call()
            except _Again as error:
                tries += 1
                others = self._success > begun
                if tries >= _TRIES and others:
                    return Reply(error=f"{tries} tries, at last: {error}")
                if time.monotonic() - max(begun, self._success) > self._waits.patience:
                    raise ResourceError(
                        f"{self._endpoint} has answered nothing for {self._waits.patience:.0f} s, at last: {error}; "
                        "run the same command again when it does, nothing is lost"
                    ) from error
                self._back_off(tries, error.after)
            else:
                with self._lock:
                    self._success = time.monotonic()
                return reply

    def _back_off(self, tries: int, after: float | None) -> None:
        """Wait: as long as the endpoint asks for, and then nobody asks it; else by ourselves."""
        own = min(self._waits.longest, self._waits.first * 2 ** min(tries - 1, 20)) * random.uniform(0.5, 1.0)
        if after is None:
            self._pause(own)
            return
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + min(after, self._waits.patience))

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and self._closed.wait(seconds):
            raise _Closed

    def _answer(self, key: Key, ask: Ask) -> Reply:
        value = self._request("POST", "/chat/completions", self._body(key, ask))
        if isinstance(value, Reply):
            return value
        try:
            choices = [(choice["message"], choice.get("finish_reason")) for choice in value["choices"]]
            texts = [_text(message.get("content") or message.get("refusal") or "") for message, _ in choices]
            usage = value.get("usage") or {}
            tokens = int(usage.get("completion_tokens") or sum(map(_about, texts)))
            prompt = int(usage.get("prompt_tokens") or sum(_about(message["content"]) for message in ask.messages))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _Again(f"its JSON is no chat completion: {json.dumps(value)[:_SHOWN]}") from error
        if not texts:
            raise _Again("it gives no choices")
        reasons = ["stop" if why in ("stop", "tool_calls", None) else str(why) for _, why in choices]
        return Reply(texts=texts, finish_reasons=reasons, tokens=tokens, prompt_tokens=prompt)

    def _body(self, key: Key, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(ask.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": (sampling.seed + key[0]) % (1 << 31),
        }
        defaults = {
            "n": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
        }
        body |= {name: value for name in defaults if (value := getattr(sampling, name)) != defaults[name]}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if ask.schema is not None:
            schema = {"name": key[1], "schema": dict(ask.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer; a Reply where the endpoint refuses this prompt alone.

        Raises:
            _Again: Another try may do.
            UserError: None will.
        """
        import httpx2

        end = time.monotonic() + self._waits.timeout
        try:
            with self._client.stream(method, self._endpoint + path, json=body) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > _MOST:
                        raise _Again(f"its answer has more than {_MOST >> 20} MB")
                    if time.monotonic() > end:
                        raise _Again(f"its answer does not end within {self._waits.timeout:g} s")
                return _read(response.status_code, dict(response.headers), bytes(data), self._endpoint)
        except httpx2.InvalidURL as error:
            raise UserError(f"is no address: {error}", parameter="endpoint", value=self._endpoint) from error
        except (httpx2.HTTPError, RuntimeError) as error:
            if self._closed.is_set():
                raise _Closed from error
            raise _Again(f"{type(error).__name__}: {error}") from error

    def _only_model(self) -> str:
        found: list[str] = []

        def ask() -> Reply:
            value = self._request("GET", "/models")
            try:
                found.extend(str(entry["id"]) for entry in value["data"])
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self._endpoint}/models names no models; give one with {param('endpoint_model')}"
                ) from error
            return Reply()

        self._persist(ask)
        if len(found) != 1:
            names = ", ".join(found[:8]) or "none"
            raise UserError(
                f"{self._endpoint} has {len(found)} models ({names}); name one with {param('endpoint_model')}"
            )
        return found[0]


def _text(content: Any) -> str:
    """An answer as a text, without halves of characters, which cannot be written.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content.encode("utf-8", "replace").decode()


def _about(text: str) -> int:
    """Tokens of a text, estimated rather too high, where an endpoint does not tell: a limit of tokens has to hold."""
    return -(-len(text.encode("utf-8", "replace")) // 3)


class _Closed(BaseException):
    """Nobody waits any more."""


def _check_address(endpoint: str, key: str, variable: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(parameter="endpoint", value=endpoint, expected="an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "holds more than an address",
            parameter="endpoint",
            remedy=f"the key is read from the environment ({variable}) only",
        )
    if key and parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise UserError(
            f"the key in {variable} would go to {parts.hostname} unencrypted: use https, or unset {variable}"
        )


def _read(status: int, headers: dict[str, str], data: bytes, endpoint: str) -> Any:
    text = data.decode("utf-8", "replace")
    shown = " ".join(text.split())[:_SHOWN]
    if status in (401, 403):
        raise UserError(f"{endpoint} refuses the key (status {status}): {shown}")
    if status in _OWN_FAULT:
        return Reply(error=f"status {status}: {shown}")
    if status == 429 or status >= 500:
        raise _Again(f"status {status}: {shown}", _retry_after(headers))
    if status != 200:
        raise UserError(f"{endpoint} answers with status {status}, expected 200; is the address right? {shown}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        page = "<html" in text[:1000].lower() or text.lstrip().lower().startswith("<!doctype")
        raise _Again(f"{'an HTML page' if page else 'no JSON'} in place of an answer: {shown}") from error


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds that an answer asks to wait."""
    value = {name.lower(): entry for name, entry in headers.items()}.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
