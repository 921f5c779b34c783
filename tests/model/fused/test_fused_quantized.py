"""Fused layers on a quantised base, against the plain ones."""

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LINEARS, LoRAConfig, Quantization
from lit_llama.model.fused.layer import FusedLayer, fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels
from lit_llama.model.quantize import QuantizedLinear, quantized, through
from lit_llama.train.loss import TokenLoss

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
LENGTHS = [130, 73, 47, 10, 1]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    {"target_modules": "q_proj,v_proj,down_proj"},
    {"model_type": "qwen3", "use_qk_norm": True},
]
BNB: list[Quantization] = ["nf4", "nf4-dq", "int8"]


def adapted(
    method: Quantization, *, dense: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32, **rest: Any
) -> LLaMA:
    """A small model with a quantised base, or with what quantisation leaves in full; its adapters do something."""
    if method != "fp8":
        pytest.importorskip("bitsandbytes")
    lora = {name: rest.pop(name) for name in ("target_modules",) if name in rest}
    model = tiny_model(num_hidden_layers=3, **rest)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            if dense:
                module.weight.data = through(module.weight.data, method)
            else:
                model.set_submodule(name, quantized(module.weight.data.to(device), module.bias, method))
    model = model.to(dtype=dtype) if dense else model.to(device)
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4, **lora))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    return model.to(device).train()


def step(model: LLaMA) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the packed samples."""
    device = model.lm_head.weight.device
    ids = torch.randint(0, 384, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).to(device)
    select = torch.arange(5, len(ids), device=device)
    loss = TokenLoss(model)(ids, LENGTHS, select, ids[select])
    loss.backward()
    found = [parameter.grad for parameter in lora_parameters(model)]
    assert len(found) >= 18 and all(gradient is not None for gradient in found)
    return loss.detach().cpu().double(), [gradient.cpu().double() for gradient in found if gradient is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leave", ["none", "selective", "full"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("method", BNB)
def test_gradients_are_those_of_what_quantisation_leaves(
    method: Quantization, settings: dict[str, Any], leave: Any, device: str
) -> None:
    """Against float64; catches layers joined in another order than their weights, and an update left out."""
    wanted_loss, wanted = step(adapted(method, dense=True, dtype=torch.float64, **settings))
    model = adapted(method, device=device, **settings)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 2e-5


@pytest.mark.parametrize("leave", ["none", "selective", "full"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_products_of_eight_bits_are_those_of_the_plain_layers(settings: dict[str, Any], leave: Any) -> None:
    """In float32 the same but where a value falls to the other side of a tie, which is a sixteenth of that value.

    Catches an update that is rounded to eight bits, and scales that are not those of the rows they stand for.
    """
    wanted_loss, wanted = step(adapted("fp8", **settings))
    exact_loss, exact = step(adapted("fp8", dense=True, dtype=torch.float64, **settings))
    model = adapted("fp8", **settings)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    torch.testing.assert_close(loss, wanted_loss, rtol=2e-3, atol=0)
    torch.testing.assert_close(loss, exact_loss, rtol=2e-2, atol=0)
    ours, plain, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (found, wanted, exact))
    assert (ours - plain).norm() / plain.norm() < 0.1
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.5


def test_an_evaluation_rounds_weights_only() -> None:
    """Catches a test loss that is not that of the answers, which are computed with activations as they are."""
    ids = torch.randint(0, 384, (90,), generator=torch.Generator().manual_seed(3))
    models = fused(adapted("fp8")), adapted("fp8", dense=True, dtype=torch.float64)
    with torch.no_grad():
        losses = [TokenLoss(model).eval()(ids[:-1], [50, 39], torch.arange(89), ids[1:]).double() for model in models]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_eight_bits_as_a_cpu_does() -> None:
    """Catches a layout that the GPU's product reads otherwise, and rounding that is another's."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply 8-bit floats")
    losses, gradients = zip(*(step(fused(adapted("fp8", device=device))) for device in ("cpu", "cuda")), strict=True)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in gradients)
    assert (ours - theirs).norm() / theirs.norm() < 0.3


def fused(model: LLaMA) -> LLaMA:
    assert fuse(model) == 3
    return model


def test_a_fused_layer_holds_its_weights_once() -> None:
    """Catches a copy of the packed weights beside the joined ones."""
    model = fused(adapted("fp8"))
    layer = model.model.layers[1]
    assert isinstance(layer, FusedLayer)
    storages = {base.packed.untyped_storage()._cdata for joined in layer.joined for base in joined.bases}
    assert len(storages) == len(layer.joined) == 4
    assert all(isinstance(base, QuantizedLinear) for joined in layer.joined for base in joined.bases)


def test_mixed_kinds_stay_plain() -> None:
    """Catches layers of which a part would be read as another kind."""
    model = adapted("fp8")
    first = model.model.layers[0].self_attn
    first.q_proj = nn.Linear(64, 64, bias=False).requires_grad_(False)
    assert fuse(model) == 2 and not isinstance(model.model.layers[0], FusedLayer)


@pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler")
def test_beginnings_are_shared_on_a_quantised_base() -> None:
    """Catches a base for which the template is computed once for every sample."""
    assert TokenLoss(fused(adapted("fp8"))).shares
