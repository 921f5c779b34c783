"""Draws of the sampler: random numbers against numpy's generator, and frequencies against the distribution."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.sampling import Sampler, uniform

DRAWN = Sampling(temperature=1.0)


def random_logits(seed: int = 0, batch: int = 6, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed))


def draw(sampling: Sampling, logits: Tensor, count: int = 40, number: int = 0) -> list[int]:
    made = Sampler(1, logits.shape[1])
    made.set(0, sampling, number=number)
    slots = [0] * count
    return made.sample(logits[:1].expand(count, -1), slots, range(count)).ids.tolist()


def test_draws_depend_on_seed_number_and_position() -> None:
    """A seed that is ignored, answers to one prompt that are all alike, or a stream that begins anew at each token."""
    logits = random_logits()
    assert draw(DRAWN, logits) == draw(DRAWN, logits)
    others = [draw(replace(DRAWN, seed=3), logits), draw(DRAWN, logits, number=1), draw(DRAWN, logits, number=1 << 32)]
    assert len({tuple(ids) for ids in [draw(DRAWN, logits), *others]}) == 4
    assert len(set(draw(DRAWN, logits))) > 3


def test_random_numbers_are_philox() -> None:
    """Against a generator that starts at the beginning and runs up to the position: catches positions that repeat or
    overlap, and bits that get lost, on which stored answers depend."""
    for seed, number in ((1234, 0), ((1 << 63) - 1, (7 << 32) | 5)):
        for block in (0, 1, 3):
            generator = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))
            generator.advance(block << 64)
            wanted = np.random.Generator(generator).random(64)
            assert [uniform(seed, number, 64 * block + place) for place in range(64)] == wanted.tolist()
    first = Request([1], DRAWN, number=5).answer_number
    assert (first(0), first(7)) == (5, (7 << 32) | 5)


def test_the_global_generators_are_left_alone() -> None:
    """Draws that depend on, or disturb, whatever else is random in the process."""
    torch.manual_seed(0)
    np.random.seed(0)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    draw(DRAWN, random_logits())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[index, union-attr]


def test_frequencies_fit_the_distribution() -> None:
    """Draws from other probabilities than those computed, or a filtered token: chi-squared over 20,000 draws of a
    known distribution, of one answer and of the first tokens of many."""
    wanted = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    logits = 2 * torch.cat([wanted[:5].log(), torch.tensor([-9.0])])[None]
    own, count = Sampling(temperature=2.0, seed=5, top_k=5), 20_000
    many = Sampler(2000, 6)
    for slot in range(2000):
        many.set(slot, own, number=slot)
    across = [many.sample(logits.expand(2000, -1), range(2000), [p] * 2000).ids.tolist() for p in range(10)]
    for drawn in (draw(own, logits, count), [token for step in across for token in step]):
        found = torch.bincount(torch.tensor(drawn), minlength=6)
        assert found[5] == 0
        expected = count * wanted[:5]
        assert ((found[:5] - expected) ** 2 / expected).sum() < 18.47  # 99.9 % of true ones with 4 degrees of freedom


def test_neighbouring_draws_are_independent() -> None:
    """Random numbers of consecutive positions, answers or seeds that go together: chi-squared of pairs."""
    triples = [(seed, number, position) for seed in range(12) for number in range(12) for position in range(50)]
    for step in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 1, 0)):
        cells = np.zeros((4, 4))
        for triple in triples:
            near = tuple(a + b for a, b in zip(triple, step, strict=True))
            if min(near) >= 0:
                cells[int(4 * uniform(*triple)), int(4 * uniform(*near))] += 1
        expected = cells.sum() / 16
        assert ((cells - expected) ** 2 / expected).sum() < 37.7  # 99.9 % with 15 degrees of freedom


def test_the_last_random_number_stays_inside() -> None:
    """A number next to 1 that is rounded to the sum of all probabilities and finds the end of the vocabulary."""
    from lit_llama.generate.engine.sampling import draw as drawn

    few = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.0, 0.3, 0.0, 0.7]])
    numbers = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    assert drawn(few, numbers).tolist() == [2, 1]
    many = torch.zeros(2, 3000)
    many[0, 100:2900], many[1, 700:710] = torch.rand(2800).clamp(min=0.1), 0.1
    assert drawn(many, numbers).tolist() == [2899, 700]


def test_draws_from_many_tokens_are_those_of_the_formula() -> None:
    """A block too early or too late, or the wrong place in it: numpy finds the places of evenly spread numbers."""
    from lit_llama.generate.engine.sampling import draw as drawn

    chances = random_logits(3, 1, 5000).softmax(-1)
    numbers = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    cumulated = np.cumsum(chances[0].double().numpy())
    wanted = np.searchsorted(cumulated, numbers.numpy() * cumulated[-1], side="right")
    assert drawn(chances.expand(2000, -1), numbers).tolist() == wanted.tolist()
