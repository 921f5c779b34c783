"""What an optimizer remembers, out to a file and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_llama.errors import NumericalError
from lit_llama.train.optim import OPTIMIZER_FILE, restore_optimizer, write_optimizer


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer_of(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Two groups in another order than the model's, and one parameter that is not trained."""
    first, second = list(model.children())
    groups = [{"params": [*second.parameters()], "weight_decay": 0.1}, {"params": [first.weight]}]
    return kind(groups, lr=0.1)  # type: ignore[call-arg]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop])
def test_a_new_optimizer_goes_on_as_the_old_one(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    """Catches moments given to the wrong parameter, a count of steps that starts anew, and what is no tensor lost."""
    model = model_of()
    optimizer = optimizer_of(model, kind)
    for seed in range(3):
        step(model, optimizer, seed)
    write_optimizer(model, optimizer, tmp_path)
    again = model_of(seed=9)
    again.load_state_dict(model.state_dict())
    restored = optimizer_of(again, kind)
    restore_optimizer(again, restored, tmp_path)
    (tmp_path / OPTIMIZER_FILE).write_bytes(b"")  # nothing may be read from it later
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, restored, seed)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_has_the_names_of_the_parameters(tmp_path: Path) -> None:
    """Catches numbers in place of names, which mean other parameters as soon as one is added."""
    model = model_of()
    optimizer = optimizer_of(model, torch.optim.AdamW)
    step(model, optimizer, 0)
    write_optimizer(model, optimizer, tmp_path)
    names = {
        f"{name}.{key}" for name in ("0.weight", "1.weight", "1.bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert set(load_file(tmp_path / OPTIMIZER_FILE)) == names


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """Catches a state that poisons every run that goes on from it."""
    model = model_of()
    optimizer = optimizer_of(model, torch.optim.AdamW)
    step(model, optimizer, 0)
    optimizer.state[optimizer.param_groups[1]["params"][0]]["exp_avg_sq"][0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"exp_avg_sq of 0\.weight is not finite"):
        write_optimizer(model, optimizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
