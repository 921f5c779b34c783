"""Optimizers against torch's and bitsandbytes' own, their decay, their rates, and their state on disk."""

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from lit_llama.errors import ResourceError
from lit_llama.train import optim
from lit_llama.train.config import Optimizer, TrainConfig
from lit_llama.train.optim import build_optimizer, decay_groups, load_state_tensors, set_learning_rate, state_tensors

CPU = torch.device("cpu")
HERE: list[Any] = ["adamw", "adamw_8bit", "sgd"]


def parameters() -> list[nn.Parameter]:
    """One large enough for 8-bit moments, one that keeps float32."""
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((80, 64), (16, 4))]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """Steps with gradients that follow from the step alone; the parameters after them."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for parameter in held:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    return [parameter.detach().clone() for parameter in held]


@pytest.mark.parametrize("name", HERE)
def test_updates_are_those_of_the_library(name: Any) -> None:
    """Catches a setting that does not reach the optimizer: each of them differs from its default here."""
    import bitsandbytes

    config = TrainConfig(optimizer=name, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
    rest: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    adam = rest | {"betas": (0.8, 0.95), "eps": 1e-3}
    theirs = {
        "adamw": lambda p: torch.optim.AdamW(p, **adam),
        "adamw_8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, **adam),
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.8, **rest),
    }[name](parameters())
    for found, wanted in zip(
        train(build_optimizer(parameters(), config, CPU), range(5)), train(theirs, range(5)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_eight_bits_do_nearly_what_thirty_two_do() -> None:
    """Catches moments that are quantised away; and the state must be small, or nobody needs it."""
    exact, small = (build_optimizer(parameters(), TrainConfig(optimizer=name), CPU) for name in ("adamw", "adamw_8bit"))
    start = parameters()[0].detach()
    wanted, found = (train(optimizer, range(20))[0] - start for optimizer in (exact, small))
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.99
    moments = [value for name, value in state_tensors(small).items() if name in ("0.state1", "0.state2")]
    assert [value.dtype for value in moments] == [torch.uint8, torch.uint8]


@pytest.mark.parametrize("name", HERE)
def test_a_parameter_without_gradient_shrinks_by_rate_times_decay(name: Any) -> None:
    """Catches weight_decay that never arrives, as in lit-llama, and a library's own default in its place."""
    for decay in (0.0, 0.1):
        held = parameters()
        optimizer = build_optimizer(held, TrainConfig(optimizer=name, weight_decay=decay, beta1=0.0), CPU)
        set_learning_rate(optimizer, 0.5)
        for parameter in held:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for found, start in zip(held, parameters(), strict=True):
            torch.testing.assert_close(found.detach(), start.detach() * (1 - 0.5 * decay))


def test_norms_and_biases_do_not_decay() -> None:
    """Catches a vector among the matrices, a parameter left out or given twice, and a frozen one."""
    model = tiny_model(attention_bias=True).requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    named = list(model.named_parameters())
    decaying, still = decay_groups(named, 0.1)
    names = {parameter: name for name, parameter in named}
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[p] or names[p].endswith("bias") for p in still["params"])
    assert not any("norm" in names[p] or names[p].endswith("bias") for p in decaying["params"])
    both = [*decaying["params"], *still["params"]]
    assert len(set(both)) == len(both) == len(named) - 1


@pytest.mark.parametrize("name", HERE)
def test_a_group_learns_at_its_ratio(name: Any) -> None:
    """Catches a ratio that is lost on the way or multiplied again at every step."""
    a, b = parameters()
    optimizer = build_optimizer([{"params": [a]}, {"params": [b], "lr_ratio": 16.0}], TrainConfig(optimizer=name), CPU)
    for rate in (1e-3, 5e-4):
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate * 16]


@pytest.mark.parametrize("name", HERE)
def test_state_survives_the_disk(name: Any, tmp_path: Path) -> None:
    """Four steps, and two and two with a file between, end in the same bits; catches a moment, a scale or the count of
    steps that stays behind, and whatever safetensors cannot hold."""
    config = TrainConfig(optimizer=name, weight_decay=0.1)
    wanted = train(build_optimizer(parameters(), config, CPU), range(4))
    first = build_optimizer(parameters(), config, CPU)
    middle = train(first, range(2))
    save_file(state_tensors(first), tmp_path / "state.safetensors")
    second = build_optimizer([nn.Parameter(value) for value in middle], config, CPU)
    load_state_tensors(second, load_file(tmp_path / "state.safetensors"))
    found = train(second, range(2, 4))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    ours, theirs = (state_tensors(build) for build in (first, second))
    assert set(ours) == set(theirs)


def test_state_of_other_parameters_is_refused() -> None:
    """Catches state that is dropped in silence."""
    optimizer = build_optimizer(parameters(), TrainConfig(), CPU)
    with pytest.raises(ValueError, match=r"2\.exp_avg belongs to none of the 2 parameters"):
        load_state_tensors(optimizer, {"2.exp_avg": torch.zeros(3)})


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches paging that falls back in silence, and a missing library as a traceback."""
    with pytest.raises(ResourceError, match=r"paged_adamw_8bit .* use --train.optimizer adamw_8bit"):
        build_optimizer(parameters(), TrainConfig(optimizer="paged_adamw_8bit"), CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ResourceError, match=r"needed for --train.optimizer adamw_8bit: pip install 'lit_llama\[quantize\]'"
    ):
        build_optimizer(parameters(), TrainConfig(optimizer="adamw_8bit"), CPU)


@pytest.mark.parametrize("name", HERE)
def test_state_is_as_large_as_the_plan_says(name: Any) -> None:
    """Catches a plan that forgets a moment."""
    held = [nn.Parameter(torch.zeros(1000, 1000))]
    optimizer = build_optimizer(held, TrainConfig(optimizer=name), CPU)
    train(optimizer, range(1))
    size = sum(value.nbytes for value in state_tensors(optimizer).values())
    assert size / 1e6 == pytest.approx(optim.STATE_BYTES[name], rel=0.01)


def test_every_optimizer_is_tested() -> None:
    """A new one without tests."""
    assert {*HERE, "paged_adamw_8bit"} == set(get_args(Optimizer)) == set(optim.STATE_BYTES)
