"""Common beginnings of samples: found, laid out once, and the same loss and gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.neftune import add_noise
from lit_llama.model.config import LoRAConfig
from lit_llama.model.fused.layer import can_share, fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels
from lit_llama.text.dataset.batches import LEAST, Batch, beginnings, collate
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.train.loss import TokenLoss

Sample = tuple[np.ndarray, np.ndarray]
WITH, WITHOUT = list(range(100, 133)), [*range(100, 111), *range(200, 218)]
"""Two templates that begin alike, as Alpaca's with and without an input do."""


def sample(*ids: int, masked: int) -> Sample:
    values = np.array(ids, np.int32)
    labels = values.copy()
    labels[:masked] = IGNORE_INDEX
    return values, labels


def drawn(count: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        template = WITH if number % 3 == 0 else WITHOUT
        own = draw.integers(0, 90, draw.integers(2, 40)).tolist()
        found.append(sample(*template, *own, masked=len(template) + len(own) // 2))
    return found


def test_two_templates_are_two_beginnings() -> None:
    """Catches one short beginning for all, where two longer ones save more."""
    samples = drawn(9)
    groups = beginnings([ids for ids, _ in samples], [len(ids) - 1 for ids, _ in samples])
    assert sorted(groups) == sorted([(33, [0, 3, 6]), (29, [1, 2, 4, 5, 7, 8])])


def test_what_carries_a_loss_or_is_short_stays_with_its_sample() -> None:
    """Catches a trained token that is computed once and counted once."""
    ids = [*range(50), 1, 2]
    trained = [sample(*ids, masked=20), sample(*ids, masked=12), sample(*ids, masked=0)]
    batch = collate(trained, share=True)
    assert batch.parents == [-1, 0, 0, -1] and batch.lengths[0] == 11  # the place before the first trained token stays
    short = [sample(*range(LEAST), *own, masked=LEAST) for own in ([60, 61], [70, 71])]
    assert collate(short, share=True).parents == [-1, -1]


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=30), min_size=1, max_size=6), st.data())
def test_every_sample_can_be_put_together_again(rows: list[list[int]], data: st.DataObject) -> None:
    """Catches places that are lost, come twice, or change their labels."""
    samples = [sample(*row, masked=data.draw(st.integers(0, len(row)))) for row in rows]
    plain, batch = collate(samples), collate(samples, share=True)
    targets = np.full(len(batch.input_ids), IGNORE_INDEX, np.int64)
    targets[batch.select] = batch.targets
    starts = np.cumsum([0, *batch.lengths])
    parts = [(batch.input_ids[a:b], targets[a:b]) for a, b in pairwise(starts)]
    whole = [
        tuple(np.concatenate([parts[parent][side], part[side]]) if parent >= 0 else part[side] for side in (0, 1))
        for number, (part, parent) in enumerate(zip(parts, batch.parents, strict=True))
        if number not in batch.parents
    ]
    assert sorted((tuple(ids), tuple(labels)) for ids, labels in whole) == sorted(
        (tuple(ids[:-1]), tuple(labels[1:])) for ids, labels in samples
    )
    assert len(batch.targets) == len(plain.targets) and len(batch.input_ids) <= len(plain.input_ids)
    assert all(batch.parents[parent] == -1 for parent in batch.parents if parent >= 0)


def loss_of(model: LLaMA, batch: Batch) -> torch.Tensor:
    ids, select, targets = (torch.from_numpy(x) for x in (batch.input_ids, batch.select, batch.targets))
    found: torch.Tensor = TokenLoss(model)(ids, batch.lengths, select, targets, batch.parents)
    return found


def test_a_batch_is_filled_up_with_what_nobody_sees() -> None:
    """Catches padding that carries a loss or changes it."""
    model = tiny_model()
    for share in (False, True):
        batch = collate(drawn(4), share=share)
        padded = batch.padded(32)
        assert len(padded.input_ids) % 32 == 0 and 0 < padded.lengths[-1] < 32
        assert padded.padded(32) is padded and padded.targets is batch.targets
        with torch.no_grad():
            losses = [loss_of(model, each) for each in (batch, padded)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_loss_and_gradients_are_the_same() -> None:
    """Catches a gradient that does not reach a beginning from all of its samples."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    found = []
    for share in (False, True):
        model = tiny_model(num_hidden_layers=3)
        torch.manual_seed(1)
        apply_lora(model, LoRAConfig(r=4))
        for parameter in lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.05)
        fuse(model)
        batch = collate(drawn(12), share=share)
        loss = TokenLoss(model).of_batch(batch)
        loss.backward()
        found.append((len(batch.input_ids), loss.item(), [p.grad for p in lora_parameters(model)]))
    (tokens, loss, gradients), (fewer, shared_loss, shared) = found
    assert fewer == tokens - 3 * 33 - 7 * 29
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for ours, wanted in zip(shared, gradients, strict=True):
        assert ours is not None and wanted is not None and (ours - wanted).norm() < 1e-5 * wanted.norm()


def test_what_is_drawn_for_each_token_is_not_shared() -> None:
    """Catches dropout and noise that samples would have in common, and positions that depend on a sample's length."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")

    def fused(lora: LoRAConfig, alpha: float = 0.0) -> bool:
        model = tiny_model()
        apply_lora(model, lora)
        add_noise(model, alpha)
        fuse(model)
        return can_share(model)

    assert fused(LoRAConfig())
    assert not fused(LoRAConfig(dropout=0.1)) and not fused(LoRAConfig(), alpha=5.0)
    assert not can_share(tiny_model())
