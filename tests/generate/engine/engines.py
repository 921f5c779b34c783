"""Engines on a tiny model, and ones that fail as they are told."""

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from conftest import tiny_model
from torch import Tensor

from lit_llama.generate.engine.engine import Engine, EngineConfig, Ticket
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import PackedRunner, Runner, TorchRunner
from lit_llama.model.config import KVCacheType
from lit_llama.model.kernels.decode import PackedCache, PackedLLaMA
from lit_llama.model.kernels.paged import PagedBatch
from lit_llama.model.operators.kernels import compiled

BYTES = PackedCache.bytes_of_block(tiny_model().config, torch.float32)


def engine(
    blocks: int = 60, kind: str = "packed", model: Any = None, kv_cache: KVCacheType = "auto", **options: Any
) -> Engine:
    model = model or tiny_model()
    runner: Runner
    if kind == "packed" and compiled() is not None:
        runner = PackedRunner(PackedLLaMA(model, torch.float32), blocks * BYTES, kv_cache)
    else:
        runner = TorchRunner(model, blocks * BYTES // 2, kv_cache)  # whose heads are not filled up
    return Engine(runner, tokens=380, config=EngineConfig(**options))


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(380) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


KINDS = [
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=25, temperature=1.0, top_p=0.9, seed=5),
    Sampling(max_new_tokens=15, temperature=0.8, top_k=20, repetition_penalty=1.3, seed=7),
    Sampling(max_new_tokens=30, presence_penalty=0.5, stop_ids=[3, 4, 5]),
]


def taken(ticket: Ticket) -> list[int]:
    return [token for step in ticket.steps for token in step.ids]


def finish(it: Engine) -> None:
    while it.busy:
        it.step()
        it.check()


def answers(it: Engine, requests: list[Request]) -> list[list[int]]:
    tickets = [it.add(request) for request in requests]
    finish(it)
    return [taken(ticket) for ticket in tickets]


@cache
def alone() -> list[list[int]]:
    """What each gets in an engine of its own, without guesses."""
    pairs = zip(prompts(8), KINDS * 2, strict=True)
    return [answers(engine(speculate=False), [Request(ids, sampling)])[0] for ids, sampling in pairs]


def requests() -> list[Request]:
    return [Request(ids, sampling) for ids, sampling in zip(prompts(8), KINDS * 2, strict=True)]


class Faulty:
    """A runner that fails as it is told."""

    def __init__(self, inner: Runner, fail: Iterator[Any]) -> None:
        self._inner, self._fail = inner, fail
        self.config, self.blocks, self.device, self.exact = inner.config, inner.blocks, inner.device, inner.exact
        self.copy, self.reclaim = inner.copy, inner.reclaim
        self.cleared: list[int] = []

    def logits(self, batch: PagedBatch) -> Tensor:
        logits = self._inner.logits(batch)
        fault = next(self._fail, None)
        if isinstance(fault, BaseException):
            raise fault
        return logits if fault is None else fault(batch, logits)

    def clear(self, block: int) -> None:
        self.cleared.append(block)
        self._inner.clear(block)


def faulty(*faults: Any) -> tuple[Engine, Faulty]:
    runner = Faulty(engine().runner, iter(faults))
    return Engine(runner, tokens=380, config=EngineConfig()), runner  # type: ignore[arg-type]
