"""Bases that bitsandbytes quantises: what four and eight bits leave, and training on top of it."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import write_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, ResourceError
from lit_llama.generate.llm import load
from lit_llama.model.adapters.lora import adapters, apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import trained_on
from lit_llama.model.config import LINEARS, LoRAConfig, Quantization
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.quantize import QuantizedLinear, quantized, through

pytest.importorskip("bitsandbytes")
METHODS: tuple[Quantization, ...] = tuple(method for method in get_args(Quantization) if method != "fp8")
IDS = torch.arange(3, 40)
# The sixteen levels of nf4 (Dettmers et al. 2023, appendix E).
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_level(weight: Tensor) -> Tensor:
    """nf4 by its definition: blocks of 64, each divided by its largest magnitude, each value the nearest level."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (LEVELS[(blocks[..., None] / largest[..., None] - LEVELS).abs().argmin(-1)] * largest).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(64, 112), (112, 64), (32, 64), (48, 100)])
def test_nf4_is_what_the_paper_says(shape: tuple[int, int]) -> None:
    """Catches blocks that do not run over the ends of rows, as the library cuts them on a CPU when left to itself."""
    weight = random(*shape)
    wanted = nearest_level(weight) if weight.numel() % 64 == 0 else weight
    assert (through(weight, "nf4") - wanted).abs().max() < (1e-6 if wanted is not weight else 1)
    shift = through(weight, "nf4-dq") - through(weight, "nf4")
    assert 0 < shift.norm() / weight.norm() < 0.02, "double quantisation rounds the scales, and little else"


def test_int8_is_a_scale_for_each_row() -> None:
    """Catches one scale for all rows or columns, and levels that end at 128."""
    weight = random(48, 100).bfloat16().float() * torch.logspace(-3, 1, 48)[:, None]
    step = weight.half().abs().amax(1, keepdim=True).float() / 127
    left = through(weight, "int8")
    levels = left / step
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    # The library forms the levels in float16, which has steps of 1/16 near 127.
    assert ((left - weight).abs() <= 0.55 * step).all() and levels.abs().amax(1).round().eq(127).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_with_what_is_left(method: Quantization, bias: bool) -> None:
    """Logits and gradients of the dequantised layer; catches a transposed weight and a bias that is lost."""
    weight, added = random(48, 128), nn.Parameter(random(48, seed=1)) if bias else None
    layer = quantized(weight, added, method)
    plain = nn.Linear(128, 48, bias=bias)
    plain.weight.data = through(weight, method)
    if added is not None:
        plain.bias.data = added.data
    assert torch.equal(layer.dense(torch.float32), plain.weight)
    inputs = [random(7, 128, seed=2).requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0]), plain(inputs[1])]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert layer.packed.numel() * layer.packed.element_size() == weight.numel() // (1 if method == "int8" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_the_library_compute_the_same(method: Quantization) -> None:
    """bitsandbytes' own modules, on rows that are multiples of a block."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight, x = random(48, 128), random(7, 128, seed=2)
    if method == "int8":
        other: Any = Linear8bitLt(128, 48, bias=False, has_fp16_weights=False)
        other.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        double = method == "nf4-dq"
        other = Linear4bit(128, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        other.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    wanted = other.to("cpu").train()(x.requires_grad_())
    torch.testing.assert_close(quantized(weight, None, method)(x), wanted, atol=1e-4, rtol=1e-5)


def test_what_is_left_does_not_depend_on_the_precision_of_a_run() -> None:
    """Catches weights that are quantised after they were rounded to the run's dtype."""
    layer = quantized(random(48, 128), None, "nf4")
    assert torch.equal(layer.dense(torch.bfloat16), layer.dense(torch.float32).bfloat16())
    assert layer(random(3, 128).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_gradients_are_those_through_the_dequantised_weights(
    tiny_folder: Path, method: Quantization, settings: dict[str, Any]
) -> None:
    """A training step; catches gradients through the stored weights, and layers left unquantised."""
    models = [load_model(tiny_folder, quantize=method), load_model(tiny_folder)]
    assert sum(isinstance(module, QuantizedLinear) for module in models[0].modules()) == 14
    for name, parameter in models[1].named_parameters():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            parameter.data = through(parameter.data, method)
    losses = []
    for model in models:
        apply_lora(model, LoRAConfig(r=4, alpha=6, **settings))
        torch.manual_seed(0)
        for _, module in adapters(model):
            for part, parameter in module.parts().items():
                if "magnitude" not in part:
                    nn.init.normal_(parameter, std=0.1)
        losses.append(nn.functional.cross_entropy(model(IDS)[:-1], IDS[1:]))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    found, wanted = ([p.grad for p in lora_parameters(model)] for model in models)
    assert len(found) == len(wanted) == (42 if settings else 28)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None and ours.any()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_way_back_keeps_no_dense_weight(tiny_folder: Path) -> None:
    """Catches a graph that holds every weight in full: the memory that quantisation was to save."""
    model = load_model(tiny_folder, quantize="nf4")
    apply_lora(model, LoRAConfig(r=4, target_modules=["q_proj"]))
    shapes = {(module.out_features, module.in_features) for module in model.modules() if is_packed(module)}
    kept: list[tuple[int, ...]] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(IDS).sum().backward()
    assert kept and not shapes & {*kept, *(shape[::-1] for shape in kept)}


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear)


def test_loading_holds_one_dense_layer_at_a_time(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that is read in full and quantised afterwards."""
    alive: list[int] = []
    before = QuantizedLinear.__init__

    def count(self: Any, shape: torch.Size, *rest: Any) -> None:
        before(self, shape, *rest)
        alive.append(sum(1 for _ in dense_tensors(tuple(shape))))

    monkeypatch.setattr(QuantizedLinear, "__init__", count)
    gc.collect()  # what other tests have left
    load_model(tiny_folder, quantize="nf4")
    assert len(alive) == 14 and max(alive) <= 2


def dense_tensors(shape: tuple[int, ...]) -> Iterator[Tensor]:
    for value in gc.get_objects():
        if (
            type(value) is Tensor
            and value.shape == shape
            and value.device.type == "cpu"
            and value.dtype.is_floating_point
        ):
            yield value


def test_embedding_head_and_norms_are_left_alone(tiny_folder: Path) -> None:
    """Catches a head in four bits, which costs most and saves least."""
    model, stored = load_model(tiny_folder, quantize="nf4-dq"), load_file(tiny_folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(model.get_parameter(name), stored[name])
    assert type(model.lm_head) is nn.Linear
    size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".packed" in n)
    assert size == sum(value.numel() for n, value in stored.items() if n.endswith("proj.weight")) / 2


def test_an_adapter_is_loaded_on_the_base_it_was_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an adapter of QLoRA put on weights it never saw, and a wish that is not heard."""
    import json

    adapter = write_adapter(tmp_path / "adapter", tiny_folder)
    assert trained_on(adapter) is None
    meta = json.loads((adapter / "meta.json").read_text())
    meta["base"]["quantize"] = "nf4"
    (adapter / "meta.json").write_text(json.dumps(meta))
    assert trained_on(adapter) == "nf4"
    packed = {
        wish: sum(map(is_packed, load(adapter, precision="32-true", quantize=wish, packed=False).model.modules()))
        for wish in (None, "stored", "int8")
    }
    assert packed == {None: 14, "stored": 0, "int8": 14}
    assert sum(map(is_packed, load(tiny_folder, quantize="nf4").model.modules())) == 14
    logits = {
        wish: load(adapter, precision="32-true", quantize=wish, packed=False).model(IDS)
        for wish in (None, "nf4", "stored")
    }
    assert torch.equal(logits[None], logits["nf4"]) and not torch.allclose(logits[None], logits["stored"], atol=1e-2)
    meta["base"]["quantize"] = "nf3"
    (adapter / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"meta\.json: the base was quantised by 'nf3', expected one of nf4"):
        load(adapter)


def test_without_the_library_the_extra_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of an import."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match=r"lit_llama\[quantize\]") as caught:
        load_model(tiny_folder, quantize="nf4")
    assert caught.value.exit_status == 5


@pytest.mark.parametrize("method", METHODS)
def test_a_device_that_the_library_does_not_serve_is_named(
    method: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the library's own traceback about an operator that has no kernel."""
    from bitsandbytes import functional

    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(functional, "quantize_4bit", fail)
    monkeypatch.setattr(functional, "int8_vectorwise_quant", fail)
    with pytest.raises(ResourceError, match=f"--quantize {method}: the installed bitsandbytes cannot do it on cpu"):
        through(random(64, 64), method)
