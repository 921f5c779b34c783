"""lit-llama's LoRA file -> a PEFT adapter folder of the converted base.

Of each layer's c_attn it adapts q and v: lora_A (2r, C) holds the rows of q, then of v; lora_B (2C, r) likewise, those
of q in lit-llama's rotary order. Shapes: r rank, C hidden_size.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llama.convert.kinds import foreign_kind
from lit_llama.convert.rotary import halves_from_pairs
from lit_llama.errors import CheckpointError
from lit_llama.folder import publish, write_json
from lit_llama.model.adapter import CONFIG_FILE, META_FILE, read_adapter_weights, save_adapter
from lit_llama.model.adapters.base import base_record
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import adapters, apply_lora
from lit_llama.model.pth.files import read_pth
from lit_llama.model.weights import Stored, check_names

_TARGETS = ["q_proj", "v_proj"]
ALPHA = 16
"""Fixed in lit-llama's scripts and not in its files."""


def convert_lit_lora(path: Path, base_dir: Path, destination: Path, alpha: float = ALPHA) -> None:
    """Write the adapter folder.

    Args:
        path: lit-llama's LoRA .pth.
        base_dir: The converted base model that it was trained on.
        destination: Folder to make.
        alpha: The update is scaled by alpha / r.

    Raises:
        CheckpointError: It is no such file, or does not fit the base.
    """
    tensors = read_pth(path)
    if (foreign := foreign_kind(path, tensors)) is not None:
        raise CheckpointError(foreign)
    config = LLaMAConfig.from_folder(base_dir)
    if config.num_key_value_heads != config.num_attention_heads:
        raise CheckpointError(f"{base_dir} has fewer key/value heads than heads, which lit-llama cannot adapt")
    layers = range(config.num_hidden_layers)
    names = {f"transformer.h.{i}.attn.c_attn.lora_{part}" for i in layers for part in "AB"}
    check_names(path, names, tensors)
    lora = LoRAConfig(r=_rank(path, tensors, config.hidden_size), alpha=alpha, target_modules=_TARGETS)
    with torch.device("meta"):
        model = LLaMA(config)
        apply_lora(model, lora)
    for name, module in adapters(model):
        layer, part = int(name.split(".")[2]), _TARGETS.index(name.rpartition(".")[2])
        stem = f"transformer.h.{layer}.attn.c_attn."
        lora_A = _half(tensors[f"{stem}lora_A"], part)  # (r, C)
        lora_B = _half(tensors[f"{stem}lora_B"], part)  # (C, r)
        if part == 0:
            lora_B = halves_from_pairs(lora_B, config.num_attention_heads)
        module.lora_A, module.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    with publish(destination, CONFIG_FILE) as folder:
        save_adapter(model, lora, folder, str(base_dir))
        read_adapter_weights(folder)  # refuses one that was never trained
        source = {"path": str(path), "kind": "lit-llama LoRA", "lora_alpha": "given, the file does not say"}
        write_json(folder / META_FILE, {"format": 1, "base": base_record(base_dir), "source": source})


def _rank(path: Path, tensors: dict[str, Stored], width: int) -> int:
    """The one rank of all layers, whose shapes fit the base."""
    shapes = {(name.rpartition("_")[2], stored.shape) for name, stored in tensors.items()}
    rows = next(shape[0] for part, shape in shapes if part == "A" and shape)
    if rows % 2 or shapes != {("A", (rows, width)), ("B", (2 * width, rows // 2))}:
        found = ", ".join(sorted(f"lora_{part} {shape}" for part, shape in shapes))
        raise CheckpointError(
            f"{path}: found {found}; this base needs lora_A (2r, {width}) and lora_B ({2 * width}, r)"
        )
    return rows // 2


def _half(stored: Stored, part: int) -> Tensor:
    """The rows of q (part 0) or of v (1)."""
    middle = stored.shape[0] // 2
    return stored.read(part * middle, (part + 1) * middle).float()
