"""The product of a layer with an adapter, against the plain formula under autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.adapters.low_rank import lora_product


def plain(x: Tensor, dropped: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """As it is written down."""
    return F.linear(x, weight) + scale * F.linear(F.linear(x if dropped is None else dropped, a), b)


def drawn(dtype: torch.dtype = torch.float32, size: float = 0.3) -> list[Tensor]:
    """x, W, A, B; the last two are float32."""
    draw = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(shape, generator=draw) for shape in ((70, 24), (40, 24), (3, 24), (40, 3)))
    return [x.to(dtype).requires_grad_(), (weight / 5).to(dtype), (a / 5).requires_grad_(), (size * b).requires_grad_()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_output_and_gradients_are_autograds(dropout: float) -> None:
    """Catches a scale left out, a gradient of the wrong factor, and dropout on the base's path."""
    x, weight, a, b = drawn()
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= dropout).float() / (1 - dropout)
    dy = torch.randn(70, 40, generator=torch.Generator().manual_seed(2))
    found = []
    for product in (lora_product, plain):
        y = product(x, x * mask if dropout else None, weight, a, b, 2.5)
        found.append((y, *torch.autograd.grad(y, (x, a, b), dy)))
    for ours, wanted in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_small_update_is_not_rounded_away() -> None:
    """An update of a thousandth of what it is added to, in bfloat16, whose last bit is worth 1/256: in the mean over
    many outputs it has to arrive. Catches a sum with what is rounded already."""
    x, weight, a, b = drawn(torch.bfloat16, size=0.004)
    base, update = F.linear(x, weight).float(), plain(x, None, 0 * weight, a.bfloat16(), b.bfloat16(), 1.0).float()
    large = base.abs() > 300 * update.abs()  # where half of the last bit is more than the update
    assert large.float().mean() > 0.3
    arrived = {
        name: ((y.float() - base)[large] @ update[large] / update[large].square().sum()).item()
        for name, y in (
            ("ours", lora_product(x, None, weight, a, b, 1.0)),
            ("in inference", torch.inference_mode()(lora_product)(x, None, weight, a, b, 1.0)),
            ("naive", (base.bfloat16() + update.bfloat16())),
        )
    }
    assert arrived["naive"] < 0.7 < 0.9 < arrived["ours"] < 1.1, arrived
    assert 0.9 < arrived["in inference"] < 1.1, arrived


def test_inference_computes_what_training_does() -> None:
    """Catches a scale that is left out, or taken twice, where no gradient is asked for."""
    x, weight, a, b = drawn()
    y = torch.inference_mode()(lora_product)(x, None, weight, a, b, 0.7)
    torch.testing.assert_close(y, lora_product(x, None, weight, a, b, 0.7).detach(), atol=1e-5, rtol=1e-5)


def test_the_base_gets_no_gradient_and_the_first_layer_none_at_all() -> None:
    """Catches work for a gradient that nobody asks for."""
    x, weight, a, b = drawn()
    y = lora_product(x.detach(), None, weight, a, b, 1.0)
    y.sum().backward()
    assert weight.grad is None and a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32


def test_under_autocast_everything_is_half() -> None:
    """Catches a float32 product in mixed precision, and inputs of two dtypes."""
    x, weight, a, b = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_product(x, None, weight.bfloat16(), a, b, 1.0)
    assert y.dtype == torch.bfloat16
    for gradient in torch.autograd.grad(y.float().sum(), (x, a, b)):
        assert gradient.dtype == torch.float32
