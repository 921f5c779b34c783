"""Choosing the next token.

Shapes: B sequences, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order top_k, top_p, as in transformers.

    Args:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest most likely tokens that together have this probability.
        seed: Of the draws; every sequence has its own stream, so that batching changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature is {self.temperature}, expected 0 (most likely token) or more")
        if self.top_k < 0:
            raise UserError(f"--top_k is {self.top_k}, expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}, expected 0 < top_p <= 1")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed is {self.seed}, expected 0 to {(1 << 63) - 1}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution to draw from at a temperature above 0: (B, V) -> (B, V) in float32."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of the more likely ones
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits.softmax(-1)


def generators(numbers: Iterable[int], sampling: Sampling) -> list[torch.Generator]:
    """A stream of random numbers for each sequence, from (seed, number of the sequence)."""
    return [torch.Generator().manual_seed(sampling.seed + number) for number in numbers]


def choose(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """The next token of each sequence: (B, V) -> B ids."""
    if sampling.temperature == 0:
        return [int(i) for i in logits.argmax(-1).tolist()]
    chances = probabilities(logits, sampling).cpu()
    drawn = [torch.multinomial(row, 1, generator=stream) for row, stream in zip(chances, streams, strict=True)]
    return [int(token) for token in drawn]
