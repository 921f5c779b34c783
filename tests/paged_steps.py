"""The plain runner of the engine, step by step and as a whole, for tests of models."""

from collections.abc import Sequence

import torch

from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import TorchRunner
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.kernels.paged import BLOCK, Paged, PagedBatch, PagedCache
from lit_llama.model.llama import LLaMA


class Steps:
    """A cache for sequences that are fed in pieces, the blocks of which lie in turns."""

    def __init__(self, config: LLaMAConfig, batch: int, capacity: int) -> None:
        self._bound = capacity
        blocks = -(-capacity // BLOCK)
        self._tables = [[batch * index + row for index in range(blocks)] for row in range(batch)]
        self._cache = PagedCache(config, batch * blocks, "cpu", torch.float32, slots=batch)
        self.lengths = [0] * batch

    def extend(self, counts: Sequence[int]) -> Paged:
        """The layout of the next tokens: `counts[b]` more of sequence b, laid end to end."""
        starts, ids = self.lengths, [[0] * count for count in counts]
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        bounds, slots = [self._bound] * len(ids), range(len(ids))
        batch = PagedBatch(ids=ids, starts=starts, tables=self._tables, logits=counts, bounds=bounds, slots=slots)
        return Paged(batch, self._cache)


def made_by(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    tokens: int | None = None,
    first: int = 0,
    max_batch_tokens: int = 512,
) -> list[list[int]]:
    """Ids of the answers to prompts, all at once, which are numbered from `first` on.

    Raises:
        UserError: One failed.
    """
    own = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    blocks = sum((len(ids) + each.max_new_tokens) // BLOCK + 1 for ids, each in zip(prompts, own, strict=True)) + 1
    size = PagedCache.bytes_of_block(model.config, model.model.embed_tokens.weight.dtype)
    config = EngineConfig(speculate=False, max_sequences=16, max_batch_tokens=max_batch_tokens)
    engine = Engine(TorchRunner(model, blocks * size), tokens=tokens, config=config)
    requests = [
        Request(ids, each, number=first + row) for row, (ids, each) in enumerate(zip(prompts, own, strict=True))
    ]
    tickets = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error
    return [[token for step in ticket.steps for token in step.ids] for ticket in tickets]
