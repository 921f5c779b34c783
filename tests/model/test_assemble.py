"""The one order of a runnable model: a plan on tensors without content and a run have the same modules."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model

from lit_llama.device import Numerics
from lit_llama.model.adapters.lora import apply_lora
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.fused.layer import FusedLayer, can_share
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators.kernels import compiled
from lit_llama.train.memory.footprint import Build
from lit_llama.train.methods.method import Full, LoRA, Method

CPU = torch.device("cpu")
PLAIN = Numerics(device=CPU, linear=torch.float32, rest=torch.float32)
MIXED = Numerics(device=CPU, linear=torch.float32, rest=torch.float32, product=torch.bfloat16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"method": LoRA(LoRAConfig(dropout=0.1))},
    "dora": {"method": LoRA(LoRAConfig(use_dora=True))},
    "rslora": {"method": LoRA(LoRAConfig(use_rslora=True))},
    "few targets": {"method": LoRA(LoRAConfig(target_modules="q_proj,v_proj"))},
    "embeddings": {"method": LoRA(LoRAConfig(target_modules="all-linear", modules_to_save="embed_tokens"))},
    "norms": {"method": LoRA(LoRAConfig(modules_to_save="norm"))},
    "full": {"method": Full()},
    "noise": {"noise": 5.0},
    "selective": {"checkpointing": "selective"},
    "whole layers": {"checkpointing": "full"},
    "selective, dropout": {"checkpointing": "selective", "method": LoRA(LoRAConfig(dropout=0.1))},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "mixed": {"numerics": MIXED},
    "mixed, full": {"numerics": MIXED, "method": Full()},
    "dora, dropout": {"method": LoRA(LoRAConfig(use_dora=True, dropout=0.1))},
    "spread": {"spread": True},
    "spread, dora, whole layers": {"spread": True, "checkpointing": "full", "method": LoRA(LoRAConfig(use_dora=True))},
}
SAID = {
    "plain": "layers: 2 fused",
    "dropout": "layers: 2 fused",
    "dora": "layers: 2 fused",
    "dora, dropout": "layers: 2 plain (DoRA with dropout)",
    "norms": "layers: 2 fused",
    "full": "layers: 2 fused",
    "noise": "layers: 2 fused",
    "mixed": "layers: 2 fused",
    "mixed, full": "layers: 2 fused",
    "spread": "layers: 2 fused",
    "nf4": "layers: 2 fused",
}


def modules(model: LLaMA) -> dict[str, tuple[str, bool]]:
    """Type of every module by its name, and whether a weight of its own trains."""
    return {
        name: (type(module).__name__, any(p.requires_grad for p in module.parameters(recurse=False)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_has_the_modules_of_its_plan(option: str, tiny_folder: Path) -> None:
    """Catches an option that a plan has not heard of: dropped noise, shared beginnings, layers fused or recomputed
    in one of both alone."""
    method: Method = LoRA(LoRAConfig())
    settings = {"method": method, "numerics": PLAIN, "checkpointing": "none"} | OPTIONS[option]
    config = replace(tiny_config(), tie_word_embeddings=True)
    build = Build(config=config, **settings)
    planned = build._model()
    shares = can_share(planned) if compiled() is not None else None
    found = modules(planned)
    linear, rest = build.numerics.linear, build.numerics.rest
    load = partial(load_model, tiny_folder, quantize=build.quantize, dtype=rest, linear_dtype=linear)
    made = assemble(load, build.assembly(build.method.begin))
    assert modules(made.model) == found
    assert (made.model.model.noise is None) == (planned.model.noise is None)
    if shares is not None:
        assert can_share(made.model) == shares == build.shares
        assert can_share(made.model.eval()) == build.evaluation_shares
    assert made.fused + sum(made.plain.values()) == 2
    assert made.describe() == SAID.get(option, made.describe())


def test_what_is_not_fused_is_counted_by_its_reason() -> None:
    """Catches a run that leaves the fast path without a word, or names one reason for all layers."""
    model = tiny_model(num_hidden_layers=3)

    def adapt(model: LLaMA) -> str:
        apply_lora(model, LoRAConfig())
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
        return "in some"

    made = assemble(model, Assembly(adapt=adapt))
    assert made.trains == "in some"
    assert made.describe() == "layers: 2 fused, 1 plain (some weights of the base that train)"
    assert [isinstance(layer, FusedLayer) for layer in made.model.model.layers] == [True, False, True]


def test_heads_that_are_normalised_are_fused_and_so_are_their_norms() -> None:
    """Catches Qwen3 on the slow path."""

    def made(adapt: Any) -> str:
        return assemble(tiny_model(model_type="qwen3", use_qk_norm=True), Assembly(adapt=adapt)).describe()

    def let_train(model: LLaMA) -> str:
        for layer in model.model.layers:
            layer.requires_grad_(False)
            layer.self_attn.q_norm.weight.requires_grad_(True)
        return ""

    assert made(lambda model: apply_lora(model, LoRAConfig())) == "layers: 2 fused"
    assert made(let_train) == "layers: 2 fused"
