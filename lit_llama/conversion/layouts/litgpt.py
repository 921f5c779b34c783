"""litgpt's layout, lit_model.pth beside model_config.yaml -> a Source.

Rows of q and k stand as in Hugging Face's files. q, k and v are one matrix: laid end to end as `attn.qkv`, or, in older
files, group after group as `attn.attn`: the queries of a key/value head, then its key, then its value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_llama.conversion.native import companions
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
from lit_llama.conversion.tensors import same
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.files.weights import Stored
from lit_llama.objects import ObjectError, load_yaml, read_text
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import read_object

FILE, SHAPE_FILE = "lit_model.pth", "model_config.yaml"
PARTS = ("q_proj", "k_proj", "v_proj")
FUSED = {"attn.qkv.weight": "end to end", "attn.attn.weight": "group after group"}
_INNER = {
    "self_attn.o_proj.weight": "attn.proj.weight",
    "mlp.gate_proj.weight": "mlp.fc_1.weight",
    "mlp.up_proj.weight": "mlp.fc_2.weight",
    "mlp.down_proj.weight": "mlp.proj.weight",
    "input_layernorm.weight": "norm_1.weight",
    "post_attention_layernorm.weight": "norm_2.weight",
}
_OUTER = {EMBEDDING: "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight", HEAD: HEAD}

# What changes the computation, with the value of a LLaMA. The first five have another default in litgpt.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm",),
    "mlp_class_name": ("LLaMAMLP",),
    "rotary_percentage": (1.0,),
    "parallel_residual": (False,),
    "bias": (False,),
    "attn_bias": (False, None),
    "lm_head_bias": (False, None),
    "norm_qk": (False, None),
    "post_attention_norm": (False, None),
    "post_mlp_norm": (False, None),
    "shared_attention_norm": (False, None),
    "scale_embeddings": (False, None),
    "attention_scores_scalar": (None,),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "sliding_window_size": (None,),
    "rope_condense_ratio": (1, None),
    "rope_local_base_freq": (None,),
    "latent_attention": (None,),
    "n_expert": (0, None),
}


def open_litgpt(path: Path, tensors: Mapping[str, Stored]) -> Source:
    """Open the model in litgpt's folder.

    Args:
        path: Its lit_model.pth.
        tensors: What the file holds.

    Raises:
        CheckpointError: model_config.yaml is missing or does not fit, or the model is no LLaMA.
    """
    folder = path.parent
    shape = _read_shape(folder / SHAPE_FILE)
    fused = next((name for name in FUSED if f"transformer.h.0.{name}" in tensors), "attn.qkv.weight")
    qkv = {f"self_attn.{part}.weight": fused for part in PARTS}
    names = Names(outer=_OUTER, layer="transformer.h.{}.", inner=_INNER | qkv)
    if any(name not in tensors for name in _OUTER.values()):
        raise CheckpointError(f"{path}: {', '.join(_OUTER.values())} are not all there")
    tied = same(tensors[_OUTER[EMBEDDING]], tensors[HEAD])
    config = _config(folder, shape, tensors[_OUTER[EMBEDDING]].shape[0], tied)
    wanted = {name: names(name) or "" for name in expected_shapes(config)}
    check_stored(path, {*wanted.values(), HEAD}, tensors)

    def ranges(name: str) -> list[tuple[int, int]]:
        part = name.split(".")[-2]
        if part in PARTS:
            return _rows(part, config, fused)
        return [(0, tensors[wanted[name]].shape[0])]

    def read(name: str) -> torch.Tensor:
        parts = [tensors[wanted[name]].read(*rows) for rows in ranges(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def spec(name: str) -> tuple[str, tuple[int, ...]]:
        tensor = tensors[wanted[name]]
        return NAMES[tensor.dtype], (sum(stop - start for start, stop in ranges(name)), *tensor.shape[1:])

    for layer in range(config.num_hidden_layers):
        rows, found = _fused_rows(config), tensors[f"transformer.h.{layer}.{fused}"].shape
        if found != (rows, config.hidden_size):
            raise CheckpointError(f"{path}: {fused} of layer {layer} is {found}, {SHAPE_FILE} asks for {rows} rows")
    source = Source(
        path=path,
        kind="litgpt",
        config=settings(config),
        specs={name: spec(name) for name in wanted},
        read=read,
        files=companions(folder),
        notes={"qkv": FUSED[fused], "head": "the embedding" if tied else "its own"},
    )
    check_shapes(source)
    return source


def _read_shape(path: Path) -> dict[str, Any]:
    try:
        shape = load_yaml(read_text(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; litgpt writes it beside {FILE}") from error
    except ObjectError as error:
        raise CheckpointError(f"{path} {error}") from error
    if not isinstance(shape, dict):
        raise CheckpointError(f"{path} is not a mapping of names to values")
    for name, allowed in _FIXED.items():
        if shape.get(name) not in allowed:
            raise CheckpointError(f"{path}: {name} is {shape.get(name)!r}, only {allowed[0]!r} is implemented")
    return shape


def _config(folder: Path, shape: Mapping[str, Any], rows: int, tied: bool) -> LLaMAConfig:
    """The shape as litgpt names it; ids from the settings beside it, else from the tokenizer."""
    ids = read_object(folder / "config.json") | read_object(folder / "generation_config.json")
    if not isinstance(ids.get("eos_token_id"), int | list):
        tokenizer = Tokenizer.from_path(folder)
        ids = {"bos_token_id": tokenizer.control.get(tokenizer.bos), "eos_token_id": tokenizer.eos_id}
    eos = ids["eos_token_id"]
    try:
        heads = shape["n_head"]
        return LLaMAConfig(
            vocab_size=rows,
            hidden_size=shape["n_embd"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["n_layer"],
            num_attention_heads=heads,
            num_key_value_heads=shape.get("n_query_groups") or heads,
            head_dim=shape.get("head_size") or shape["n_embd"] // heads,
            max_position_embeddings=shape["block_size"],
            rms_norm_eps=float(shape["norm_eps"]),
            rope_theta=float(shape["rope_base"]),
            rope_scaling=_rope_scaling(shape.get("rope_adjustments")),
            tie_word_embeddings=tied,
            bos_token_id=ids.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else (eos,),
        )
    except (CheckpointError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / SHAPE_FILE} does not describe a model: {error!r}") from error


def _rope_scaling(adjustments: Any) -> RopeScaling | None:
    if not adjustments:
        return None
    values = dict(adjustments)
    if set(values) != {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}:
        raise CheckpointError(f"rope_adjustments is {values!r}, only that of Llama 3.1 is implemented")
    return RopeScaling(
        rope_type="llama3", original_max_position_embeddings=values.pop("original_max_seq_len"), **values
    )


def _fused_rows(config: LLaMAConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def _rows(part: str, config: LLaMAConfig, fused: str) -> list[tuple[int, int]]:
    """Where the rows of q, k or v lie in the one matrix, in order."""
    size, groups = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // groups * size  # rows of the queries of one group
    if FUSED[fused] == "end to end":
        queries, size, groups = queries * groups, size * groups, 1
    start, stop = {
        "q_proj": (0, queries),
        "k_proj": (queries, queries + size),
        "v_proj": (queries + size, queries + 2 * size),
    }[part]
    step = queries + 2 * size
    return [(group * step + start, group * step + stop) for group in range(groups)]
