"""Small bases, adapters on them, and PEFT's models with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, write_tokenizer
from torch import nn

from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

# Names of PEFT's parameters below a module, by those of its files.
THEIRS = {
    "lora_A.weight": "lora_A.default.weight",
    "lora_B.weight": "lora_B.default.weight",
    "lora_embedding_A": "lora_embedding_A.default",
    "lora_embedding_B": "lora_embedding_B.default",
    "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
    "weight": "modules_to_save.default.weight",
}


@pytest.fixture(scope="session", params=[False, True], ids=["head apart", "head tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; do not change it."""
    return write_base(tmp_path_factory.mktemp("base") / "base", tied=request.param)


@pytest.fixture(scope="session")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose head is a matrix of its own."""
    return write_base(tmp_path_factory.mktemp("apart") / "base", tied=False)


def write_base(folder: Path, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = tiny_config().to_dict("float32") | {"initializer_range": 0.15, "tie_word_embeddings": tied}
    LlamaForCausalLM(LlamaConfig(**shape | {"eos_token_id": 2, "bos_token_id": 1})).float().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def lora_of(settings: dict[str, Any], **changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 6} | settings | changes)


def stir(model: LLaMA, seed: int = 1) -> None:
    """Give what is trained values as after some training."""
    torch.manual_seed(seed)
    for _, module in adapters(model):
        for part, parameter in module.parts().items():
            if part.startswith("lora_magnitude"):
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            elif part == "weight":
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:
                nn.init.normal_(parameter, std=0.1)


def trained(base: Path, lora: LoRAConfig) -> LLaMA:
    model = load_model(base)
    apply_lora(model, lora)
    stir(model)
    return model


def peft_config(lora: LoRAConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        modules_to_save=lora.saved or None,
        task_type="CAUSAL_LM",
    )


def pairs(model: LLaMA, twin: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """What is trained here and its counterpart in PEFT; nothing may be left over there."""
    theirs = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    found = {}
    for name, module in adapters(model):
        for part, parameter in module.parts().items():
            found[f"{name}.{part}"] = parameter, theirs.pop(f"base_model.model.{name}.{THEIRS[part]}")
    assert not theirs
    return found


def twin_of(base: Path, lora: LoRAConfig, model: LLaMA) -> Any:
    """PEFT's model with the same weights."""
    from peft import get_peft_model

    twin = get_peft_model(transformers_model(base), peft_config(lora))
    for ours, theirs in pairs(model, twin).values():
        theirs.data.copy_(ours.data)
    return twin.eval()
