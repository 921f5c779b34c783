"""An adapter folder: what PEFT writes and reads, with a meta.json that says which base it belongs to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.checkpoint import fingerprint
from lit_llama.model.config import LoRAConfig, Quantization, is_pattern
from lit_llama.model.lora import adapt, adaptable, adapters
from lit_llama.model.low_rank import LoRAEmbedding, LowRank
from lit_llama.model.weights import check_names, describe_wrong_file

CONFIG_FILE, WEIGHTS_FILE, META_FILE = "adapter_config.json", "adapter_model.safetensors", "meta.json"
_PREFIX = "base_model.model."

# Settings of PEFT that change the computation, with the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "exclude_modules": (None, []),
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

    Of an adapted embedding or head PEFT writes the base's matrix, too; it is left out here and not missed there.

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
        "target_modules": config.pattern or config.targets,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.saved or None,
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
        f"{_PREFIX}{name}.{part}": value for name, module in adapters(model) for part, value in module.parts().items()
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
    if not isinstance(targets, list) and targets != "all-linear" and not is_pattern(targets):
        raise CheckpointError(
            f"{path}: target_modules is {targets!r}, expected a list of names, a regular expression or 'all-linear'"
        )
    names = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    variant = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        config = LoRAConfig(r=raw["r"], alpha=raw["lora_alpha"], target_modules=targets, **variant)
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, raw.get("base_model_name_or_path") or ""


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapter folder by module and part, such as `model.layers.0.mlp.up_proj.lora_A.weight`.

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
    weights = {name.removeprefix(_PREFIX): value for name, value in raw.items()}
    if not weights:
        raise CheckpointError(f"{path} is empty: it holds no tensor")
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path}: {bad[0]} has values that are not finite")
    # What starts at zero. Whole copies do not, and are not told from their base here.
    started = [value for name, value in weights.items() if name.endswith((".lora_B.weight", ".lora_embedding_A"))]
    if started and not any(value.any() for value in started) and not any(map(_copied_module, weights)):
        raise CheckpointError(f"{path} holds only zeros: the adapter was never trained")
    return weights


_PARTS = (*LowRank.PARTS, *LoRAEmbedding.PARTS, "lora_magnitude_vector")
_BASE = ".base_layer.weight"


def _adapted_module(name: str) -> str | None:
    """The module whose update of low rank a tensor belongs to."""
    return next((name.removesuffix(f".{part}") for part in _PARTS if name.endswith(f".{part}")), None)


def _copied_module(name: str) -> str | None:
    """The module whose whole copy a tensor is."""
    known = _adapted_module(name) or name.endswith(_BASE) or not name.endswith(".weight")
    return None if known else name.removesuffix(".weight")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of `folder` on `model`, in place; on a model without storage, the adapter alone is loaded.

    Raises:
        CheckpointError: Names or shapes do not fit the model.
    """
    config, _ = read_adapter_config(folder)
    weights = read_adapter_weights(folder)
    path = folder / WEIGHTS_FILE
    _check_base(model, path, {name: weights.pop(name) for name in list(weights) if name.endswith(_BASE)})
    adapted = sorted({module for name in weights if (module := _adapted_module(name))})
    copied = sorted({module for name in weights if (module := _copied_module(name))})
    able, present = adaptable(model), dict(model.named_modules())
    if unknown := [name for name in adapted if name not in able]:
        raise CheckpointError(f"{path} adapts {unknown[0]}, which is no linear layer of the base model")
    if unknown := [name for name in copied if name not in present or not name.endswith(tuple(config.saved or "-"))]:
        raise CheckpointError(f"{path} holds {unknown[0]} whole, which is no module that modules_to_save names")
    try:
        adapt(model, config, adapted, copied)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    places = {f"{name}.{part}": (owner, part) for name, owner in adapters(model) for part in owner.parts()}
    check_names(path, set(places), weights)
    for name, value in weights.items():
        owner, part = places[name]
        parameter = owner.parts()[part]
        if parameter.shape != value.shape:
            rank, _ = config.shape_of(name.removesuffix(f".{part}"))
            raise CheckpointError(
                f"{path}: {name.removesuffix('.weight')} is {tuple(value.shape)}, the base model with r {rank} needs "
                f"{tuple(parameter.shape)}"
            )
        loaded = value.to(device=None if parameter.is_meta else parameter.device, dtype=parameter.dtype)
        setattr(owner, owner.PARTS[part], nn.Parameter(loaded))


def _check_base(model: nn.Module, path: Path, stored: Mapping[str, Tensor]) -> None:
    """Raise unless these are the base's own: PEFT writes the matrix below an adapted embedding or head, too."""
    for name, value in stored.items():
        weight = dict(model.named_parameters(remove_duplicate=False)).get(name.removesuffix(_BASE) + ".weight")
        if weight is None or weight.shape != value.shape:
            found = "no such matrix" if weight is None else f"one of {tuple(weight.shape)}"
            raise CheckpointError(f"{path} holds {name} of {tuple(value.shape)}, the base model has {found}")
        if not weight.is_meta and not torch.equal(weight, value.to(weight)):
            raise IntegrityError(
                f"{path} holds {name} with other values than the base model: it was trained on another base"
            )


def trained_on(folder: Path) -> Quantization | None:
    """How the base was quantised while the adapter was trained; None if it was not or nothing says so.

    Raises:
        CheckpointError: The record is none.
    """
    meta = folder / META_FILE
    try:
        record = json.loads(meta.read_text("utf-8")) if meta.is_file() else {}
        method = record.get("base", {}).get("quantize")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{meta} does not say which base the adapter belongs to: {error!r}") from error
    if method is not None and method not in get_args(Quantization):
        raise CheckpointError(
            f"{meta}: the base was quantised by {method!r}, expected one of {', '.join(get_args(Quantization))}"
        )
    return method


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
