"""GGUF adapters, which llama.cpp puts on a model while it runs: written from an adapter folder, and made one again.

Shapes: r rank; A (r, in) and B (out, r) of a linear layer; of an embedding of V rows and C columns, A (V, r) in the
file and B (C, r). llama.cpp adds alpha / r B A.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from lit_llama.conversion.gguf.architectures import architecture, entry_of, is_stacked
from lit_llama.conversion.gguf.reader import GGUFTensor
from lit_llama.conversion.gguf.scan import Files, model_name, read_parts
from lit_llama.conversion.gguf.values import orders
from lit_llama.conversion.gguf.writer import add_key, check_file
from lit_llama.conversion.tensors import in_halves, in_pairs
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.manifest import check_folder
from lit_llama.folder.place import aside
from lit_llama.folder.publish import check_space, publish, write_json
from lit_llama.model.adapters.base import base_of, base_record
from lit_llama.model.adapters.lora import adaptable, adapters, apply_lora
from lit_llama.model.adapters.low_rank import LoRAEmbedding, LoRALinear
from lit_llama.model.adapters.peft_folder import (
    CONFIG_FILE,
    META_FILE,
    load_adapter,
    read_adapter_weights,
    save_adapter,
    trained_on,
)
from lit_llama.model.config import LLaMAConfig, LoRAConfig, PlainType
from lit_llama.model.files.weights import Weights
from lit_llama.model.llama import LLaMA
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.wording import call

_A, _B = ".lora_a", ".lora_b"
_ALPHA, _TYPE = "adapter.lora.alpha", "adapter.type"
_KINDS = {"float32": (Kind.F32, 0), "float16": (Kind.F16, 1), "bfloat16": (Kind.BF16, 32)}


def write_adapter(adapter_dir: Path, destination: Path, dtype: str | None = None, base_dir: Path | None = None) -> None:
    """Write an adapter folder as one GGUF file, and say so on stderr.

    Args:
        adapter_dir: The adapter, ours or PEFT's.
        destination: File to make.
        dtype: Of A and B; None is float32, in which they are trained.
        base_dir: Where the base is; None looks for it.

    Raises:
        UserError: The file is there already, or `dtype` packs values.
        CheckpointError: The adapter does not fit its base, or does what no GGUF adapter can say.
    """
    check_file(destination)
    if dtype not in (None, *get_args(PlainType)):
        raise UserError(
            parameter="dtype", value=dtype, expected=f"one of {', '.join(get_args(PlainType))} for an adapter"
        )
    kind, file_type = _KINDS[dtype or "float32"]
    check_folder(adapter_dir)
    base = base_of(adapter_dir, base_dir)
    config = LLaMAConfig.from_folder(base)
    with torch.device("meta"):
        model = LLaMA(config)
    placed = load_adapter(model, adapter_dir, Weights(base))
    remarks = placed.remarks
    if placed.base:
        raise CheckpointError(
            f"{adapter_dir} brings rows of {next(iter(placed.base))} along, which no GGUF adapter can say; "
            f"{_merged(adapter_dir)}"
        )
    tensors, alpha = _tensors(model, config, adapter_dir, getattr(torch, dtype or "float32"))
    keys: dict[str, Any] = {"general.type": "adapter", "general.name": model_name(destination.name)}
    keys |= {"general.file_type": file_type, _TYPE: "lora", _ALPHA: alpha}
    check_space(destination, sum(value.nbytes for value in tensors.values()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with aside(destination) as part, contextlib.closing(gguf.GGUFWriter(part, architecture(config))) as writer:
        for key, value in keys.items():
            add_key(writer, key, value)
        for name, tensor in tensors.items():
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    _say(remarks, adapter_dir, destination, base, len(tensors) // 2)


def _tensors(
    model: nn.Module, config: LLaMAConfig, adapter_dir: Path, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """What the file holds by llama.cpp's names, and its one alpha."""
    modules: dict[str, LoRALinear | LoRAEmbedding] = {}
    for name, module in adapters(model):
        if isinstance(module, LoRALinear | LoRAEmbedding):
            modules[name] = module
        elif module.parts():
            parts = ", ".join(module.parts())
            raise CheckpointError(
                f"{adapter_dir}: {name} has {parts}, which no GGUF adapter can say; {_merged(adapter_dir)}"
            )
    tied = [name for name in modules if config.tie_word_embeddings and name in ("lm_head", "model.embed_tokens")]
    if tied:
        raise CheckpointError(
            f"{adapter_dir}: {tied[0]} is adapted, but embedding and head are one tensor in the base, which llama.cpp "
            f"cannot adapt; {_merged(adapter_dir)}"
        )
    alphas = {name: module.scale * module.lora_A.shape[0] for name, module in modules.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 0.0
    if not alpha:
        raise CheckpointError(f"{adapter_dir} changes nothing: there is no update of low rank, or its alpha is 0")
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        stem = entry_of(config).names(f"{name}.weight") or name
        if is_stacked(stem):
            raise CheckpointError(
                f"{adapter_dir}: {name} is an expert, and those of a layer are one tensor {stem} in GGUF, on which no "
                f"adapter is written; {_merged(adapter_dir)}"
            )
        lora_A, lora_B = module.lora_A.detach(), module.lora_B.detach() * (alphas[name] / alpha)
        if isinstance(module, LoRAEmbedding):
            lora_A = lora_A.t()
        if entry_of(config).paired:
            lora_B = in_pairs(f"{name}.weight", lora_B, config)
        rows, columns = orders(f"{name}.weight", config)
        lora_A = lora_A if columns is None else lora_A[:, columns]
        lora_B = lora_B if rows is None else lora_B[rows]
        found |= {f"{stem}{_A}": lora_A.to(dtype), f"{stem}{_B}": lora_B.to(dtype)}
    if lost := [name for name, value in found.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{adapter_dir}: {lost[0]} has values that are not finite in {str(dtype)[6:]}")
    return found, alpha


def _say(remarks: tuple[str, ...], adapter_dir: Path, destination: Path, base: Path, count: int) -> None:
    lines = list(remarks)
    if method := trained_on(adapter_dir):
        lines.append(f"trained on {base} quantised to {method}; on other weights it is another model than was trained")
    if (template := adapter_dir / TEMPLATE_FILE).is_file():
        lines.append(f"no GGUF adapter holds a chat template: llama-cli --jinja --chat-template-file {template}")
    lines.append(
        f"{destination}: an adapter of {count} modules, for a GGUF file of {base}: llama-cli --lora {destination}"
    )
    for line in lines:
        stderr().print(line)


def read_adapter(path: Path, base_dir: Path, destination: Path) -> None:
    """Make an adapter folder of a GGUF adapter.

    Args:
        path: The file.
        base_dir: The base model that it belongs to.
        destination: Folder to make.

    Raises:
        CheckpointError: It is no such file, or does not fit the base.
    """
    files, config = read_parts(path), LLaMAConfig.from_folder(base_dir)
    try:
        alpha = _read_alpha(files.metadata, architecture(config))
        updates = _updates(files, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = LLaMA(config)
        lora = _settings(path, model, updates, alpha)
        apply_lora(model, lora)
    for name, module in adapters(model):
        assert isinstance(module, LoRALinear | LoRAEmbedding)
        lora_A, lora_B = updates[name]
        module.lora_A, module.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    with publish(destination, CONFIG_FILE) as folder:
        save_adapter(model, lora, folder, str(base_dir))
        read_adapter_weights(folder)  # refuses one that was never trained
        source = {"path": str(path), "kind": "GGUF adapter"}
        write_json(folder / META_FILE, {"format": 1, "base": base_record(base_dir), "source": source})


def _read_alpha(metadata: Mapping[str, Any], expected: str) -> float:
    for key, wanted in {"general.type": "adapter", _TYPE: "lora", "general.architecture": expected}.items():
        if metadata.get(key) != wanted:
            raise CheckpointError(f"{key} is {metadata.get(key)!r}, an adapter for this base has {wanted!r}")
    for key, value in metadata.items():
        if key.startswith("adapter.") and key not in (_TYPE, _ALPHA) and value:
            raise CheckpointError(f"{key} is {value!r}, which is not implemented")
    alpha = metadata.get(_ALPHA, 0.0)
    if not isinstance(alpha, float):
        raise CheckpointError(f"{_ALPHA} is {alpha!r}, expected a number")
    return alpha


def _updates(files: Files, config: LLaMAConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, as Hugging Face has them."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, (part, extent) in files.tensors.items():
        stem, ending = name[: -len(_A)], name[-len(_A) :]
        native = entry_of(config).native_name(stem)
        if ending not in (_A, _B) or native is None or not native.endswith(".weight"):
            raise CheckpointError(f"tensor {name} has no place in an adapter of a LLaMA model")
        if is_stacked(stem):
            raise CheckpointError(f"tensor {name} is an update of stacked experts, which is not read")
        if len(extent.shape) != 2:
            raise CheckpointError(f"tensor {name} is {extent.shape}, expected a matrix")
        pairs.setdefault(native, {})[ending] = GGUFTensor.at(part, name, extent).read(torch.float32)
    updates = {}
    for native, pair in pairs.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{entry_of(config).names(native)} has {next(iter(pair))[1:]} alone, expected lora_a and lora_b"
            )
        lora_A, lora_B = pair[_A], pair[_B]
        if native == "model.embed_tokens.weight":
            lora_A = lora_A.t().contiguous()
        if entry_of(config).paired:
            lora_B = in_halves(native, lora_B, config)
        rows, columns = orders(native, config)
        if (columns is not None and len(columns) != lora_A.shape[1]) or (rows is not None and len(rows) != len(lora_B)):
            raise CheckpointError(f"{name} has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}, which do not fit")
        lora_A = lora_A if columns is None else lora_A[:, columns.argsort()]
        lora_B = lora_B if rows is None else lora_B[rows.argsort()]
        updates[native.removesuffix(".weight")] = lora_A, lora_B
    return updates


def _settings(path: Path, model: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> LoRAConfig:
    """The settings of PEFT that scale each update as llama.cpp does; they fit the model."""
    able = adaptable(model)
    for name, (lora_A, lora_B) in updates.items():
        if name not in able:
            raise CheckpointError(f"{path}: {name} is no layer of this base that can be adapted")
        weight = able[name].get_parameter("weight")
        out, width = reversed(weight.shape) if isinstance(able[name], nn.Embedding) else weight.shape
        if lora_A.shape[1] != width or lora_B.shape[0] != out or lora_A.shape[0] != lora_B.shape[1]:
            found = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
            raise CheckpointError(f"{path}: {name} has {found}; this base needs A (r, {width}) and B ({out}, r)")
    if not updates:
        raise CheckpointError(f"{path} holds no update")
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in updates.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: own for name, own in ranks.items() if own != rank}
    last = sorted({name.rpartition(".")[2] for name in updates})
    alike = {name for name in able if name.rpartition(".")[2] in last}
    return LoRAConfig(
        r=rank,
        alpha=alpha or rank,  # without alpha nothing is scaled
        target_modules=last if alike == updates.keys() else sorted(updates),
        rank_pattern=pattern,
        alpha_pattern={} if alpha else {name: float(own) for name, own in pattern.items()},
    )


def _merged(adapter_dir: Path) -> str:
    """The way out where an adapter has no form of its own."""
    return f"merge it into its base instead: {call('merge', adapter_dir=adapter_dir, format='gguf')}"
