"""Clients of every kind against one server for a while: what they get is right, and nothing is left behind."""

import asyncio
import contextlib
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2

from lit_llama.errors import IntegrityError

_KINDS = ("whole", "stream", "leave", "slow", "malformed", "too long", "scored", "json", "several")
_PROBES = 12


@dataclass
class Counts:
    """Requests by kind, and those that were refused for want of room."""

    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    full: int = 0


class Soak:
    """Random clients of a server.

    Args:
        url: Its address.
        seed: Of what they do.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._http = httpx2.AsyncClient(base_url=url, timeout=300, limits=httpx2.Limits(max_connections=200))
        self._seed, self._wanted = seed, dict[int, str]()
        self.counts = Counts()

    async def run(self, seconds: float, clients: int) -> Counts:
        """Ask for so long.

        Raises:
            IntegrityError: An answer is another than when it was asked for alone, or a status is wrong.
        """
        for number in range(_PROBES):
            self._wanted[number] = (await self._post(self._body(number))).json()["choices"][0]["text"]
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for client in range(clients):
                group.create_task(self._client(random.Random(self._seed + client), end))
        await self._http.aclose()
        return self.counts

    def _body(self, number: int) -> dict[str, Any]:
        sampled = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0}
        return {"prompt": f"{number} llamas and " * (1 + number % 5), "max_tokens": 8 + 3 * number, **sampled}

    async def _post(self, body: dict[str, Any]) -> httpx2.Response:
        return await self._http.post("/v1/completions", json=body)

    async def _client(self, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            kind, number = draw.choice(_KINDS), draw.randrange(_PROBES)
            self.counts.kinds[kind] += 1
            full = self.counts.full
            await getattr(self, f"_{kind.replace(' ', '_')}")(number, draw)
            if self.counts.full > full:
                await asyncio.sleep(draw.random())

    def _check(self, reply: httpx2.Response, status: int) -> bool:
        """Whether there is an answer to look at."""
        if reply.status_code == 429:
            self.counts.full += 1
            return False
        if reply.status_code != status:
            raise IntegrityError(f"the status is {reply.status_code}, expected {status}: {reply.text[:300]}")
        return status == 200

    def _same(self, number: int, text: str) -> None:
        if text != self._wanted[number]:
            raise IntegrityError(f"answer {number} is {text!r}, alone it was {self._wanted[number]!r}")

    async def _whole(self, number: int, draw: random.Random) -> None:
        reply = await self._post(self._body(number))
        if self._check(reply, 200):
            self._same(number, reply.json()["choices"][0]["text"])

    async def _stream(self, number: int, draw: random.Random, pause: float = 0.0) -> None:
        text = ""
        async with self._http.stream("POST", "/v1/completions", json=self._body(number) | {"stream": True}) as reply:
            if reply.status_code != 200:
                await reply.aread()
                self._check(reply, 200)
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    await asyncio.sleep(pause)
        self._same(number, text)

    async def _slow(self, number: int, draw: random.Random) -> None:
        await self._stream(number, draw, draw.random() * 0.2)

    async def _leave(self, number: int, draw: random.Random) -> None:
        body = self._body(number) | {"stream": draw.random() < 0.5, "max_tokens": 400}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.random()):
                await self._post(body)

    async def _malformed(self, number: int, draw: random.Random) -> None:
        bodies = (
            b"{",
            b"[]",
            b'{"prompt": NaN}',
            b'{"prompt": "a", "mirostat": 1}',
            b'{"prompt": "a", "n": -1}',
            b"\xff",
        )
        self._check(await self._http.post("/v1/completions", content=draw.choice(bodies)), 400)

    async def _too_long(self, number: int, draw: random.Random) -> None:
        self._check(await self._post({"prompt": "a b c " * 20_000}), 400)

    async def _scored(self, number: int, draw: random.Random) -> None:
        body = {"prompt": [[5, 6, 7 + number, 8]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        reply = await self._post(body)
        if self._check(reply, 200) and len(reply.json()["choices"][0]["logprobs"]["token_logprobs"]) != 5:
            raise IntegrityError("a prompt of four tokens and one more has not five scores")

    async def _json(self, number: int, draw: random.Random) -> None:
        schema = {
            "type": "object",
            "properties": {"n": {"const": number}},
            "required": ["n"],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "n?"}], "response_format": wanted, "max_tokens": 60}
        reply = await self._http.post("/v1/chat/completions", json=body)
        if self._check(reply, 200) and reply.json()["choices"][0]["finish_reason"] == "stop":
            found = json.loads(reply.json()["choices"][0]["message"]["content"])
            if found != {"n": number}:
                raise IntegrityError(f"JSON is {found}, expected n {number}")

    async def _several(self, number: int, draw: random.Random) -> None:
        body = self._body(number) | {"n": 3, "prompt": [self._body(number)["prompt"], "another"]}
        reply = await self._post(body)
        if self._check(reply, 200):
            self._same(number, reply.json()["choices"][0]["text"])
