"""Fused layers with what plain LoRA does not have: magnitudes, norms and weights that train, products in 16 bits.

Shapes: T tokens.
"""

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.low_rank import DoRALinear
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LoRAConfig, Quantization
from lit_llama.model.fused.layer import FusedLayer, fuse
from lit_llama.model.fused.outputs import Magnitudes
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels
from lit_llama.model.quantize import QuantizedLinear, quantized
from lit_llama.train.loss import TokenLoss

LENGTHS = [130, 73, 47, 10, 1]
QWEN3: dict[str, Any] = {"model_type": "qwen3", "use_qk_norm": True}
BIASES: dict[str, Any] = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
FULL = "full"
DORA = {"use_dora": True}
NORMS = {"modules_to_save": "norm"}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dora": (DORA, {}),
    "dora, biases": (DORA, BIASES),
    "dora, norms of heads": (DORA, QWEN3),
    "dora, few targets": (DORA | {"target_modules": "q_proj,up_proj,o_proj"}, {}),
    "dora, ranks": (DORA | {"rank_pattern": {"q_proj": 9}, "use_rslora": True}, {}),
    "rslora": ({"use_rslora": True}, {}),
    "norms": (NORMS, {}),
    "norms of heads, too": (NORMS | {"target_modules": "v_proj"}, QWEN3),
    "full": (FULL, {}),
    "full, biases": (FULL, BIASES),
    "full, norms of heads": (FULL, QWEN3),
    "full, a window": (FULL, {"sliding_window": 20}),
    "embedding and head": ({"target_modules": "q_proj,embed_tokens,lm_head"}, {}),
    "whole embedding and head": ({"modules_to_save": "embed_tokens,lm_head"}, {}),
}


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as if there were no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


def model_of(option: str, dtype: torch.dtype = torch.float32, **more: Any) -> LLaMA:
    """A small model whose adapters and norms change something."""
    lora, settings = OPTIONS[option]
    model = tiny_model(**settings, num_hidden_layers=3).to(dtype)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.data.copy_(torch.rand(len(module.weight)) * 2 - 0.5)  # the same in every dtype
    if lora == FULL:
        return model.requires_grad_(True).train()
    apply_lora(model, LoRAConfig(r=4, **lora, **more))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("magnitude"):
            parameter.data.mul_(torch.rand(len(parameter)) + 0.5)
    return model.train()


def step(model: LLaMA, product: torch.dtype | None = None, factor: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the packed samples, in float64."""
    ids = torch.randint(0, 384, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    select = torch.arange(5, len(ids))
    with torch.autocast("cpu", product or torch.bfloat16, enabled=product is not None):
        loss = TokenLoss(model)(ids, LENGTHS, select, ids[select])
    (loss * factor).backward()
    found = {name: p.grad.double() / factor for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach().double(), found


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of each gradient."""
    assert found.keys() == wanted.keys() and len(wanted) > 2
    return {name: ((found[name] - want).norm() / want.norm()).item() for name, want in wanted.items()}


@pytest.mark.parametrize(
    ("option", "leave"), [*((option, "none") for option in OPTIONS), ("dora, biases", "selective"), ("full", "full")]
)
def test_gradients_are_those_in_float64(option: str, leave: Any) -> None:
    """Catches a term of any gradient that is left out, and a weight that trains and gets none."""
    wanted_loss, wanted = step(model_of(option, torch.float64))
    _, autograds = step(model_of(option))
    model = model_of(option)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    usual = distances(autograds, wanted)
    for name, off in distances(found, wanted).items():
        assert off < max(1e-5, 2 * usual[name]), f"{name} is off by {off:.1e}, autograd's by {usual[name]:.1e}"


@pytest.mark.parametrize(
    ("option", "leave"),
    [("dora, biases", "selective"), ("norms of heads, too", "none"), ("embedding and head", "full")],
)
def test_weights_that_are_to_be_spread_are_not_moved(option: str, leave: Any) -> None:
    """And each is read when it is multiplied with: its values and its place are others in every pass. Catches a matrix
    that holds the weights of the pass before, columns of one layer in those of another, and an update that is lost."""
    _, wanted = step(model_of(option, torch.float64))
    model = model_of(option)
    assert fuse(model, leave, spread=True) == 3
    for name, parameter in model_of(option).named_parameters():  # the same values, elsewhere
        if name.endswith("proj.weight"):
            model.get_parameter(name).data = parameter.data
    assert max(distances(step(model)[1], wanted).values()) < 1e-5


@pytest.mark.parametrize(
    "option", ["dora, biases", "norms of heads, too", "full, norms of heads", "embedding and head"]
)
def test_in_bfloat16_they_are_no_less_exact_than_autograds(option: str) -> None:
    """Catches a sum in bfloat16, and a factor near 1 that is rounded to it."""
    _, exact = step(model_of(option))
    _, plain = step(model_of(option, torch.bfloat16))
    model = model_of(option, torch.bfloat16)
    fuse(model)
    ours, usual = (torch.tensor([*distances(each, exact).values()]) for each in (step(model)[1], plain))
    assert ours.mean() < 1.1 * usual.mean() and ours.max() < max(0.05, 1.2 * usual.max().item())


def mixed(option: str, dtype: torch.dtype) -> LLaMA:
    """As a run in mixed precision holds it: what is frozen and linear in 16 bits, all else in float32."""
    model = model_of(option, torch.bfloat16).float()  # with values that 16 bits hold
    if OPTIONS[option][0] != FULL:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and "proj" in name:
                parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize(
    ("option", "dtype", "leave"),
    [
        ("dora, biases", torch.bfloat16, "none"),
        ("dora, biases", torch.float16, "selective"),
        ("norms of heads, too", torch.float16, "none"),
        ("full, biases", torch.bfloat16, "selective"),
        ("full, norms of heads", torch.bfloat16, "full"),
        ("full, norms of heads", torch.float16, "none"),
    ],
    ids=str,
)
def test_products_in_sixteen_bits_are_no_less_exact_than_autocasts(
    way: str, option: str, dtype: torch.dtype, leave: Any
) -> None:
    """Catches a stream that is rounded, an angle in 16 bits, and weights that are not taken over."""
    factor = 2.0**-4 if dtype == torch.float16 else 1.0
    _, exact = step(mixed(option, torch.float32))
    loss, plain = step(mixed(option, dtype), dtype, factor)
    model = mixed(option, dtype)
    assert fuse(model, leave, dtype) == 3
    layer = model.model.layers[0]
    assert isinstance(layer, FusedLayer) and layer.dtype == torch.float32
    assert all(joined.dtype == dtype for joined in layer.joined)
    found = step(model, dtype, factor)
    torch.testing.assert_close(found[0], loss, rtol=2e-3, atol=0)
    ours, usual = (torch.tensor([*distances(each, exact).values()]) for each in (found[1], plain))
    near = 1.25 if "dora" in option else 1.1  # what a factor of a row multiplies is float32 in plain layers
    assert ours.mean() < near * usual.mean() and ours.max() < max(0.05, 1.2 * usual.max().item())


@pytest.mark.parametrize("option", ["full", "rslora"])
def test_a_stream_keeps_what_products_cannot_hold(option: str) -> None:
    """Catches a residual that goes through 16 bits on its way from layer to layer."""
    model = mixed(option, torch.bfloat16)
    fuse(model, "none", torch.bfloat16)
    layer, x = model.model.layers[0], torch.full((1, 64), 1.0)
    x[0, 3] = 1 + 2**-14
    with torch.no_grad():
        for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
            parameter.zero_()
        rotation = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
        assert torch.equal(layer(x, rotation, Packed([1])), x)


def test_beyond_float16_gradients_are_not_finite() -> None:
    """As autocast's are, so that the scaler skips the step; catches a gradient that is cut off at the largest."""
    model = mixed("rslora", torch.float16)
    fuse(model, "none", torch.float16)
    _, found = step(model, torch.float16, 2.0**40)
    assert not all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("method", ["nf4", "int8", "fp8"])
def test_magnitudes_on_a_quantised_base(method: Quantization) -> None:
    """Against the plain layers; catches lengths of other weights than those that are multiplied with."""
    if method != "fp8":
        pytest.importorskip("bitsandbytes")

    loss, wanted = step(on_quantised(method, DORA))
    model = on_quantised(method, DORA)
    assert fuse(model) == 3
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    found = step(model)
    torch.testing.assert_close(found[0], loss, rtol=2e-3 if method == "fp8" else 1e-5, atol=0)
    assert max(distances(found[1], wanted).values()) < (0.3 if method == "fp8" else 1e-4)


def test_a_quantised_base_is_multiplied_in_sixteen_bits() -> None:
    """Catches weights that are unpacked to the stream's numbers."""
    pytest.importorskip("bitsandbytes")
    _, exact = step(on_quantised("nf4", {}))
    loss, plain = step(on_quantised("nf4", {}), torch.bfloat16)
    model = on_quantised("nf4", {})
    assert fuse(model, "none", torch.bfloat16) == 3
    found = step(model, torch.bfloat16)
    torch.testing.assert_close(found[0], loss, rtol=2e-3, atol=0)
    ours, usual = (torch.tensor([*distances(each, exact).values()]) for each in (found[1], plain))
    assert ours.mean() < 1.1 * usual.mean()


def on_quantised(method: Quantization, lora: dict[str, Any]) -> LLaMA:
    """A small model with biases, its linear layers quantised, and adapters that change something."""
    model = tiny_model(num_hidden_layers=3, attention_bias=True)
    for name, module in list(model.named_modules()):
        if name.endswith("proj"):
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, quantized(module.weight.detach(), module.bias, method))
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4, **lora))
    for parameter in lora_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()


def test_lengths_are_those_of_the_rows() -> None:
    """Of updates of any size, to float32's last digits; catches a term of the square, and one that cancels."""
    torch.manual_seed(0)
    for size in (1e-4, 0.1, 3.0):
        linear = DoRALinear(nn.Linear(40, 24, bias=False), 5, 1.7)
        weight = linear.base_layer.weight.detach()
        linear.lora_B.data.normal_(std=size)
        magnitudes = Magnitudes([(linear, slice(0, 24), slice(0, 5))], weight)
        magnitudes.refresh(weight @ linear.lora_A.detach().t())
        direction = weight.double() + 1.7 * (linear.lora_B.double() @ linear.lora_A.double())
        wanted = linear.magnitude.double() / direction.norm(dim=1)
        x = torch.ones(3, 24)
        torch.testing.assert_close(magnitudes.times(x).double(), wanted.detach().expand(3, 24), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_under_autocast_are_float32(held: torch.dtype) -> None:
    """Against float64, of fused layers and of plain ones, as PEFT adds and measures rows in float32. Catches W + s B A
    rounded to the 16 bits of the products, and lengths of a matrix that is filled later."""
    for fused in (True, False):
        model = model_of("dora")
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and "proj" in name:
                parameter.data = parameter.data.bfloat16().to(held)
        if fused:
            assert fuse(model, "none", torch.bfloat16) == 3
            step(model, torch.bfloat16)
            parts = [joined.magnitudes for layer in model.model.layers for joined in layer.joined]  # type: ignore[union-attr]
            found = [(linear, part._length[rows]) for part in parts for linear, rows, _ in part._decomposed]  # type: ignore[union-attr]
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = [(each, each._lengths()) for each in model.modules() if isinstance(each, DoRALinear)]
        assert len(found) == 21
        for linear, length in found:
            weight = linear.base_layer.weight.double()
            wanted = (weight + linear.scale * (linear.lora_B.double() @ linear.lora_A.double())).norm(dim=1)
            torch.testing.assert_close(length.double(), wanted, rtol=3e-4 if fused else 1e-6, atol=0)


def test_weights_that_train_keep_their_names_and_an_update_counts_at_once() -> None:
    """In float32 and where products have fewer bits; catches a copy of the weights of the step before."""
    for product in (None, torch.bfloat16):
        model, plain = model_of("full"), model_of("full")
        fuse(model, "none", product)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            n for n, _ in plain.named_parameters()
        ]
        step(model, product)
        for each in (model, plain):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(-0.5).add_(0.01)
        torch.testing.assert_close(
            step(model, product)[0], step(plain, product)[0], rtol=1e-6 if product is None else 2e-3, atol=0
        )
        assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_what_it_does_not_know_is_left_alone() -> None:
    """Catches weights that would be trained and silently ignored."""
    model = model_of("rslora")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert fuse(model) == 2 and not isinstance(model.model.layers[1], FusedLayer)
    assert fuse(model_of("dora", dropout=0.1)) == 0
