"""An adapter of mlx-lm (adapters.safetensors, adapter_config.json) -> a PEFT adapter folder of the converted base.

It computes y = x W' + scale (x a) b with a (in, r) and b (r, out), and for DoRA rescales each row of W + scale b' a' to
the length m. Shapes: r rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.publish import publish, write_json
from lit_llama.model.adapters.base import base_record
from lit_llama.model.adapters.lora import adapt, adaptable
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, META_FILE, read_adapter_weights, save_adapter
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.weights import check_names, describe_wrong_file
from lit_llama.model.llama import LLaMA
from lit_llama.text.tokenizer.special import read_object

WEIGHTS_FILE = "adapters.safetensors"
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}


def convert_mlx(folder: Path, base_dir: Path, destination: Path) -> None:
    """Write the adapter folder.

    Args:
        folder: Holds mlx-lm's adapters.safetensors and adapter_config.json.
        base_dir: The base model that it was trained on, in 16 or 32 bits.
        destination: Folder to make.

    Raises:
        CheckpointError: It is no such folder, or does not fit the base.
    """
    path = folder / WEIGHTS_FILE
    tensors = _read(path)
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = value
    settings = folder / CONFIG_FILE
    lora = _settings(settings, read_object(settings), by_module)
    config = LLaMAConfig.from_folder(base_dir)
    with torch.device("meta"):
        model = LLaMA(config)
        able = adaptable(model)
        if unknown := [name for name in by_module if not isinstance(able.get(name), nn.Linear)]:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} adapts {unknown[0]}, which is no linear layer of {base_dir}"
            )
        adapt(model, lora, sorted(by_module))
    for name, parts in by_module.items():
        check_names(
            folder / WEIGHTS_FILE, {f"{name}.{part}" for part in _parts(lora)}, {f"{name}.{p}": 0 for p in parts}
        )
        owner = model.get_submodule(name)
        for part in _parts(lora):
            value, target = parts[part].float().t().contiguous(), owner.get_parameter(_PARTS[part])
            if value.shape != target.shape:
                raise CheckpointError(
                    f"{path}: {name}.{part} is {tuple(parts[part].shape)}, {base_dir} with rank "
                    f"{lora.r} needs {tuple(target.shape[::-1])}"
                )
            setattr(owner, _PARTS[part], nn.Parameter(value))
    with publish(destination, CONFIG_FILE) as made:
        save_adapter(model, lora, made, str(base_dir))
        read_adapter_weights(made)  # refuses one that was never trained
        source = {"path": str(folder), "kind": "mlx adapter"}
        write_json(made / META_FILE, {"format": 1, "base": base_record(base_dir), "source": source})


def _read(path: Path) -> dict[str, Tensor]:
    if wrong := describe_wrong_file(path):
        raise CheckpointError(f"{path} is {wrong}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _settings(path: Path, raw: Mapping[str, Any], by_module: Mapping[str, Mapping[str, Tensor]]) -> LoRAConfig:
    """Rank of the tensors, scale of the settings. Releases that knew an alpha multiplied it in."""
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, Mapping):
        raise CheckpointError(f"{path}: fine_tune_type is {kind!r}, expected lora or dora with lora_parameters")
    ranks = {parts["lora_a"].shape[-1] for parts in by_module.values() if "lora_a" in parts}
    if len(ranks) != 1:
        raise CheckpointError(
            f"{path.parent / WEIGHTS_FILE} has updates of the ranks {sorted(ranks)}, expected one rank"
        )
    rank = ranks.pop()
    try:
        scale = float(parameters["scale"])
        if "alpha" in parameters:
            scale *= float(parameters["alpha"]) / rank
        return LoRAConfig(r=rank, alpha=scale * rank, target_modules=sorted(by_module), use_dora=kind == "dora")
    except (KeyError, TypeError, ValueError) as error:
        found = error if isinstance(error, UserError) else f"lora_parameters is {dict(parameters)!r}"
        raise CheckpointError(f"{path}: {found}, expected rank and scale") from error


def _parts(lora: LoRAConfig) -> tuple[str, ...]:
    return tuple(_PARTS) if lora.use_dora else ("lora_a", "lora_b")
