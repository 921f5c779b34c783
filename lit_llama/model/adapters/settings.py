"""The settings of a PEFT adapter, and which modules they name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.config import LINEARS, LoRAConfig
from lit_llama.model.patterns import check_pattern, matches_start, matches_whole
from lit_llama.model.places import foreign_adapter, no_adapter
from lit_llama.objects import ObjectError, as_json, read_text
from lit_llama.wording import call

CONFIG_FILE = "adapter_config.json"

# Settings of PEFT that change the computation, with the values that leave it as it is here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    # The other ways to start, such as pissa, change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_ROWS = "embed_tokens"
"""The module whose rows a bare list of trainable_token_indices means."""


class _StoredLoRA(LoRAConfig):
    """Settings of an adapter that is trained already, whose updates may be scaled by 0 or less."""

    def _check_alpha(self, name: str, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name} is {value!r}, expected a number")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Contents of an adapter_config.json.

    What it asks for beyond the fields here is carried by the names of the tensors: biases, and `fan_in_fan_out`, which
    means nothing to a linear layer.

    Args:
        path: The file, for messages.
        lora: Rank, scale and variant. Its targets are placeholders where `targets` is no list of names.
        targets: As PEFT has it: names or their ends, a regular expression, all-linear, or None.
        exclude: Modules that are left out: names or their ends, or a regular expression.
        layers: Numbers of the layers to adapt; empty for all.
        layers_pattern: Names of the list of layers that the numbers count.
        tokens: Ids whose rows were trained, by the end of the name of the embedding or head.
        tied: A head tied to a trained embedding stays tied to it.
        base: The base model, a path or a name on the Hub.
        revision: Its revision on the Hub.
    """

    path: Path
    lora: LoRAConfig
    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    base: str = ""
    revision: str | None = None

    @property
    def plain(self) -> bool:
        """Whether the targets say all by themselves, so that LoRAConfig can."""
        listed = isinstance(self.targets, tuple) or self.targets == "all-linear"
        return listed and not (self.exclude or self.layers)

    def names(self, module: str) -> bool | None:
        """Whether an update of low rank of this module is asked for, as PEFT decides it; None if nothing says so."""
        if self.targets is None:
            return None
        if self.exclude and _listed(module, self.exclude):
            return False
        if self.targets == "all-linear":
            return module.rpartition(".")[2] in LINEARS
        if not _listed(module, self.targets):
            return False
        if not self.layers or isinstance(self.targets, str) or module in self.targets:
            return True
        # The first number in a name is that of its layer.
        patterns = [rf"(?:.*?\.)?{pattern}\.{{}}\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.{}\."]
        return any(
            matches_start(pattern.replace("{}", str(number)), module) for pattern in patterns for number in self.layers
        )


def read_settings(folder: Path) -> AdapterSettings:
    """Read the settings of an adapter folder, ours or PEFT's.

    Raises:
        CheckpointError: It is no LoRA adapter, or of a variant that is not implemented.
    """
    path = folder / CONFIG_FILE
    raw = _read(path)
    for key, neutral in _NEUTRAL.items():
        if raw.get(key, neutral[0]) not in neutral:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which is not implemented (only {neutral[0]!r})")
    try:
        return _settings(path, raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError) and type(error) is not UserError:
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {what}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = as_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        why = no_adapter(path.parent)
        raise CheckpointError(why or f"{path} does not exist; {call('finetune')} writes adapter folders") from error
    except ObjectError as error:
        raise CheckpointError(f"{path} {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        if foreign := foreign_adapter(path.parent, {entry.name for entry in path.parent.iterdir()}):
            raise CheckpointError(f"{path.parent} {foreign}")
        found = f", found peft_type {raw['peft_type']!r}" if isinstance(raw, dict) and raw.get("peft_type") else ""
        raise CheckpointError(f"{path}: expected an object with peft_type LORA{found}")
    return raw


def _settings(path: Path, raw: Mapping[str, Any]) -> AdapterSettings:
    targets = raw.get("target_modules")
    if targets is not None and targets != "all-linear":
        targets = _pattern_or_names("target_modules", targets)
    named = targets if isinstance(targets, tuple) and targets else "all-linear"
    names = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    variant = {name: raw[name] for name in names if raw.get(name) is not None}
    lora = _StoredLoRA(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        target_modules=named if isinstance(named, str) else list(named),
        **variant,
    )
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or ()
    for pattern in (patterns := (patterns,) if isinstance(patterns, str) else tuple(patterns)):
        check_pattern(pattern)
    layers = () if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    if not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"{path}: layers_to_transform is {layers!r}, expected numbers of layers")
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    return AdapterSettings(
        path=path,
        lora=lora,
        targets=targets,
        exclude=_pattern_or_names("exclude_modules", raw.get("exclude_modules") or ()),
        layers=layers,
        layers_pattern=patterns,
        tokens=_tokens(raw.get("trainable_token_indices")),
        tied=bool(raw.get("ensure_weight_tying")),
        base=base if isinstance(base, str) else "",
        revision=revision if isinstance(revision, str) else None,
    )


def _pattern_or_names(key: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        check_pattern(value)
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key} is {value!r}, expected a list of names or a regular expression")
    return tuple(value)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {_ROWS: value} if value else {}
    for name, ids in by_module.items():
        if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(f"trainable_token_indices is {value!r}, expected ids, or lists of ids by module")
        if len(set(ids)) < len(ids):
            raise UserError(f"trainable_token_indices of {name} names an id twice")
    return {name: tuple(ids) for name, ids in by_module.items()}


def _listed(module: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return matches_whole(wanted, module)
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def describe_targets(settings: AdapterSettings) -> str:
    """Return the setting in a few words, for messages."""
    shown = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
    limits = f" of the layers {', '.join(map(str, settings.layers))}" if settings.layers else ""
    return f"target_modules {re.sub(chr(10), ' ', str(shown))[:100]}{limits}"
