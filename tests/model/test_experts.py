"""Mixtures of experts beyond what all families are compared by: adapters on experts, stacked files, plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_passes import planned_and_counted
from safetensors.torch import load_file, save_file
from tiny_families import SHAPE, random_ids, write_model

from lit_llama.device import Numerics
from lit_llama.errors import CheckpointError
from lit_llama.model.adapters.lora import adapters, apply_lora, many
from lit_llama.model.adapters.peft_folder import load_adapter, save_adapter
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig, LoRAConfig, Quantization
from lit_llama.model.experts import SparseMLP
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.weights import Weights
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import Build
from lit_llama.train.methods.method import LoRA

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
    "norm_topk_prob": True,
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 5}
BOTH = pytest.mark.parametrize("settings", [QWEN, MIXTRAL], ids=["qwen3_moe", "mixtral"])


@BOTH
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj,w2"])
def test_peft_opens_adapters_on_experts(tmp_path: Path, settings: dict[str, Any], targets: str) -> None:
    """Against PEFT's own model of the folder; catches experts, gates and ups that are mistaken for one another. PEFT
    stacks the updates of all experts itself, which transformers 5 holds in one tensor."""
    from peft import PeftModel

    theirs = write_model(tmp_path, SHAPE | settings)
    model = load_model(tmp_path)
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    named = targets if targets == "all-linear" else [name for name in targets.split(",") if name in there]
    lora = LoRAConfig(r=2, alpha=4, target_modules=named)
    adapted = apply_lora(model, lora)
    assert sum("experts" in name for name in adapted) == 10 * (3 if targets == "all-linear" else 1)
    assert not any(name.endswith(".gate") for name in adapted), "the router is not adapted"
    torch.manual_seed(0)
    for _, module in adapters(model):
        for part in module.parts().values():
            torch.nn.init.normal_(part, std=0.2)
    ids, adapter = random_ids(40), tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(tmp_path))
    again = load_model(tmp_path)
    load_adapter(again, adapter)
    with torch.inference_mode():
        before = theirs(ids[None]).logits[0]
        wanted = PeftModel.from_pretrained(theirs, adapter).eval()(ids[None]).logits[0]
        assert (before - wanted).abs().max() > 0.1
        for found in (model(ids), again(ids)):
            assert (found - wanted).abs().max() <= 1e-5


@BOTH
def test_stacked_experts_are_told_apart(tmp_path: Path, settings: dict[str, Any]) -> None:
    """What transformers writes in its own form, read in each way that there is; catches parts of the wrong expert, and
    an offset into the whole tensor."""
    theirs = write_model(tmp_path / "each", SHAPE | settings)
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "stacked" / "model.safetensors")
    each, stacked = Weights(tmp_path / "each"), Weights(tmp_path / "stacked")
    assert {*each} == {*stacked}
    places = stacked.locate()
    for name, value in each.items():
        assert stacked.spec(name) == each.spec(name)
        for found in (stacked[name], stacked.read(name), places[name].read()):
            assert torch.equal(found, value), name
    ids = random_ids(20)
    torch.testing.assert_close(load_model(tmp_path / "stacked")(ids), load_model(tmp_path / "each")(ids))
    tensors = load_file(tmp_path / "stacked" / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"] = tensors["model.layers.0.mlp.experts.down_proj"][0].clone()
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj is \(32, .*expected \(experts, 1 n, m\)"):
        Weights(tmp_path / "stacked")


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_experts_have_the_same_gradients(tmp_path: Path, checkpointing: Any) -> None:
    """Catches experts that are left out of the recomputing, which a count of their kind shows, or changed by it."""
    write_model(tmp_path, SHAPE | MIXTRAL)

    def gradients(mode: Any) -> tuple[LLaMA, list[torch.Tensor | None]]:
        def adapt(model: LLaMA) -> str:
            apply_lora(model, LoRAConfig(r=2))
            torch.manual_seed(0)
            for _, module in adapters(model):
                for part in module.parts().values():
                    torch.nn.init.normal_(part, std=0.2)
            return ""

        model = assemble(load_model(tmp_path), Assembly(adapt=adapt, checkpointing=mode)).model
        ids, places = random_ids(30), torch.arange(29)
        TokenLoss(model).of_layout(ids, Packed([30]), places, ids[1:]).backward()
        return model, [part.grad for _, module in adapters(model) for part in module.parts().values()]

    (model, found), (_, wanted) = gradients(checkpointing), gradients("none")
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("RecomputedMLP") == (10 if checkpointing == "selective" else 0)
    assert any(gradient is not None for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_experts_are_quantised_and_routers_are_not(tmp_path: Path, quantize: Quantization) -> None:
    """Catches experts of Mixtral, whose names are others, that stay in full precision."""
    pytest.importorskip("bitsandbytes")
    write_model(tmp_path, SHAPE | MIXTRAL)
    model = load_model(tmp_path, quantize=quantize)
    block = model.model.layers[0].get_submodule("block_sparse_moe")
    assert isinstance(block, SparseMLP) and type(block.gate) is torch.nn.Linear
    assert all(type(block.experts[0].get_submodule(name)).__name__ == "QuantizedLinear" for name in ("w1", "w2", "w3"))
    plain, found = load_model(tmp_path)(random_ids(20)), model(random_ids(20))
    assert 0 < (found - plain).abs().mean() < plain.std()


def test_tokens_may_leave_experts_without_work(tmp_path: Path) -> None:
    """One token, and a router that three experts are nothing to; catches an expert of no tokens that is run, and tokens
    that go to a wrong one."""
    theirs = write_model(tmp_path, SHAPE | MIXTRAL)
    with torch.inference_mode():
        for layer in theirs.model.layers:
            layer.mlp.gate.weight[:3] = -layer.mlp.gate.weight[3:4]
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    runs: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("w2"):
            module.register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    for count in (1, 30):
        runs.clear()
        ids = random_ids(count)
        with torch.inference_mode():
            assert (model(ids) - theirs(ids[None]).logits[0]).abs().max() <= 1e-5
        assert min(runs) > 0 and sum(runs) == 2 * 2 * count and len(runs) < 2 * 5


@BOTH
def test_a_plan_counts_what_experts_keep(settings: dict[str, Any]) -> None:
    """Bytes of a forward and backward pass, counted on a model without numbers and on one that routes its tokens;
    catches experts of a plan that get no tokens, or all of them."""
    changes = {"hidden_size": 128, "moe_intermediate_size": 384, "intermediate_size": 384}
    config = LLaMAConfig.from_dict(SHAPE | settings | changes)
    numerics = Numerics(device=torch.device("cpu"), linear=torch.float32, rest=torch.float32)
    build = Build(config=config, method=LoRA(LoRAConfig()), numerics=numerics, checkpointing="none")
    planned, counted = planned_and_counted(build, [156, 100], 200)
    assert planned == pytest.approx(counted, rel=0.01)


def test_configurations_of_both_releases_are_one(tmp_path: Path) -> None:
    """transformers 4 says num_experts, 5 num_local_experts."""
    write_model(tmp_path, SHAPE | QWEN)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("num_local_experts") == 5
    older = raw | {"num_experts": 5}
    assert LLaMAConfig.from_dict(older) == LLaMAConfig.from_folder(tmp_path)
    assert LLaMAConfig.from_folder(tmp_path).to_dict("float32")["num_experts"] == 5


def test_thousands_of_small_adapters_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound that a tiny model meets; catches a slow run that nobody explains, and a word where none is due."""
    monkeypatch.setattr("lit_llama.model.adapters.lora.MANY", 30)

    def said(settings: dict[str, Any], targets: str) -> str:
        model = LLaMA(LLaMAConfig.from_dict(SHAPE | settings))
        apply_lora(model, LoRAConfig(r=2, alpha=4, target_modules=targets))
        return many(model)

    # Of each of two layers four matrices of attention, and three of each of five experts.
    assert said(QWEN, "all-linear").startswith("38 matrices are adapted, 30 of them of experts")
    assert "--lora.target_modules q_proj,k_proj,v_proj,o_proj" in said(MIXTRAL, "all-linear")
    assert said(QWEN, "q_proj,v_proj") == said({"model_type": "llama", "num_hidden_layers": 6}, "all-linear") == ""
