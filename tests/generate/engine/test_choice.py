"""Tokens chosen by the kernels against those of the library's own operations, and the work that a step takes."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama.generate.engine import sampling
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.sampling import Sampler
from lit_llama.model.operators.kernels import compiled

pytestmark = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")
COMBINATIONS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in product((0.0, 0.3, 1.0, 3.0), (0, 1, 7, 300, 5000), (1.0, 0.999999, 0.9, 0.3), (0.0, 0.02, 1.0))
]
PENALTIES = [
    Sampling(temperature=t, repetition_penalty=r, presence_penalty=p, frequency_penalty=f)
    for t, r, p, f in product((0.0, 0.9), (1.0, 1.3, 0.7), (0.0, 0.6, -1.1), (0.0, 0.3, -0.7))
]


def logits_of(kind: str, count: int, vocabulary: int) -> Tensor:
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "peaked":
        return 5 * logits
    if kind == "rounded":  # in bfloat16, where many are equal
        return (2 * logits).bfloat16().float()
    if kind == "steps":  # of which each has many equals, and some that can never be drawn
        steps = logits.round()
        return steps.masked_fill(logits > 1.5, -torch.inf)
    if kind == "equal":  # with sums that are exactly a share of all
        return torch.zeros(count, vocabulary)
    if kind == "small":  # beside one token, others of hardly any probability
        return torch.cat([torch.full((count, 1), 30.0), logits[:, 1:]], 1)
    return logits / 3


def chosen(logits: Tensor, own: list[Sampling], *, tokens: int | None = None, position: int = 3) -> list[int]:
    sampler = Sampler(len(own), logits.shape[1], tokens=tokens)
    for slot, one in enumerate(own):
        sampler.set(slot, one, number=slot, prompt=[1, 2, 2, 5 + slot], made=[5, 5, 9])
    return sampler.sample(logits, range(len(own)), [position] * len(own)).ids.tolist()


@pytest.mark.parametrize("kind", ["peaked", "rounded", "steps", "equal", "small", "flat"])
def test_all_filters_draw_the_tokens_of_the_operations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """240 settings, 4 draws each. Catches: a tie that is cut, a bucket too early or too late, a nucleus of all tokens
    where top_k leaves a few, and a draw in another order than that of ids."""
    for vocabulary, tokens in ((4096, None), (1003, 990)):
        logits = logits_of(kind, len(COMBINATIONS), vocabulary)
        made = [chosen(logits, COMBINATIONS, tokens=tokens, position=i) for i in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "chooses", lambda scores: False)
            plain = [chosen(logits, COMBINATIONS, tokens=tokens, position=i) for i in range(2)]
        assert made == plain
        assert min(map(min, made)) >= 0 and max(map(max, made)) < (tokens or vocabulary)


def test_a_large_vocabulary_is_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size at which blocks are summed up first; bfloat16 logits, too."""
    own = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in product((0.7, 2.0), (0, 40), (1.0, 0.95))]
    logits = torch.cat([logits_of(kind, 2, 49_152) for kind in ("peaked", "flat", "rounded", "steps")])
    for given in (logits, logits.bfloat16()):
        made = [chosen(given, own, position=i) for i in range(8)]
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "chooses", lambda scores: False)
            assert made == [chosen(given, own, position=i) for i in range(8)]


def test_penalties_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a product that is added without being rounded, and a token's penalty at its neighbour."""
    logits = logits_of("peaked", len(PENALTIES), 1003)
    scores: list[Tensor] = []
    made_of = Sampler._scores

    def kept(self: Sampler, *arguments: Any) -> Tensor:
        scores.append(made_of(self, *arguments))
        return scores[-1]

    monkeypatch.setattr(Sampler, "_scores", kept)
    before = logits.clone()
    made = chosen(logits, PENALTIES)
    monkeypatch.setattr(sampling, "chooses", lambda scores: False)
    assert made == chosen(logits, PENALTIES)
    assert torch.equal(*scores) and torch.equal(logits, before) and not torch.equal(scores[0], logits)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_marked(bad: float) -> None:
    """Catches: a number that is none and passes as the smallest, wherever it stands; a row without any token left."""
    own = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3, top_p=0.9)]
    for place in (0, 17, 99):
        logits = logits_of("flat", 3, 100)
        logits[:, place] = bad
        assert chosen(logits, own) == [-1] * 3
        assert chosen(logits.bfloat16(), own) == [-1] * 3
    assert chosen(torch.full((3, 100), -torch.inf), own) == [-1] * 3
    assert all(token >= 0 for token in chosen(logits_of("flat", 3, 100), own))


def test_only_rows_that_draw_are_worked_on() -> None:
    """The numbers that operations make, counted: none for greedy rows, and three rows' worth for each that draws.

    Catches: a copy of all logits for the sake of one row, and a sort.
    """
    vocabulary, logits = 10_000, torch.randn(16, 10_000)

    class Counted(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            views = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in views:
                    Counted.made += x.numel()
            return out

    for drawing in (0, 1, 16):
        drawn = Sampling(temperature=0.8, top_k=40, top_p=0.9)
        sampler = Sampler(16, vocabulary)
        for slot in range(16):
            sampler.set(slot, drawn if slot < drawing else Sampling())
        sampler.sample(logits, range(16), [0] * 16)
        Counted.made = 0
        with Counted():
            sampler.sample(logits, range(16), [1] * 16)
        assert Counted.made <= 3 * drawing * vocabulary + 1000, drawing
