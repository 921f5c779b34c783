"""Ours: the engine, with weights as they are stored or in 8 or 4 bits."""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation.worker import Result, serve
from lit_llama.generate.engine.engine import Engine, EngineConfig, Ticket
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import PackedRunner
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.decode import PackedLLaMA

CACHE = 1 << 29


def main(folder: Path, weights: Any) -> None:
    """Load and serve."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    exact = weights == "f32"
    dtype = torch.float32 if exact else torch.bfloat16
    packed = PackedLLaMA(load_model(folder), dtype, "stored" if exact else weights, consume=True)
    made = Ours(PackedRunner(packed, CACHE), packed.bytes)
    tasks = ("answer", "batch", "prefill", "arrivals", "known", "sizes")
    serve({name: getattr(made, name) for name in tasks})


class Ours:
    """The tasks; each begins with an empty cache."""

    def __init__(self, runner: PackedRunner, weights: int) -> None:
        self._runner, self._weights = runner, weights

    def _engine(self, **options: Any) -> Engine:
        return Engine(self._runner, config=EngineConfig(**options))

    def sizes(self) -> Result:
        """Bytes of the weights, and of the blocks of the cache that were written."""
        blocks = self._runner._cache.blocks  # (layers, blocks, ...)
        written = int(blocks[0].flatten(1).any(1).sum())
        return {"weights": self._weights, "touched": written * blocks.nbytes // blocks.shape[1]}

    def answer(self, ids: list[int], tokens: int, guess: bool = False) -> Result:
        """One greedy answer: time from its first token to its last, and its ids."""
        engine = self._engine(speculate=guess)
        ticket = engine.add(Request(ids, Sampling(max_new_tokens=tokens)))
        while not ticket.steps:
            engine.step()
        start, first = time.perf_counter(), sum(len(step.ids) for step in ticket.steps)
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - start
        made = [token for step in ticket.steps for token in step.ids]
        return {"seconds": seconds, "tokens": len(made) - first, "ids": made}

    def batch(self, prompts: list[list[int]], tokens: int) -> Result:
        """Greedy answers to prompts, all at once: from the first prompt to the last token."""
        engine = self._engine(speculate=False)
        start = time.perf_counter()
        tickets = [engine.add(Request(ids, Sampling(max_new_tokens=tokens))) for ids in prompts]
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - start
        made = [[token for step in ticket.steps for token in step.ids] for ticket in tickets]
        return {"seconds": seconds, "tokens": sum(map(len, made)), "ids": made}

    def prefill(self, ids: list[int]) -> Result:
        """Time to the first token of a prompt that is not known."""
        engine = self._engine(speculate=False)
        start = time.perf_counter()
        engine.add(Request(ids, Sampling(max_new_tokens=1)))
        while engine.busy:
            engine.step()
        return {"seconds": time.perf_counter() - start, "tokens": len(ids)}

    def known(self, ids: list[int], more: list[int]) -> Result:
        """Time to the first token of a prompt whose beginning is known."""
        engine = self._engine(speculate=False)
        seconds = 0.0
        for prompt in (ids, ids + more):
            start = time.perf_counter()
            engine.add(Request(prompt, Sampling(max_new_tokens=1)))
            while engine.busy:
                engine.step()
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": len(more)}

    def arrivals(self, prompts: list[list[int]], tokens: int, rate: float, together: bool) -> Result:
        """Requests that come over time: how long until all are answered, the time until each answer begins, and the
        time that each of its other tokens takes.

        Args:
            prompts: Of the requests.
            tokens: Of each answer.
            rate: Requests a second, at random moments.
            together: As many at a time as come, or one after another.
        """
        engine = self._engine(speculate=False, max_sequences=64 if together else 1)
        draw, now, due = random.Random(7), 0.0, []
        for ids in prompts:
            now += draw.expovariate(rate)
            due.append((now, ids))
        start, seen = time.perf_counter(), {}
        waits: list[float] = []
        firsts: list[float] = []
        begun: set[Ticket] = set()
        while due or engine.busy:
            clock = time.perf_counter() - start
            while due and due[0][0] <= clock:
                ticket = engine.add(Request(due.pop(0)[1], Sampling(max_new_tokens=tokens)))
                seen[ticket] = clock
            if not engine.busy:
                time.sleep(max(0.0, due[0][0] - clock))
                continue
            engine.step(streamed=True)
            clock = time.perf_counter() - start
            for ticket in [ticket for ticket in seen if ticket.steps]:
                ticket.steps.clear()
                (waits if ticket in begun else firsts).append(clock - seen[ticket])
                begun.add(ticket)
                seen[ticket] = clock
                if ticket.done:
                    del seen[ticket]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens * len(prompts), "waits": waits, "firsts": firsts}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
