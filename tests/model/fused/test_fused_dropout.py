"""Dropout of adapters in fused layers, against plain layers that drop the same values."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.low_rank import LoRALinear, LoRAOnQuantized
from lit_llama.model.config import LINEARS, LoRAConfig, Quantization
from lit_llama.model.fused.joined import Dropped, Joined
from lit_llama.model.fused.layer import FusedLayer, can_share, fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels, pointwise
from lit_llama.model.quantize import quantized, through
from lit_llama.train.loss import TokenLoss

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
LENGTHS = [130, 73, 47, 10, 1]
P = 0.3
SEED = torch.tensor(5)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled kernels, and as if there were no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    yield request.param


def adapted(
    method: Quantization | None = None, *, dense: bool = False, dtype: torch.dtype = torch.float32, **lora: Any
) -> LLaMA:
    """A small model whose adapters change something; a quantised base may be in full what quantisation leaves."""
    model = tiny_model(num_hidden_layers=3)
    for name, module in list(model.named_modules()):
        if method and isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            if dense:
                module.weight.data = through(module.weight.data, method)
            else:
                model.set_submodule(name, quantized(module.weight.data, module.bias, method))
    torch.manual_seed(1)
    model = model if method and not dense else model.to(dtype)
    apply_lora(model, LoRAConfig(**{"r": 4, "dropout": P} | lora))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model: LLaMA, seed: int = 7) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the packed samples."""
    device = model.lm_head.weight.device
    ids = torch.randint(0, 384, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).to(device)
    select = torch.arange(5, len(ids), device=device)
    torch.manual_seed(seed)
    loss = TokenLoss(model)(ids, LENGTHS, select, ids[select])
    loss.backward()
    found = [parameter.grad for parameter in lora_parameters(model)]
    for parameter in lora_parameters(model):
        parameter.grad = None
    return loss.detach().cpu().double(), [gradient.cpu().double() for gradient in found if gradient is not None]


class Given(nn.Module):
    """Dropout whose mask is known."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask, self.p = mask, P

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the mask."""
        return x * self.mask.to(x.dtype)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Joined, Dropped]]:
    """What the forward passes of a test draw, in order."""
    found: list[tuple[Joined, Dropped]] = []
    draw = Joined.draw

    def recorded(joined: Joined) -> Dropped:
        found.append((joined, draw(joined)))
        return found[-1][1]

    monkeypatch.setattr(Joined, "draw", recorded)
    return found


def give(plain: LLaMA, model: LLaMA, drawn: list[tuple[Joined, Dropped]], device: str) -> list[Tensor]:
    """Let each adapter of `plain` drop what its twin in `model` has dropped; gives the masks."""
    seeds = {id(linear): draw for joined, draws in drawn for linear, draw in zip(joined.updates, draws, strict=True)}
    masks, twins = [], dict(plain.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAOnQuantized):
            mask = torch.ones(sum(LENGTHS), module.lora_A.shape[1], device=device)
            pointwise.drop(mask, mask.clone(), *seeds[id(module)])
            masks.append(mask.cpu())
            twins[name].dropout = Given(mask.cpu())
    return masks


SETTINGS: list[dict[str, Any]] = [
    {},
    {"target_modules": "q_proj,v_proj,down_proj"},
    {"rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2}},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leave", ["none", "selective", "full"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_autograds(
    way: str, settings: dict[str, Any], leave: Any, device: str, drawn: list[tuple[Joined, Dropped]]
) -> None:
    """Against float64; catches a mask that is another one in the backward pass, that reaches the base, that is left
    out of a gradient, or that two adapters have in common."""
    model = adapted(**settings).to(device)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    exact, usual = adapted(dtype=torch.float64, **settings), adapted(**settings)
    masks = give(exact, model, drawn, device)
    give(usual, model, drawn, device)
    (wanted_loss, wanted), (_, plain) = step(exact), step(usual)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert len(found) == len(wanted) >= 18
    for ours, theirs, want in zip(found, plain, wanted, strict=True):
        assert (ours - want).norm() < max(1e-5, 2 * (theirs - want).norm() / want.norm()) * want.norm()
    assert all(((mask == 0) | ((mask - 1 / (1 - P)).abs() < 1e-6)).all() for mask in masks)
    for mask in masks:
        assert abs((mask == 0).double().mean() - P) < 4 * (P * (1 - P) / mask.numel()) ** 0.5
    narrow = [mask for mask in masks if mask.shape == masks[0].shape]
    assert not any(torch.equal(first, second) for i, first in enumerate(narrow) for second in narrow[:i])


@pytest.mark.parametrize("leave", ["none", "full"])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_gradients_on_a_quantised_base(method: Quantization, leave: Any, drawn: list[tuple[Joined, Dropped]]) -> None:
    """Against float64; catches an update that is added with and without its mask."""
    pytest.importorskip("bitsandbytes")
    model = adapted(method)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    exact = adapted(method, dense=True, dtype=torch.float64)
    give(exact, model, drawn, "cpu")
    wanted_loss, wanted = step(exact)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


def test_eight_bits_drop_as_the_plain_layers_do(drawn: list[tuple[Joined, Dropped]]) -> None:
    """But where a value falls to the other side of a tie; catches a mask on what is rounded."""
    model, plain = adapted("fp8"), adapted("fp8")
    assert fuse(model) == 3
    loss, found = step(model)
    give(plain, model, drawn, "cpu")
    wanted_loss, wanted = step(plain)
    torch.testing.assert_close(loss, wanted_loss, rtol=2e-3, atol=0)
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (found, wanted))
    assert (ours - theirs).norm() / theirs.norm() < 0.1


def test_in_bfloat16_it_is_no_less_exact_than_autograd(drawn: list[tuple[Joined, Dropped]]) -> None:
    """Catches an update that is rounded away."""
    model = adapted(dtype=torch.bfloat16)
    fuse(model)
    _, ours = step(model)
    exact, usual = adapted(), adapted(dtype=torch.bfloat16)
    give(exact, model, drawn, "cpu")
    give(usual, model, drawn, "cpu")
    (_, wanted), (_, plain) = step(exact), step(usual)

    def off(found: list[Tensor]) -> Tensor:
        pairs = zip(found, wanted, strict=True)
        return torch.stack([(got - want).norm() / want.norm() for got, want in pairs])

    assert off(ours).mean() < 1.1 * off(plain).mean() and off(ours).max() < 0.05


@pytest.mark.parametrize("leave", ["none", "selective", "full"])
def test_each_pass_draws_anew_and_a_seed_repeats_it(way: str, leave: Any) -> None:
    """Catches a mask that stays, one that torch's seed does not reach, and gradients that depend on what is kept."""
    model, kept = adapted(), adapted()
    fuse(model, leave)
    fuse(kept)
    first, again, other, wanted = step(model), step(model), step(model, seed=8), step(kept)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert all(map(torch.equal, first[1], again[1])) and not any(map(torch.equal, first[1], other[1]))
    assert torch.equal(first[0], wanted[0]) and all(map(torch.equal, first[1], wanted[1]))


def test_an_evaluation_drops_nothing_and_draws_nothing() -> None:
    """Its bits are those of a model without dropout, in training, too; catches dropout in a test loss."""
    losses = []
    for dropout in (P, 0.0):
        model = adapted(dropout=dropout).eval()
        fuse(model)
        torch.manual_seed(7)
        wanted = torch.rand(3)
        losses.append(step(model))
        assert torch.equal(torch.rand(3), wanted)
    model = adapted(dropout=0.0)
    fuse(model)
    for other in (losses[1], step(model)):
        assert torch.equal(losses[0][0], other[0]) and all(map(torch.equal, losses[0][1], other[1]))


def test_samples_share_a_beginning_only_where_nothing_is_dropped() -> None:
    """Catches a mask that several samples have in common, and an evaluation that computes a beginning for each."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    model = adapted()
    assert fuse(model) == 3 and all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    assert not can_share(model) and can_share(model.eval()) and not can_share(model.train())


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_what_is_dropped_looks_drawn(way: str, p: float) -> None:
    """Of rows, columns and seeds; catches a hash that repeats itself along any of them."""
    rows, columns = 512, 133
    masks = []
    for seed in (0, 1, (3 << 32) + 2, (1 << 62) - 1):
        out = torch.empty(rows, columns + 3)[:, :columns]
        pointwise.drop(out, torch.ones(rows, columns), torch.tensor(seed), p)
        masks.append((out == 0).double() - p)
        assert ((out == 0) | ((out - 1 / (1 - p)).abs() < 1e-6)).all()
    variance, flat = p * (1 - p), [mask.flatten() for mask in masks]
    for mask, values in zip(masks, flat, strict=True):
        assert values.mean().abs() < 4.5 * (variance / values.numel()) ** 0.5
        assert ((mask.mean(0) ** 2).mean() * rows / variance - 1).abs() < 0.8
        assert ((mask.mean(1) ** 2).mean() * columns / variance - 1).abs() < 0.4
        for shift in (1, 2, 8, 16, 64):  # places that are near each other
            for near in ((mask[shift:] * mask[:-shift]), (mask[:, shift:] * mask[:, :-shift])):
                assert near.mean().abs() < 4.5 * variance / near.numel() ** 0.5
    for i, first in enumerate(flat):
        assert all((first * second).mean().abs() < 4.5 * variance / len(first) ** 0.5 for second in flat[:i])


def test_what_is_dropped_depends_on_the_place_alone(way: str) -> None:
    """Catches a mask of threads, of strides, of the dtype, and of adding in place."""
    x = torch.randn(67, 90, generator=torch.Generator().manual_seed(2))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(torch.empty(67, 96)[:, :90])
            pointwise.drop(found[-1], x, SEED, P)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    added, inside = x.clone(), x.clone()
    pointwise.drop(added, x, SEED, P, add=True)
    pointwise.drop(inside, inside, SEED, P)
    torch.testing.assert_close(added, x + found[0])
    assert torch.equal(inside, found[0])
    torch.testing.assert_close(found[0], torch.where(found[0] == 0, 0.0, x / (1 - P)))
    half = torch.empty(67, 90, dtype=torch.bfloat16)
    pointwise.drop(half, x.bfloat16(), SEED, P)
    assert torch.equal(half == 0, found[0] == 0)
