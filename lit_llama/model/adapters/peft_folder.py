"""An adapter folder: what PEFT writes and reads, with a meta.json that says which base it belongs to."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.adapters.base import META_FILE as META_FILE
from lit_llama.model.adapters.base import base_of as base_of
from lit_llama.model.adapters.base import verify_folders as verify_folders
from lit_llama.model.adapters.lora import adapters
from lit_llama.model.adapters.place import OTHER_BASE, Placed, adapted_module, copied_module, place
from lit_llama.model.adapters.rows import TrainedRows
from lit_llama.model.adapters.settings import CONFIG_FILE as CONFIG_FILE
from lit_llama.model.adapters.settings import read_settings
from lit_llama.model.adapters.tensors import PREFIX, AdapterFile, read_adapter_file
from lit_llama.model.adapters.tensors import WEIGHTS_FILE as WEIGHTS_FILE
from lit_llama.model.config import ALL_LINEAR, LoRAConfig, Quantization
from lit_llama.model.files.weights import check_names
from lit_llama.objects import as_object, read_text


def save_adapter(model: nn.Module, config: LoRAConfig, folder: Path, base_model: str) -> None:
    """Write the adapter into `folder` as PEFT does; `base_model` is the path or hub id of what it belongs to.

    Of an adapted embedding or head PEFT writes the base's matrix, too; it is left out here and not missed there.

    Raises:
        UserError: A value is not finite, or the adapter has brought rows of its base along; nothing is written.
    """
    if (brought := getattr(model, OTHER_BASE, None)) is not None:
        raise UserError(
            f"{brought} has rows that came with an adapter and not with its base; merge that adapter first, and train "
            "on the merged model"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in _parameters(model).items()}
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{bad[0]} has values that are not finite; the adapter is not written")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.pattern or _targets(model, config),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "trainable_token_indices": _trained_rows(model) or None,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the adapted modules; of all linear layers those that the model has."""
    there = {name.rpartition(".")[2] for name, _ in adapters(model)}
    return [name for name in config.targets if config.target_modules not in ALL_LINEAR or name in there]


def _trained_rows(model: nn.Module) -> dict[str, list[int]]:
    """Ids of the rows that are trained alone, by module."""
    found = ((name, module) for name, module in adapters(model) if isinstance(module, TrainedRows) and module.parts())
    return {name: list(module.numbers) for name, module in found}


def restore_adapter(model: nn.Module, folder: Path) -> None:
    """Put what `save_adapter` wrote back into the adapters that are on `model`, bit by bit.

    Raises:
        CheckpointError: Names or shapes are not those of the adapters.
    """
    path = folder / WEIGHTS_FILE
    saved, parameters = load_file(path), _parameters(model)
    check_names(path, set(parameters), saved)
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            raise CheckpointError(f"{path}: {name} is {tuple(saved[name].shape)}, expected {tuple(parameter.shape)}")
        parameter.data.copy_(saved[name])


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by PEFT's names."""
    return {
        f"{PREFIX}{name}.{part}": value for name, module in adapters(model) for part, value in module.parts().items()
    }


def read_adapter_config(folder: Path) -> tuple[LoRAConfig, str]:
    """Read the settings of an adapter folder, ours or PEFT's, and the base model it names.

    Targets that no list of names can say (a regular expression, some layers alone, or none at all) are those that the
    tensors are of.

    Raises:
        CheckpointError: It is no LoRA adapter, or of a variant that is not implemented.
    """
    settings = read_settings(folder)
    if settings.plain:
        return settings.lora, settings.base
    tensors = read_adapter_file(folder).tensors
    adapted = sorted({module for name in tensors if (module := adapted_module(name))})
    return replace(settings.lora, target_modules=adapted or "all-linear"), settings.base


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder by module and part, such as `model.layers.0.mlp.up_proj.lora_A.weight`.

    Raises:
        CheckpointError: The file is missing, unreadable, empty, not finite, or every update is zero.
    """
    return dict(_trained_file(folder).tensors)


def _trained_file(folder: Path) -> AdapterFile:
    file = read_adapter_file(folder)
    # What starts at zero. Whole copies and rows do not, and are not told from their base here.
    started = [value for name, value in file.tensors.items() if name.endswith((".lora_B.weight", ".lora_embedding_A"))]
    others = any(copied_module(name) or name.endswith("trainable_tokens_delta") for name in file.tensors)
    if started and not any(value.any() for value in started) and not others:
        raise CheckpointError(f"{file.path} holds only zeros: the adapter was never trained")
    return file


def load_adapter(model: nn.Module, folder: Path, base: Mapping[str, Tensor] | None = None) -> Placed:
    """Put the adapter of `folder` on `model`, in place; on a model without storage, the adapter alone is loaded.

    Args:
        model: The base model.
        folder: The adapter, ours or PEFT's.
        base: The tensors of the base by name, for a model without storage.

    Raises:
        CheckpointError: Names or shapes do not fit the model.
        IntegrityError: The adapter holds a matrix of another base.
    """
    return place(model, read_settings(folder), _trained_file(folder), base)


def trained_on(folder: Path) -> Quantization | None:
    """Read how the base was quantised while the adapter was trained; None if it was not or nothing says so.

    Raises:
        CheckpointError: The record is none.
    """
    meta = folder / META_FILE
    try:
        record = as_object(read_text(meta)) if meta.is_file() else {}
        method = record.get("base", {}).get("quantize")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{meta} does not say which base the adapter belongs to: {error!r}") from error
    if method is not None and method not in get_args(Quantization):
        raise CheckpointError(
            f"{meta}: the base was quantised by {method!r}, expected one of {', '.join(get_args(Quantization))}"
        )
    return method
