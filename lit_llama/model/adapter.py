"""An adapter folder: what PEFT writes and reads, with a meta.json that says which base it belongs to."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.checkpoint import fingerprint
from lit_llama.model.config import LoRAConfig
from lit_llama.model.lora import adapters, apply_lora
from lit_llama.model.weights import check_names, describe_wrong_file

CONFIG_FILE, WEIGHTS_FILE, META_FILE = "adapter_config.json", "adapter_model.safetensors", "meta.json"
_PREFIX = "base_model.model."

# Settings of PEFT that change the computation, with the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "exclude_modules": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False, None),
    # The other ways to start, such as pissa, change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def save_adapter(model: nn.Module, config: LoRAConfig, folder: Path, base_model: str) -> None:
    """Write the adapter into `folder` as PEFT does; `base_model` is the path or hub id of what it belongs to.

    Raises:
        UserError: A value is not finite; nothing is written.
    """
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
        "target_modules": config.targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


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
        f"{_PREFIX}{name}.{part}.weight": value
        for name, module in adapters(model)
        for part, value in (("lora_A", module.lora_A), ("lora_B", module.lora_B))
    }


def read_adapter_config(folder: Path) -> tuple[LoRAConfig, str]:
    """Settings of an adapter folder, ours or PEFT's, and the base model it names.

    Raises:
        CheckpointError: It is no LoRA adapter, or of a variant that is not implemented.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; finetune/lora.py writes adapter folders") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected an object with peft_type LORA")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key, neutral[0]) not in neutral:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which is not implemented (only {neutral[0]!r})")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) and targets != "all-linear":
        raise CheckpointError(f"{path}: target_modules is {targets!r}, expected a list of names or 'all-linear'")
    try:
        config = LoRAConfig(r=raw["r"], alpha=raw["lora_alpha"], target_modules=targets)
    except (KeyError, TypeError, UserError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, raw.get("base_model_name_or_path") or ""


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapter folder by the module names of the model, such as `model.layers.0.mlp.up_proj.lora_A`.

    Raises:
        CheckpointError: The file is missing, unreadable, empty, not finite, or every update is zero.
    """
    path = folder / WEIGHTS_FILE
    if wrong := describe_wrong_file(path):  # also a pipe, which would be waited for
        raise CheckpointError(f"{path} is {wrong}")
    try:
        raw = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    weights = {name.removeprefix(_PREFIX).removesuffix(".weight"): value for name, value in raw.items()}
    if not weights:
        raise CheckpointError(f"{path} is empty: it holds no tensor")
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path}: {bad[0]} has values that are not finite")
    if not any(value.any() for name, value in weights.items() if name.endswith(".lora_B")):
        raise CheckpointError(f"{path} holds only zeros: the adapter was never trained")
    return weights


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of `folder` on `model`, in place.

    Raises:
        CheckpointError: Names or shapes do not fit the model.
    """
    config, _ = read_adapter_config(folder)
    weights = read_adapter_weights(folder)
    path = folder / WEIGHTS_FILE
    modules = sorted({name.rpartition(".")[0] for name in weights})
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    if unknown := [name for name in modules if name not in linears]:
        raise CheckpointError(f"{path} adapts {unknown[0]}, which is no linear layer of the base model")
    apply_lora(model, LoRAConfig(r=config.r, alpha=config.alpha, target_modules=modules))
    check_names(path, {f"{name}.{part}" for name in modules for part in ("lora_A", "lora_B")}, weights)
    for name, value in weights.items():
        parameter = model.get_parameter(name)
        if parameter.shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(value.shape)}, the base model with r {config.r} needs "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(value)


def base_of(adapter_dir: Path) -> Path:
    """The base model of an adapter folder, proven to be the one it was trained on where the folder says which.

    Raises:
        CheckpointError: The base is not there.
        IntegrityError: It is another one.
    """
    _, named = read_adapter_config(adapter_dir)
    base = Path(named)
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{adapter_dir / CONFIG_FILE} names the base model {named!r}, which is no checkpoint folder here "
            f"(working folder: {Path.cwd()}); run from the folder that holds it, or correct base_model_name_or_path"
        )
    meta = adapter_dir / META_FILE
    if meta.is_file():
        try:
            known = json.loads(meta.read_text("utf-8"))
            if "source" in known and "base" not in known:  # downloaded: its author gave no fingerprint
                return base
            expected = known["base"]["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{meta} does not say which base the adapter belongs to: {error!r}") from error
        if fingerprint(base) != expected:
            raise IntegrityError(
                f"{base} is not the base that {adapter_dir} was trained on: its weights have another fingerprint; "
                "bring back the original weights, or train again"
            )
    return base
