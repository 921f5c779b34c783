"""Packed and cached attention against a naive one, sample by sample in float64."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_config, tiny_model
from paged_steps import Steps
from torch import Tensor

from lit_llama.model.attention.layout import Packed

HEADS = [(4, 4), (4, 2), (6, 1)]
WINDOWS = [None, 1, 4, 23, 24, 1000]


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None = None) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v for each sample and head on its own, in float64."""
    samples = []
    for sample in zip(*(x.double().split(list(lengths)) for x in (q, k, v)), strict=True):
        repeat = sample[0].shape[1] // sample[1].shape[1]
        heads = []
        for head in range(sample[0].shape[1]):
            query, key, value = sample[0][:, head], sample[1][:, head // repeat], sample[2][:, head // repeat]
            scores = query @ key.T / math.sqrt(query.shape[-1])
            hidden = torch.ones_like(scores).triu(1).bool()
            if window:
                hidden |= torch.ones_like(scores).tril(-window).bool()
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value)
        samples.append(torch.stack(heads, 1))
    return torch.cat(samples)


def random_qkv(tokens: int, heads: int, groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, count, 8, generator=generator) for count in (heads, groups, groups))
    return q, k, v


def many_lengths() -> list[list[int]]:
    """Fixed hard cases, then random ones."""
    draw = random.Random(0)
    fixed = [[1], [7], [1, 1, 1], [5, 5, 5], [1, 30], [30, 1], [10, 9, 9, 8], [30, 29, 1, 2, 28, 28]]
    return fixed + [[draw.randint(1, 24) for _ in range(draw.randint(1, 9))] for _ in range(24)]


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_packed_equals_naive_attention(heads: int, groups: int, window: int | None) -> None:
    """Catches samples that see each other, padding that comes back, heads paired with the wrong key, and a sliding
    window that is off by one or ends where a block of queries does."""
    for seed, lengths in enumerate(many_lengths()):
        q, k, v = random_qkv(sum(lengths), heads, groups, seed)
        found, wanted = Packed(lengths).attend(0, q, k, v, window), naive(q, k, v, lengths, window)
        torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=0, msg=str(lengths))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_gradients_of_packed_equal_naive_ones(heads: int, groups: int, window: int | None) -> None:
    """Catches gradients lost or counted twice on the way through padding or through the blocks of a window."""
    for seed, lengths in enumerate(many_lengths()[:16]):
        inputs = [x.requires_grad_() for x in random_qkv(sum(lengths), heads, groups, seed)]
        weight = torch.randn(sum(lengths), heads, 8, generator=torch.Generator().manual_seed(99))
        found = torch.autograd.grad((Packed(lengths).attend(0, *inputs, window) * weight).sum(), inputs)
        wanted = torch.autograd.grad((naive(*inputs, lengths, window) * weight.double()).sum(), inputs)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=str(lengths))


def test_positions_start_anew_in_every_sample() -> None:
    """Catches positions that run on over the packed row."""
    assert Packed([3, 1, 2]).position_ids.tolist() == [0, 1, 2, 0, 0, 1]


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    """Catches leaks through padding: wild values in one sample must not move any other by a bit."""
    lengths = [10, 9, 10, 9]
    q, k, v = random_qkv(sum(lengths), 4, 2, 0)
    before = Packed(lengths).attend(0, q, k, v).split(lengths)
    for x in (q, k, v):
        x[10:19] = 1e4 * torch.randn_like(x[10:19])
    after = Packed(lengths).attend(0, q, k, v).split(lengths)
    assert all(torch.equal(before[i], after[i]) for i in (0, 2, 3))
    assert not torch.equal(before[1], after[1])


def test_similar_lengths_share_a_block_and_others_do_not() -> None:
    """Catches the waste of padding a short sample to a long one, and one call a sample where one call is enough."""
    assert len(Packed([10, 10, 9]).blocks) == 1
    assert len(Packed([64, 2, 2]).blocks) == 2


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("heads", HEADS)
def test_cached_equals_naive_attention(heads: tuple[int, int], window: int | None) -> None:
    """Sequences of unequal lengths, fed in pieces of unequal lengths, one of them empty at times; catches a mask, a
    sliding window or a place in the cache that is off by one."""
    draw = random.Random(1)
    for seed in range(12):
        batch = draw.randint(1, 4)
        pieces = [[draw.randint(0, 6) for _ in range(batch)] for _ in range(4)]
        pieces = [[1] * batch, *(piece for piece in pieces if any(piece))]
        lengths = [sum(piece[row] for piece in pieces) for row in range(batch)]
        config = tiny_config(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
        cache = Steps(config, batch, max(lengths))
        sequences = [random_qkv(length, *heads, 100 * seed + row) for row, length in enumerate(lengths)]
        found: list[list[Tensor]] = [[] for _ in range(batch)]
        done = [0] * batch
        for piece in pieces:
            new = [
                torch.cat([sequences[row][part][done[row] : done[row] + piece[row]] for row in range(batch)])
                for part in range(3)
            ]
            for row, y in enumerate(cache.extend(piece).attend(0, *new, window).split(piece)):
                found[row].append(y)
            done = [a + b for a, b in zip(done, piece, strict=True)]
        for row, length in enumerate(lengths):
            wanted = naive(*sequences[row], [length], window)
            torch.testing.assert_close(torch.cat(found[row]).double(), wanted, atol=2e-6, rtol=0)


def test_a_window_that_does_not_bite_changes_nothing() -> None:
    """Catches the slower path taken where the whole sample fits into the window: its results differ in the last bit."""
    q, k, v = random_qkv(37, 4, 2, 0)
    assert torch.equal(Packed([20, 17]).attend(0, q, k, v, 20), Packed([20, 17]).attend(0, q, k, v))


def test_token_by_token_equals_all_at_once() -> None:
    """Catches positions or keys that are shifted between prompt and generation."""
    model, ids = tiny_model(), random_ids(24)
    cache = Steps(model.config, 1, 24)
    steps = torch.cat([model(token[None], cache.extend([1])) for token in ids])
    torch.testing.assert_close(steps, model(ids), atol=2e-5, rtol=0)


def test_sequences_of_unequal_lengths_do_not_disturb_each_other() -> None:
    """Catches a short sequence that attends to the unused places of the cache."""
    model, lengths = tiny_model(), [3, 17, 1]
    cache = Steps(model.config, 3, 20)
    samples = [random_ids(length + 2, seed) for seed, length in enumerate(lengths)]
    model(torch.cat([ids[:length] for ids, length in zip(samples, lengths, strict=True)]), cache.extend(lengths))
    for step in range(2):
        tokens = torch.stack([ids[length + step] for ids, length in zip(samples, lengths, strict=True)])
        logits = model(tokens, cache.extend([1, 1, 1]))
    for ids, found in zip(samples, logits, strict=True):
        torch.testing.assert_close(found, model(ids)[-1], atol=2e-5, rtol=0)


def test_going_back_forgets_what_comes_after() -> None:
    """Catches stale keys that are still seen after guesses that were wrong."""
    model, ids, others = tiny_model(), random_ids(10), random_ids(5, seed=3)
    cache = Steps(model.config, 1, 16)
    model(ids, cache.extend([10]))
    cache.lengths = [4]
    found = model(others, cache.extend([5]))
    torch.testing.assert_close(found, model(torch.cat([ids[:4], others]))[4:], atol=2e-5, rtol=0)
