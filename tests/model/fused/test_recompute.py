"""Activation checkpointing: the same gradients to the last bit, out of less memory."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_model

from lit_llama.model.adapters.lora import adapters, apply_lora, lora_parameters
from lit_llama.model.config import LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.model.recompute import recompute_activations
from lit_llama.train.config import Checkpointing
from lit_llama.train.loss import TokenLoss

MODES: list[Any] = list(get_args(Checkpointing))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(mode: Checkpointing, **lora: Any) -> LLaMA:
    model = tiny_model(num_hidden_layers=3)
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4, **lora))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    recompute_activations(model, mode)
    return model.train()


def step(model: LLaMA) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes kept for the backward pass beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 384, (60,), generator=torch.Generator().manual_seed(3))
    select = torch.arange(5, 60)
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = TokenLoss(model)(ids, [30, 20, 10], select, ids[select])
    loss.backward()
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    return loss.detach(), [gradient for gradient in gradients if gradient is not None], sum(kept.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "up_proj"])
def test_gradients_are_the_same_bits(mode: Any, dropout: float, targets: str) -> None:
    """Catches dropout that is drawn anew, a layer that is left out, and an adapter that the copy does not share."""
    wanted_loss, wanted, _ = step(adapted("none", dropout=dropout, target_modules=targets))
    loss, found, _ = step(adapted(mode, dropout=dropout, target_modules=targets))
    assert torch.equal(loss, wanted_loss)
    assert len(found) == len(wanted) > 0 and any(gradient.any() for gradient in wanted)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_each_mode_keeps_less() -> None:
    """Catches checkpointing that is switched on and does nothing; full keeps about one (T, C) for each layer."""
    none, selective, full = (step(adapted(mode))[2] for mode in MODES)
    assert full < 0.35 * none and full < selective < 0.75 * none


@pytest.mark.parametrize("mode", MODES)
def test_names_and_modes_stay(mode: Any) -> None:
    """Catches an adapter that is saved under another name, dropout that goes on in evaluation, and random numbers that
    are drawn twice: what comes after the step must see the same state of the generator."""
    plain, model = adapted("none"), adapted(mode, dropout=0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in adapters(model)] == [name for name, _ in adapters(plain)]
    ids = torch.arange(20)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), plain.eval()(ids))
    assert not any(module.training for module in model.modules())
    after = []
    for each in (adapted("none", dropout=0.5), adapted(mode, dropout=0.5)):
        step(each)
        after.append(torch.rand(4))
    assert torch.equal(*after)
