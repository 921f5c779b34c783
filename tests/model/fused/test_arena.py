"""The memory that layers pass on from step to step."""

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LoRAConfig
from lit_llama.model.fused.layer import Arena, FusedLayer, fuse
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss

LIKE = torch.zeros(1)


def test_pieces_are_used_again() -> None:
    """Catches memory that grows from step to step, and pieces that overlap."""
    arena = Arena(3)
    first = [arena.take(LIKE, [1000])[0] for _ in range(3)]
    for number, piece in enumerate(first):
        piece.fill_(number)
    assert [piece[0].item() for piece in first] == [0, 1, 2]
    for piece in first:
        arena.give(piece)
    places = {piece.data_ptr() for piece in first}
    assert {arena.take(LIKE, [size])[0].data_ptr() for size in (900, 1000, 10)} == places


def test_parts_are_aligned_and_apart() -> None:
    """Catches parts that overlap, and vectors that cross lines of the cache: slower, with other bits at other sizes."""
    arena = Arena(2)
    for _ in range(2):
        _, parts = arena.take(LIKE, [7, 0, 65, 1])
        assert [part.numel() for part in parts] == [7, 0, 65, 1]
        for number, part in enumerate(parts):
            part.fill_(number)
        assert all(bool((part == number).all()) for number, part in enumerate(parts))
        assert all(part.data_ptr() % 64 == 0 for part in parts if part.numel())


def test_there_is_always_a_piece() -> None:
    """Catches a third layer of a model of two, and a larger batch while pieces of a smaller one are out."""
    arena = Arena(2)
    out = [arena.take(LIKE, [1000])[0] for _ in range(3)]
    assert len({piece.data_ptr() for piece in out}) == 3
    larger, _ = arena.take(LIKE, [10_000_000])
    assert larger.numel() >= 10_000_000
    for piece in (*out, larger):
        arena.give(piece)
    assert arena.take(LIKE, [10_000_000])[0].numel() >= 10_000_000


def model_of(leave: Any) -> LLaMA:
    model = tiny_model(num_hidden_layers=3)
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    fuse(model, leave)
    return model


def loss_of(model: LLaMA, lengths: list[int]) -> Tensor:
    ids = torch.arange(sum(lengths)) % 300
    select = torch.arange(len(ids) - 1)
    return TokenLoss(model)(ids, lengths, select, ids[1:])


@pytest.mark.parametrize("leave", ["none", "selective", "full"])
def test_gradients_do_not_depend_on_what_came_before(leave: Any) -> None:
    """Larger and smaller batches, evaluations between, two graphs at once, one that is dropped; catches a piece that is
    given to another layer while it is needed."""
    batches = [[30, 20], [90], [7], [80, 40, 11]]
    wanted = []
    for lengths in batches:
        model = model_of(leave)
        loss_of(model, lengths).backward()
        wanted.append([parameter.grad for parameter in lora_parameters(model)])
    model = model_of(leave)
    for lengths, gradients in zip(batches, wanted, strict=True):
        with torch.no_grad():
            loss_of(model, [33])
        loss_of(model, [12])  # never goes back
        losses = loss_of(model, lengths), loss_of(model, [50])
        for parameter in lora_parameters(model):
            parameter.grad = None
        losses[0].backward()
        for parameter, gradient in zip(lora_parameters(model), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
        losses[1].backward()


def test_what_is_passed_on_is_not_read_again() -> None:
    """Catches a second backward pass that computes with the numbers of another step, and says nothing."""
    model = model_of("none")
    loss = loss_of(model, [40])
    loss.backward(retain_graph=True)
    loss_of(model, [40]).backward()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_without_gradients_all_pieces_come_back() -> None:
    """Catches an evaluation that takes the pieces with it."""
    model = model_of("none")
    loss_of(model, [40]).backward()
    layer = model.model.layers[0]
    assert isinstance(layer, FusedLayer)
    before = {piece.data_ptr() for piece in layer.arena._free}
    with torch.no_grad():
        loss_of(model, [40])
    assert len(before) == 3 and {piece.data_ptr() for piece in layer.arena._free} == before
