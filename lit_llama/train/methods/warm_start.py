"""A run that begins with an adapter, ours or PEFT's: its shape, its values, and proof that the base is its own."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.manifest import check_folder
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.adapters.peft_folder import META_FILE, base_of, load_adapter
from lit_llama.model.adapters.rows import TrainedRows, Whole
from lit_llama.model.config import ALL_LINEAR, LLaMAConfig, LoRAConfig
from lit_llama.model.files.weights import Weights, weight_files
from lit_llama.model.llama import LLaMA
from lit_llama.objects import as_object, read_text
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.wording import call, param

OWN = ("dropout", "loraplus_lr_ratio")
"""Of LoRAConfig: how an adapter is trained, which each run says for itself."""


@dataclass(frozen=True)
class Start:
    """An adapter as it was found.

    Args:
        folder: Where.
        values: Its tensors, by the full name of the module, a dot, and the name of the part in PEFT's files.
        fingerprint: A hash over all of them.
    """

    folder: Path
    values: Mapping[str, Tensor]
    fingerprint: str

    def put_on(self, model: LLaMA) -> None:
        """Copy the values into the adapters of `model`."""
        with torch.no_grad():
            for name, module in adapters(model):
                for part, parameter in module.parts().items():
                    parameter.copy_(self.values[f"{name}.{part}"])


def read_start(adapter_dir: Path, base: Path, asked: LoRAConfig) -> tuple[LoRAConfig, Start]:
    """Read the adapter to begin with, and its shape for a run of its own.

    What its files name in another way than this program (by layers, say, or with modules that are no targets) is
    named module by module, so that the adapter of the run has the modules of this one and no others.

    Args:
        adapter_dir: Its folder.
        base: Checkpoint folder, of which config.json is read.
        asked: What the flags say: of the shape nothing, or the same; the rest of `OWN` counts.

    Raises:
        CheckpointError: The adapter cannot be used, or does not fit the base.
        UserError: The flags ask for another shape.
    """
    with torch.device("meta"):
        frame, twin = LLaMA(LLaMAConfig.from_folder(base)), LLaMA(LLaMAConfig.from_folder(base))
    placed = load_adapter(frame, adapter_dir, _weights(base))  # it alone has values
    for remark in placed.remarks:
        stderr().print(remark)
    found = dict(adapters(frame))
    if rows := [name for name, module in found.items() if isinstance(module, TrainedRows)]:
        raise CheckpointError(
            f"{adapter_dir} has trained rows of {rows[0]} (trainable_token_indices), which cannot go on training here: "
            f"make it part of its base with {call('merge')}, and begin a new adapter on that, with "
            f"{param('lora.modules_to_save')} where the rows are to train"
        )
    if placed.base:
        raise CheckpointError(
            f"{adapter_dir} brings rows of {next(iter(placed.base))} along that are not its base's: make it part of "
            f"its base with {call('merge')}, and begin a new adapter on that"
        )
    config = _trainable(placed.lora, adapter_dir, asked)
    with suppress(UserError):  # of names that mean nothing here, where the tensors say what is meant
        apply_lora(twin, config)
    if {name: _shapes(module) for name, module in adapters(twin)} != {name: _shapes(m) for name, m in found.items()}:
        copied = [name for name, module in found.items() if isinstance(module, Whole)]
        config = replace(config, target_modules=[name for name in found if name not in copied], modules_to_save=copied)
    recurrent = bool(frame.config.recurrent_layers)
    shape, default = _shape(config, recurrent), _shape(LoRAConfig(), recurrent)
    for name, given in _shape(asked, recurrent).items():
        read = shape[name]
        if given not in (default[name], read):
            raise UserError(
                f"{param(f'lora.{name}')} is {given}, but the adapter of {adapter_dir} has {read}; leave it out: the "
                "shape comes "
                "from the adapter"
            )
    values = {f"{name}.{part}": value.detach() for name, m in found.items() for part, value in m.parts().items()}
    return config, Start(adapter_dir, values, _hash(values))


def _weights(base: Path) -> Weights | None:
    """The weights of the base, for what an adapter holds of them; a plan may be made without any."""
    try:
        weight_files(base)
    except CheckpointError:
        return None
    return Weights(base)


def _trainable(found: LoRAConfig, adapter_dir: Path, asked: LoRAConfig) -> LoRAConfig:
    """The settings of a trained adapter as those of a run, which ask for an update that is scaled by more than 0."""
    settings = {field.name: getattr(found, field.name) for field in fields(LoRAConfig)}
    try:
        return LoRAConfig(**settings | {name: getattr(asked, name) for name in OWN})
    except UserError as error:
        raise CheckpointError(f"{adapter_dir} cannot go on training: {error}") from error


def _shape(config: LoRAConfig, recurrent: bool) -> dict[str, Any]:
    """The settings of a shape, names of modules in one order."""
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in OWN}
    targets = list(ALL_LINEAR[:1]) if config.covers_linears(recurrent=recurrent) else sorted(config.targets)
    return settings | {"target_modules": targets, "modules_to_save": sorted(config.saved)}


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.parts().items()}  # type: ignore[operator]


def _hash(values: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(json.dumps([name, list(value.shape)]).encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_base(adapter_dir: Path, checkpoint_dir: Path | None) -> Path:
    """Find the base of an adapter: the folder that is named, or the one that the adapter names; proven where it can be.

    Raises:
        CheckpointError: There is none.
        IntegrityError: It is another than the adapter was trained on.
    """
    check_folder(adapter_dir)
    base = base_of(adapter_dir, checkpoint_dir, name="checkpoint_dir")
    if checkpoint_dir is not None and not _recorded_base(adapter_dir):
        stderr().print(
            f"{adapter_dir} does not say by a fingerprint which base it was trained on; {checkpoint_dir} is taken for "
            "it, if its shapes fit",
        )
    return base


def _recorded_base(adapter_dir: Path) -> str | None:
    path = adapter_dir / META_FILE
    try:
        meta = as_object(read_text(path)) if path.is_file() else {}
        found = meta.get("base", {}).get("fingerprint")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say which base the adapter belongs to: {error!r}") from error
    return found if isinstance(found, str) else None


def remark_on_style(adapter_dir: Path, data_dir: Path) -> None:
    """Say where the data asks in another way than the adapter was trained to be asked."""
    before, now = adapter_dir / TEMPLATE_FILE, data_dir / TEMPLATE_FILE
    if before.is_file() and now.is_file() and before.read_bytes() != now.read_bytes():
        stderr().print(
            f"{data_dir} has another prompt style than {adapter_dir} was trained with: the result is asked in that of "
            "the data",
        )
