"""lit-llama's layout, one .pth with q, k and v in one matrix and no settings beside it <-> a Source.

Rotary partners lie side by side, as in Meta's files; embedding and head are padded to a multiple of 64 rows. A torch
file of another program is told by the names of its tensors, and refused with the way out.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.conversion.layouts.litgpt import FILE as LITGPT_FILE
from lit_llama.conversion.layouts.litgpt import PARTS, open_litgpt
from lit_llama.conversion.source import (
    EMBEDDING,
    HEAD,
    NAMES,
    Names,
    Source,
    check_shapes,
    check_stored,
    expected_shapes,
    settings,
)
from lit_llama.conversion.tensors import halves_from_pairs, in_halves, in_pairs, same
from lit_llama.conversion.tokens import read_vocabulary, write_tokenizer_model
from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import check_space, publish, write_json
from lit_llama.model.adapters.base import base_record
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, META_FILE, read_adapter_weights, save_adapter
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.pth.files import read_pth, write_pth
from lit_llama.model.files.weights import Spec, Stored, byte_size, check_names
from lit_llama.model.llama import LLaMA
from lit_llama.wording import call, param

_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"\.adapter_wte\.|\.gating_factor$|\.adapter_(?:bias|scale)$",
        "holds LLaMA-Adapter weights of lit-llama (adapter_wte, gating_factor), which are no LoRA and have no layout "
        "that other programs read: train a LoRA on the same data with {finetune}",
    ),
    (
        r"\.quant_weight$|\.qweight$|\.qzeros$",
        "holds weights quantised with GPTQ, which are not read here: convert the 16-bit file that they were made from, "
        "and hold that in few bits with {quantize}",
    ),
    (
        r"\.attn\.(?:qkv|proj)\..*lora_[AB]$|\.mlp\.fc_\d\..*lora_[AB]$|\.lm_head\..*lora_[AB]$",
        "is a LoRA of litgpt: let litgpt put it into its base (litgpt merge_lora), and convert the folder of that",
    ),
    (
        r"^layers\.\d+\.attn\.q_proj\.lora_a\.weight$",
        "is a LoRA of torchtune: let torchtune write PEFT's layout (adapter_model with adapter_config.json beside it)",
    ),
    (
        r"^layers\.\d+\.attn\.[qkv]_proj\.weight$|\.sa_norm\.scale$",
        "holds weights in torchtune's own names: let torchtune write Hugging Face's layout (FullModelHFCheckpointer)",
    ),
    (
        r"^layers\.\d+\.attention\.w[qkvo]\.weight$",
        "is a part of Meta's layout: name the folder, in which the parts are called consolidated.00.pth and so on and "
        "params.json and tokenizer.model lie",
    ),
    (
        r"lora_[AB](?:\.\w+)?\.weight$",
        "is a PEFT adapter: call it adapter_model.bin, put its adapter_config.json beside it, and use that folder",
    ),
    (
        r"^(?:module\.|_orig_mod\.)*model\.layers\.\d+\.self_attn\.",
        "holds weights in Hugging Face's names: call it pytorch_model.bin, put config.json and the tokenizer files "
        "beside it, and name that folder",
    ),
)


def foreign_kind(path: Path, names: Iterable[str]) -> str | None:
    """Describe what a torch file of no layout converted here holds, as a sentence about `path`; None if unknown."""
    known = list(names)
    for pattern, what in _KINDS:
        if any(re.search(pattern, name) for name in known):
            names_of = {"finetune": call("finetune"), "quantize": param("quantize")}
            return f"{path} {what.format(**names_of)}"
    return None


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


FILE = "lit-llama.pth"
HEAD_DIM = 128
"""Head size of every model that lit-llama knows; the file does not say it."""

_FUSED = "attn.c_attn.weight"
_NAMES = Names(
    outer={EMBEDDING: "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.scale", HEAD: HEAD},
    layer="transformer.h.{}.",
    inner={
        **{f"self_attn.{part}.weight": _FUSED for part in PARTS},
        "self_attn.o_proj.weight": "attn.c_proj.weight",
        "mlp.gate_proj.weight": "mlp.c_fc1.weight",
        "mlp.up_proj.weight": "mlp.c_fc2.weight",
        "mlp.down_proj.weight": "mlp.c_proj.weight",
        "input_layernorm.weight": "rms_1.scale",
        "post_attention_layernorm.weight": "rms_2.scale",
    },
)
_EPS = {(4096, 32): 1e-6, (5120, 40): 1e-6, (6656, 60): 1e-6, (8192, 80): 1e-5}
"""rms_norm_eps of LLaMA 1 by hidden_size and layers."""

_THETA, _CONTEXT, _PADDING = 10000.0, 2048, 64


def open_lit(path: Path, rms_norm_eps: float | None = None) -> Source:
    """Open the model in lit-llama's .pth, or in a folder with litgpt's lit_model.pth.

    Args:
        path: The file, or a folder that holds lit-llama.pth or lit_model.pth. lit-llama's tokenizer.model lies in the
            folder of the file or above.
        rms_norm_eps: Epsilon of the norms, which lit-llama's file does not hold; that of LLaMA 1 if left out.

    Raises:
        CheckpointError: It is neither, or more would have to be known.
    """
    if path.is_dir():
        path = path / (LITGPT_FILE if (path / LITGPT_FILE).is_file() else FILE)
    tensors = read_pth(path)
    if (foreign := foreign_kind(path, tensors)) is not None:
        raise CheckpointError(foreign)
    if any(".norm_1." in name for name in tensors):
        return open_litgpt(path, tensors)
    if any(name.endswith(".lora_A") for name in tensors):
        raise CheckpointError(f"{path} is a LoRA of lit-llama: name the converted base model with {param('base_dir')}")
    config, notes = _config(path, tensors, rms_norm_eps)
    vocabulary = read_vocabulary(path.parent, config.vocab_size, _CONTEXT)
    config = replace(config, bos_token_id=vocabulary.bos, eos_token_id=vocabulary.eos)
    names = {name: _NAMES(name) or "" for name in expected_shapes(config)}
    check_stored(path, {*names.values(), HEAD}, tensors)

    def rows(name: str) -> tuple[int, int]:
        stored, part = tensors[names[name]], name.split(".")[-2]
        third = stored.shape[0] // 3
        return (PARTS.index(part) * third, (PARTS.index(part) + 1) * third) if part in PARTS else (0, stored.shape[0])

    def spec(name: str) -> Spec:
        start, stop = rows(name)
        stored = tensors[names[name]]
        return NAMES[stored.dtype], (stop - start, *stored.shape[1:])

    source = Source(
        path=path,
        kind="lit-llama",
        config=settings(config),
        specs={name: spec(name) for name in names},
        read=lambda name: in_halves(name, tensors[names[name]].read(*rows(name)), config),
        files=vocabulary.files,
        notes=notes,
    )
    check_shapes(source)
    return source


def _config(path: Path, tensors: Mapping[str, Stored], eps: float | None) -> tuple[LLaMAConfig, dict[str, Any]]:
    """Sizes from the tensors, the rest as lit-llama computes it, and what was decided."""
    outlines = ("transformer.wte.weight", HEAD, "transformer.h.0.mlp.c_fc1.weight")
    if any(name not in tensors or len(tensors[name].shape) != 2 for name in outlines):
        found = ", ".join(list(tensors)[:4]) or "nothing"
        raise CheckpointError(f"{path} holds no weights of lit-llama or litgpt (found: {found} ...)")
    rows, width = tensors[outlines[0]].shape
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    notes = {"rms_norm_eps": f"as given by {param('rms_norm_eps')}"}
    if eps is None:
        eps = _EPS.get((width, layers))
        notes["rms_norm_eps"] = f"of LLaMA 1 of this size; for another model give {param('rms_norm_eps')}"
    if eps is None:
        raise CheckpointError(
            f"{path} does not say its rms_norm_eps, and no LLaMA 1 has {layers} layers of {width}: give "
            f"{param('rms_norm_eps')} "
            "(1e-06 in most of LLaMA 1, 1e-05 later)"
        )
    if width % HEAD_DIM:
        raise CheckpointError(f"{path}: the width {width} is no multiple of {HEAD_DIM}, lit-llama's head size")
    config = LLaMAConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=tensors[outlines[2]].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=eps,
        rope_theta=_THETA,
        tie_word_embeddings=same(tensors[outlines[0]], tensors[HEAD]),
    )
    notes |= {
        "heads": f"{width // HEAD_DIM} of {HEAD_DIM}, as in every size of lit-llama; the file does not say",
        "context": f"{_CONTEXT} tokens as in LLaMA 1; the file does not say",
    }
    return config, notes


def write_lit(source: Source, destination: Path) -> None:
    """Write a model as lit-llama reads it: lit-llama.pth and tokenizer.model. It computes with an epsilon of 1e-05.

    Args:
        source: The model.
        destination: Folder to make.

    Raises:
        CheckpointError: lit-llama cannot compute this model.
    """
    check_shapes(source)
    _check_expressible(source)
    parts: dict[str, list[str]] = {}  # what each tensor of lit-llama's is made of
    for name in dict.fromkeys([*expected_shapes(source.shape), HEAD]):
        if (lit := _NAMES(name)) is None:
            raise CheckpointError(f"{source.path}: {name} has no place in lit-llama's layout")
        parts.setdefault(lit, []).append(name)
    specs = {lit: _joined_spec(source, names) for lit, names in parts.items()}

    def produce(lit: str) -> Tensor:
        whole = torch.cat(
            [in_pairs(name, source.read(_stored_name(source, name)), source.shape) for name in parts[lit]]
        )
        padding = specs[lit][1][0] - whole.shape[0]
        return F.pad(whole, (0, 0, 0, padding)) if padding else whole

    with publish(destination, FILE) as folder:
        check_space(destination, sum(map(byte_size, specs.values())))
        write_pth(folder / FILE, specs, produce)
        write_tokenizer_model(folder, source.files)


def _check_expressible(source: Source) -> None:
    """lit-llama derives all but two sizes from the width, and knows one way to compute."""
    config = source.shape
    width = 256 * -(-int(8 * config.hidden_size / 3) // 256)
    values: dict[str, tuple[Any, Any]] = {
        "head_dim": (config.head_dim, HEAD_DIM),
        "num_attention_heads": (config.num_attention_heads, config.hidden_size // HEAD_DIM),
        "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
        "intermediate_size": (config.intermediate_size, width),
        "rope_theta": (config.rope_theta, _THETA),
        "rope_scaling": (config.rope_scaling, None),
        "sliding_window": (config.sliding_window, None),
        "beyond_llama": (config.beyond_llama, ""),
    }
    for name, (found, only) in values.items():
        if found != only:
            raise CheckpointError(
                f"{source.path}: {name} is {found!r}, lit-llama computes only {only!r} for this width"
            )


def _stored_name(source: Source, name: str) -> str:
    return name if name in source.specs else EMBEDDING  # a tied head


def _joined_spec(source: Source, names: list[str]) -> Spec:
    specs = [source.specs[_stored_name(source, name)] for name in names]
    if len({dtype for dtype, _ in specs}) > 1:
        raise CheckpointError(
            f"{source.path}: {', '.join(names)} are of several dtypes; name one with {param('dtype')}"
        )
    dtype, (_, *rest) = specs[0]
    rows = sum(shape[0] for _, shape in specs)
    return dtype, (rows + (-rows % _PADDING if names[0] in (EMBEDDING, HEAD) else 0), *rest)
