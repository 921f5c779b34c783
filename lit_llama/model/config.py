"""Shapes and settings of the model family and of its adapters. Imports no torch, so that `--help` stays quick."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, UserError

# Fields of a Hugging Face config.json that change the mathematics, with the only values this model computes.
# Anything else in them is refused, because ignoring it would give wrong logits in silence.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
}
_MODEL_TYPES = ("llama",)


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig:
    """Shape of a LLaMA model, named as in config.json of Hugging Face (Touvron et al. 2023, arXiv:2302.13971).

    Args:
        vocab_size: Rows of the embedding (R), at least the number of tokens of the tokenizer.
        hidden_size: Width of the residual stream (C).
        intermediate_size: Width of the MLP (I).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H).
        num_key_value_heads: Key/value heads (G); fewer than H is grouped-query attention.
        head_dim: Size of one head (D).
        max_position_embeddings: Longest sequence the model was trained on, in tokens.
        rms_norm_eps: Added to the mean square before the root.
        rope_theta: Base of the rotary frequencies.
        tie_word_embeddings: The output head is the embedding matrix.
        bos_token_id: Beginning of text, or None.
        eos_token_id: Every id that ends a text.
        pad_token_id: Kept for other programs; nothing here needs padding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value >= 1):
                raise CheckpointError(f"{field.name} is {value!r}, expected a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, rotary embedding needs an even number")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "LLaMAConfig":
        """Read the contents of a config.json, in the spelling of transformers 4 or 5.

        Raises:
            CheckpointError: A field is missing, or asks for mathematics this model does not compute.
        """
        if raw.get("model_type") not in _MODEL_TYPES:
            raise CheckpointError(f"model_type is {raw.get('model_type')!r}, expected one of {', '.join(_MODEL_TYPES)}")
        for name, allowed in _FIXED.items():
            if raw.get(name, allowed[0]) not in allowed:
                raise CheckpointError(f"{name} is {raw[name]!r}, only {allowed[0]!r} is implemented")
        missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size") if name not in raw]
        missing += [name for name in ("num_hidden_layers", "num_attention_heads") if name not in raw]
        if missing:
            raise CheckpointError(f"missing {', '.join(missing)}")
        heads = raw["num_attention_heads"]
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(raw),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_token_id=raw.get("pad_token_id"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "LLaMAConfig":
        """Read `folder/config.json`; errors name the file."""
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist; a checkpoint folder has config.json, *.safetensors and tokenizer files. "
                "Make one with prepare/checkpoint.py"
            )
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (ValueError, AttributeError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{path} is not a model configuration: {error}") from error

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """Contents of config.json as transformers 4 and 5 both read it; `dtype` such as "bfloat16"."""
        eos = list(self.eos_token_id)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": dtype,
        }


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters with both inside."""
    theta = raw.get("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{name}: rope_type is {kind!r}, only 'default' is implemented")
        theta = rope.get("rope_theta", theta)
    return float(theta)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of one decoder layer, which `all-linear` stands for."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters: y = W x + (alpha / r) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of A (r, in) and B (out, r).
        alpha: The update is scaled by alpha / r.
        dropout: Probability of dropping an element of the input of A while training.
        target_modules: all-linear, or names of linear layers such as q_proj,v_proj.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"--lora.r is {self.r}, expected 1 or more")
        if not self.alpha > 0:
            raise UserError(f"--lora.alpha is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        if not all(self.targets):
            raise UserError("--lora.target_modules is empty, expected all-linear or names such as q_proj,v_proj")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.r

    @property
    def targets(self) -> list[str]:
        """Names of the linear layers to adapt."""
        if self.target_modules == "all-linear":
            return list(LINEARS)
        names = self.target_modules
        return [name.strip() for name in names.split(",")] if isinstance(names, str) else names or [""]
