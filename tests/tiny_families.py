"""Tiny models of the families, made and saved by transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""No two sizes are equal by chance."""


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 384, (count,), generator=torch.Generator().manual_seed(seed))


def write_model(folder: Path, settings: dict[str, Any]) -> Any:
    """A random model that transformers makes and saves, large enough in all its weights for differences to show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings, attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    theirs.save_pretrained(folder)
    return theirs
