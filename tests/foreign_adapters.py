"""Adapters as PEFT makes and saves them, and what its own model computes with them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE

IDS = torch.tensor([3, 5, 80, 7, 200, 31, 5, 11])


def peft_adapter(base: Path, folder: Path, save: Mapping[str, Any] | None = None, **settings: Any) -> Tensor:
    """Save an adapter of PEFT whose every parameter is random; gives the logits of its model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    for name, parameter in twin.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
        elif any(part in name for part in ("magnitude", "modules_to_save", "trainable_tokens_delta")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    twin.save_pretrained(folder, **(save or {}))
    return logits(twin)


def logits(model: nn.Module) -> Tensor:
    """Of transformers' or PEFT's model: (T, V)."""
    with torch.inference_mode():
        found: Tensor = model(IDS[None]).logits[0]
    return found


def peft_logits(base: Path, folder: Path) -> Tensor:
    """What PEFT computes with an adapter folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, folder).eval())


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors in place, or give others."""
    tensors = load_file(folder / WEIGHTS_FILE)
    changed = edit(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / WEIGHTS_FILE)


def rename(folder: Path, new: Callable[[str], str]) -> None:
    edit_weights(folder, lambda tensors: {new(name): value for name, value in tensors.items()})
