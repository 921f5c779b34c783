"""Answers as OpenAI's API has them: whole, or as a stream of events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llama.generate.engine.request import TokenLogprobs
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.fields import ApiError
from lit_llama.generate.serve.requests import Asked
from lit_llama.generate.serve.running import Part, Running
from lit_llama.generate.serve.tools import call_id

Scored = tuple[int, TokenLogprobs | None]
DONE = b"data: [DONE]\n\n"


@dataclass
class _Whole:
    """An answer that is put together."""

    content: str = ""
    thoughts: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    finish: str | None = None

    def add(self, part: Part) -> None:
        for piece in part.pieces:
            self.content += piece.content
            self.thoughts += piece.thoughts
            if piece.name:
                function = {"name": piece.name, "arguments": ""}
                self.calls.append({"id": call_id(), "type": "function", "function": function})
            if piece.call is not None:
                self.calls[piece.call]["function"]["arguments"] += piece.arguments
        self.tokens += part.tokens
        self.finish = part.finish or self.finish


class Reply:
    """The reply to a request.

    Args:
        asked: The request.
        running: Its answers.

    Attributes:
        answers: Texts of the answers, once they are there, for logs.
    """

    def __init__(self, asked: Asked, running: Running) -> None:
        self._asked, self._running, self._llm = asked, running, asked.llm
        self.answers: list[str] = []
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    # ---- whole

    async def whole(self) -> dict[str, Any]:
        """Return the body of a reply that is not streamed."""
        found = [_Whole() for _ in range(self._asked.choices)]
        async for part in self._running.parts():
            if part is not None:
                found[part.choice].add(part)
        self.answers = [one.thoughts + one.content for one in found]
        make = self._message if self._asked.chat else self._text
        choices = [make(index, one) for index, one in enumerate(found)]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self._running.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._asked.name}
        return head | {"system_fingerprint": None}

    def _message(self, index: int, one: _Whole) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": one.content, "refusal": None}
        if one.thoughts:
            message["reasoning_content"] = one.thoughts
        if one.calls:
            message |= {"content": one.content or None, "tool_calls": one.calls}
        scores = None
        if self._asked.sampling.logprobs is not None:
            scores = {"content": chat_logprobs(self._llm, one.tokens), "refusal": None}
        return {"index": index, "message": message, "logprobs": scores, "finish_reason": one.finish}

    def _text(self, index: int, one: _Whole) -> dict[str, Any]:
        before, prompt = self._echoed(index)
        scores = None
        if self._asked.sampling.logprobs is not None:
            scores = text_logprobs(self._llm, [*prompt, *one.tokens])
        return {"index": index, "text": before + one.content, "logprobs": scores, "finish_reason": one.finish}

    def _echoed(self, index: int) -> tuple[str, list[Scored]]:
        """The prompt of an answer, where it is given back, and its scored tokens."""
        if not self._asked.echo:
            return "", []
        number = index // self._asked.sampling.n
        ids = self._asked.requests[number].ids
        scores = self._running.prompt_logprobs.get(number, ())
        return self._llm.tokenizer.decode(ids), list(zip(ids, scores, strict=True)) if scores else []

    # ---- streamed

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events; an error on the way is one of them."""
        try:
            if self._asked.chat:
                for index in range(self._asked.choices):
                    yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            elif self._asked.echo:
                for index in range(self._asked.choices):
                    yield self._chunk(index, {"text": self._echoed(index)[0]})
            texts = [""] * self._asked.choices
            offsets = [len(self._echoed(index)[0]) for index in range(self._asked.choices)]
            async for part in self._running.parts():
                if part is None:
                    yield b": still there\n\n"
                    continue
                texts[part.choice] += "".join(piece.thoughts + piece.content for piece in part.pieces)
                for event in self._deltas(part) if self._asked.chat else self._part(part, offsets):
                    yield event
            self.answers = texts
            if self._asked.include_usage:
                yield _event(self._chunk_head() | {"choices": [], "usage": self._running.usage()})
        except ApiError as error:
            yield _event(error.body)
        yield DONE

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._asked.chat else "text_completion")

    def _chunk(self, index: int, body: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "logprobs": None} | body | {"finish_reason": finish}
        usage = {"usage": None} if self._asked.include_usage else {}
        return _event(self._chunk_head() | {"choices": [choice]} | usage)

    def _part(self, part: Part, offsets: list[int]) -> Iterator[bytes]:
        text = "".join(piece.content for piece in part.pieces)
        body: dict[str, Any] = {"text": text}
        if part.tokens:
            body["logprobs"] = text_logprobs(self._llm, part.tokens, offsets[part.choice])
            offsets[part.choice] += sum(len(name) for name in body["logprobs"]["tokens"])
        if text or part.tokens:
            yield self._chunk(part.choice, body)
        if part.finish is not None:
            yield self._chunk(part.choice, {"text": ""}, part.finish)

    def _deltas(self, part: Part) -> Iterator[bytes]:
        scores = {"content": chat_logprobs(self._llm, part.tokens), "refusal": None} if part.tokens else None
        for piece in part.pieces:
            delta: dict[str, Any] = {"content": piece.content}
            if piece.thoughts:
                delta = {"reasoning_content": piece.thoughts}
            if piece.call is not None:
                call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.arguments}}
                if piece.name:
                    call |= {"id": call_id(), "type": "function"}
                    call["function"] = {"name": piece.name, "arguments": piece.arguments}
                delta = {"tool_calls": [call]}
            yield self._chunk(part.choice, {"delta": delta, "logprobs": scores})
            scores = None
        if scores is not None:
            yield self._chunk(part.choice, {"delta": {"content": ""}, "logprobs": scores})
        if part.finish is not None:
            yield self._chunk(part.choice, {"delta": {}}, part.finish)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + encoded(body) + b"\n\n"


def encoded(body: Any) -> bytes:
    """Encode JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def spelled(llm: LLM, token: int) -> tuple[str, bytes]:
    """Spell a token as text, and its bytes; a control token by its spelling."""
    made = llm.token_bytes[token] or (llm.tokenizer.vocabulary[token] or "").encode()
    return made.decode("utf-8", "replace"), made


def chat_logprobs(llm: LLM, tokens: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return the log-probabilities as messages have them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, made = spelled(llm, token)
        return {"token": text, "logprob": logprob, "bytes": list(made)}

    return [
        one(token, scores.logprob) | {"top_logprobs": [one(other, value) for other, value in scores.top]}
        for token, scores in tokens
        if scores is not None
    ]


def text_logprobs(llm: LLM, tokens: Sequence[Scored], offset: int = 0) -> dict[str, list[Any]]:
    """Return the log-probabilities as completions have them: a list for each of tokens, scores, alternatives and
    places.

    The alternatives hold the likeliest tokens and the one that stands there, as lm-evaluation-harness reads them.
    """
    names: list[str] = []
    scores: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, found in tokens:
        name = _name(llm, token)
        names.append(name)
        offsets.append(offset)
        offset += len(name)
        scores.append(None if found is None else found.logprob)
        if found is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, value in dict([*found.top, (token, found.logprob)]).items():
            key = _name(llm, other)
            top[key if key not in top else f"token_id:{other}"] = value
        tops.append(top)
    return {"tokens": names, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}


def _name(llm: LLM, token: int) -> str:
    """A token as text; bytes that are no text are spelled."""
    text, made = spelled(llm, token)
    return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in made)
