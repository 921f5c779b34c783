"""Clients that keep a server busy, and what they saw."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

_WORDS = ("llama", "alpaca", "guanaco", "vicuna", "pack", "herd", "wool", "hill", "grass", "river", "cloud", "road")


@dataclass
class Seen:
    """What the clients of a run saw.

    Attributes:
        seconds: Of the whole run.
        tokens: Of all answers.
        first: Seconds until each answer began.
        between: Seconds between pieces of an answer, each divided by its tokens.
        requests: That were answered.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    requests: int = 0

    def row(self) -> dict[str, float]:
        """Figures of the run."""
        first, between = np.array(self.first) * 1000, np.array(self.between) * 1000
        return {
            "requests/s": self.requests / self.seconds,
            "tokens/s": self.tokens / self.seconds,
            "first ms": float(np.median(first)),
            "first ms p99": float(np.percentile(first, 99)),
            "token ms": float(np.median(between)),
            "token ms p99": float(np.percentile(between, 99)),
        }


def prompts(count: int, shared: bool, seed: int) -> list[str]:
    """Texts of unequal lengths, 20 to 200 words; shared ones begin alike with 150 others."""
    draw = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(draw.choices(_WORDS, k=number))

    prefix = f"{words(150)}. " if shared else ""
    return [f"{prefix}{words(draw.randint(20, 200))}." for _ in range(count)]


async def drive(url: str, texts: Sequence[str], tokens: int, clients: int) -> Seen:
    """Have clients ask one after another until all texts are continued."""
    seen, left = Seen(), list(enumerate(texts))[::-1]
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client() -> None:
            while left:
                number, text = left.pop()
                await _ask(http, text, tokens // 2 + number * 7 % tokens, seen)

        start = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        seen.seconds = time.monotonic() - start
    return seen


async def _ask(http: httpx2.AsyncClient, text: str, tokens: int, seen: Seen) -> None:
    body: dict[str, Any] = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    start = before = time.monotonic()
    made = 0
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            now = time.monotonic()
            if not choice["text"]:
                continue
            if not made:
                seen.first.append(now - start)
            else:
                seen.between.append(now - before)
            made, before = made + 1, now
    seen.tokens += tokens  # greedy continuations of these texts do not end by themselves
    seen.requests += 1
