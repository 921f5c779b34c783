"""Mixed precision: what is stored in half gives the bits that autocast rounds to, and the loss is scaled."""

import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from lit_llama.device import Numerics
from lit_llama.errors import CheckpointError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import linear_weights, load_model
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss, linear_cross_entropy
from lit_llama.train.optim import overflowed

CPU = torch.device("cpu")
FULL = Numerics(device=CPU, linear=torch.float32, rest=torch.float32)


def mixed(half: torch.dtype, *, stored: bool) -> Numerics:
    """The mixed precision of a dtype; `stored` is ours, else all weights are in float32 as is usual."""
    linear = half if stored else torch.float32
    return Numerics(device=CPU, linear=linear, rest=torch.float32, product=half, scaled=half == torch.float16)


def step(numerics: Numerics, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and the flat gradient of the adapters."""
    model = tiny_model()
    names = linear_weights(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(numerics.linear if name in names else numerics.rest)
    adapted(model)
    ids = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(3))
    select = torch.arange(5, 40)
    loss = TokenLoss(model, numerics)(ids, [20, 13, 7], select, ids[select]) / len(select)
    (loss * scale).backward()
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return loss.detach(), torch.cat([gradient.flatten() / scale for gradient in gradients if gradient is not None])


def adapted(model: LLaMA) -> None:
    apply_lora(model, LoRAConfig())
    draw = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_give_the_bits_of_float32_under_autocast(half: torch.dtype) -> None:
    """Catches a weight that is rounded twice, or a norm, an embedding or the residual stream that falls to 16 bits."""
    (loss, gradient), (wanted_loss, wanted) = (step(mixed(half, stored=stored)) for stored in (True, False))
    assert torch.equal(loss, wanted_loss)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_mixed_is_close_to_float32(half: torch.dtype) -> None:
    """Catches a mixed path that computes something else; the scale of the loss must not matter."""
    loss, gradient = step(FULL)
    rough_loss, rough = step(mixed(half, stored=True), scale=1024.0)
    assert abs(rough_loss - loss) < 0.01 * loss
    assert torch.nn.functional.cosine_similarity(gradient, rough, dim=0) > 0.99
    assert rough.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, None])
def test_the_loss_of_our_own_under_autocast(half: torch.dtype, stored: torch.dtype | None) -> None:
    """Against torch's cross entropy in float64, with the head in float32 (tied) or in half; catches a custom function
    that autocast does not reach, and the gradient of a sure token that float16 takes for zero."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=draw).requires_grad_()
    weight = torch.randn(50, 32, generator=draw)
    weight[7] = hidden.detach()[0] * 0.45  # sure of this one: its probability is all but 1
    targets = torch.tensor([7, 1, 2, 3, 4, 5])
    with torch.autocast("cpu", half):
        found = linear_cross_entropy(hidden, weight.to(stored or half), targets)
    found.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    double = hidden.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(double @ weight.to(half).double().T, targets, reduction="sum")
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=0.02)
    assert double.grad is not None
    torch.testing.assert_close(hidden.grad.double(), double.grad, rtol=0.05, atol=0.02)


def test_an_overflow_halves_the_scale_and_is_no_failure() -> None:
    """A fake overflow, at every scale; catches a run that dies of the scale it began with, and one that goes on for
    ever on gradients that no scale repairs."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fine, bad = 1.0, math.inf
    for scale in (4.0, 2.0, 1.0):
        assert scaler.get_scale() == scale
        scaler.scale(parameter.sum()).backward()
        assert parameter.grad is not None
        parameter.grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        norm = parameter.grad.norm().item()
        assert overflowed(scaler, fine, norm) is (scale > 1)
        assert not overflowed(scaler, bad, norm) and not overflowed(scaler, fine, fine)
        scaler.update()
        optimizer.zero_grad()
    assert not overflowed(FULL.scaler(), fine, bad), "without a scale it is a failure"
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == 0.5 and all(type(value) in (int, float) for value in scaler.state_dict().values())


def test_a_mixed_model_is_loaded_in_two_dtypes(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an embedding rounded to half, its tied head torn off, and a weight that becomes infinite in silence."""
    model = load_model(tiny_folder, dtype=torch.float32, linear_dtype=torch.float16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float16 if "proj" in name else torch.float32), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight has values beyond float16; use --precision"):
        load_model(tmp_path, dtype=torch.float32, linear_dtype=torch.float16)
