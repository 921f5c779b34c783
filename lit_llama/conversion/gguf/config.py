"""The configuration of a model out of the metadata of a GGUF file."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llama.conversion.gguf.architectures import ARCHITECTURES, architecture
from lit_llama.conversion.gguf.metadata import (
    BETAS,
    EXPERT_COUNTS,
    FACTOR,
    INNER,
    INTERVAL,
    LLAMA3_CONTEXT,
    LOG,
    RECURRENT_KEYS,
    REQUIRED_KEYS,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    TEMPERATURE,
    llama3_divisors,
    rotated_layers,
)
from lit_llama.conversion.source import expected_shapes
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.families import ALL, FAMILIES
from lit_llama.model.family import FULL, LINEAR, SLIDING
from lit_llama.model.rope import attention_factor

_ATTENTION, _OUT, _MLP = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")

# The other keys that are read. One that is not known may change the mathematics, unless it is 0 or false.
_READ = {
    *REQUIRED_KEYS.values(),
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
}
_WINDOW = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
_IGNORED = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal", "expert_used_count"}
# Keys of neighbouring models, with the values other than 0 and false that leave the mathematics as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "logit_scale": (1.0,),
    "expert_weights_scale": (1.0,),
    "expert_weights_norm": (True,),  # which llama.cpp does in these architectures, whatever the key says
    "expert_gating_func": (1,),  # softmax
}
_MAX_SIZE = 2**20  # of whatever a model has: heads, components of a vector
_ENDS = ("eos", "eot", "eom")


class Reading:
    """Metadata of a GGUF file, with errors that name the key.

    Raises:
        CheckpointError: It is of a model that is not implemented.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.architecture: str = metadata.get("general.architecture", "")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"general.architecture is {self.architecture!r}, implemented are {known}")
        self.entry = ARCHITECTURES[self.architecture]

    def get(self, key: str, kind: type = object, default: Any = None) -> Any:
        """Return a value of `<architecture>.*`, or of `tokenizer.*` if the key says so."""
        name = key if key.startswith("tokenizer.") else f"{self.architecture}.{key}"
        value = _uniform(self.metadata.get(name, default))
        if value is None:
            raise CheckpointError(f"the metadata has no {name}")
        if kind is not object and (isinstance(value, bool) or not isinstance(value, kind)):
            raise CheckpointError(f"{name} is {_brief(value)}, expected {kind.__name__}")
        return value

    def config(self, shapes: Mapping[str, tuple[int, ...]], divisors: Mapping[str, Tensor]) -> LLaMAConfig:
        """Return the shape of the model.

        Args:
            shapes: Of the tensors, by Hugging Face's names.
            divisors: The tensors of rotary frequencies, by GGUF's names (D/2,).

        Raises:
            CheckpointError: Something is missing, or asks for mathematics this model does not compute.
        """
        self._refuse_unknown()
        if not self.get("attention.causal", default=True):
            raise CheckpointError(f"{self.architecture}.attention.causal is false, which is not implemented")
        values = {name: self.get(key, float if name == "rms_norm_eps" else int) for name, key in REQUIRED_KEYS.items()}
        heads = values["num_attention_heads"]
        limits = dict.fromkeys(REQUIRED_KEYS, _MAX_SIZE) | {
            "num_hidden_layers": len(shapes),
            "max_position_embeddings": 2**32,
        }
        for name, key in REQUIRED_KEYS.items():  # a model of absurd size must not even be planned
            if name != "rms_norm_eps" and not 1 <= values[name] <= limits[name]:
                raise CheckpointError(f"{self.architecture}.{key} is {values[name]}, which cannot be")
        if "model.embed_tokens.weight" not in shapes:
            raise CheckpointError("tensor token_embd.weight is missing")
        biased = self.architecture == "qwen2" or _has_bias(shapes, _ATTENTION + _OUT)
        head_dim = self.get("attention.key_length", int, values["hidden_size"] // heads)
        rotated = self.get("rope.dimension_count", int, head_dim)
        if self.entry.partial and not 0 < rotated <= head_dim:
            raise CheckpointError(f"{self.architecture}.rope.dimension_count is {rotated}, of {head_dim}")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if self.entry.partial and key == "rope.dimension_count":
                continue
            if self.get(key, int, head_dim) != head_dim or head_dim > _MAX_SIZE:
                raise CheckpointError(f"{self.architecture}.{key} is {self.get(key)}, only {head_dim} is implemented")
        ends = [self.get("tokenizer.ggml.eos_token_id", int)]
        ends += [self.metadata[key] for end in _ENDS[1:] if (key := f"tokenizer.ggml.{end}_token_id") in self.metadata]
        window = self._window(values["num_hidden_layers"])
        experts = self._experts(values["num_hidden_layers"], shapes)
        family = self.entry.experts if experts else self.entry.families[-1 if window and self.entry.windows else 0]
        values |= {
            "model_type": family,
            "vocab_size": shapes["model.embed_tokens.weight"][0],
            "num_key_value_heads": self.get("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "rms_norm_eps": shortest(values["rms_norm_eps"]),
            "rope_theta": shortest(self.get("rope.freq_base", float, 10000.0)),
            "attention_bias": biased,
            "attention_out_bias": biased and self.architecture != "qwen2",
            "mlp_bias": self.entry.paired and _has_bias(shapes, _MLP),
            "partial_rotary_factor": rotated / head_dim,
            "tie_word_embeddings": "lm_head.weight" not in shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": tuple(dict.fromkeys(ends)),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        implied = FAMILIES[family].implied
        values |= {name: value(values) if callable(value) else value for name, value in implied.items()}
        values |= {name: shortest(self.get(key, float)) for name, key in self.entry.keys.items()} | window
        values |= experts
        values |= {name: self.get(key, int) for name, key in self.entry.sizes.items()} | self._recurrent(values)
        if FAMILIES[family].sliding_theta:
            usual = self.entry.local_rope_theta or values["rope_theta"]
            values["local_rope_theta"] = shortest(self.get("rope.freq_base_swa", float, usual))
        if self.architecture == "smollm3":
            values["no_rope_layers"] = rotated_layers(values["num_hidden_layers"])
        context = values["max_position_embeddings"]
        scaling = self._longrope(context, divisors) if ROPE_LONG in divisors else self._scaling(context)
        config = LLaMAConfig(**values, rope_scaling=scaling)
        if "query_pre_attn_scalar" in FAMILIES[family].defaults:
            config = replace(config, query_pre_attn_scalar=self.entry.scalar(config))
        return self._llama3(config, divisors[ROPE_FREQS]) if ROPE_FREQS in divisors else config

    def _experts(self, layers: int, shapes: Iterable[str]) -> dict[str, Any]:
        """Fields of experts; empty if there are none."""
        only = self.entry.experts == self.entry.families[0]
        if not self.entry.experts or not (only or self.get("expert_count", int, 0)):
            return {}
        values = {name: self.get(key, int) for name, key in EXPERT_COUNTS.items()}
        if self.entry.expert_width:
            values["moe_intermediate_size"] = self.get(self.entry.expert_width, int)
        for name, value in values.items():
            if not 1 <= value <= _MAX_SIZE:
                raise CheckpointError(f"{self.architecture}: {name} is {value}, which cannot be")
        there = sum(".experts." in name for name in shapes)
        if (count := values["num_local_experts"]) * layers * 3 > there:  # which must not even be planned
            raise CheckpointError(
                f"{self.architecture}.expert_count is {count}, but the file has {there} matrices of experts, not 3 of "
                f"each in {layers} layers"
            )
        if self.get("expert_weights_norm", default=True) is not True:
            raise CheckpointError(f"{self.architecture}.expert_weights_norm is false, which is not implemented")
        return values | {"norm_topk_prob": True}

    def _recurrent(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of layers of linear attention that follow from others; empty for an architecture without any."""
        if not self.entry.recurrent:
            return {}
        step, inner, heads = self.get(INTERVAL, int, 4), self.get(INNER, int), self.get("ssm.time_step_rank", int)
        if step < 1 or heads < 1 or inner % heads:
            raise CheckpointError(f"{INTERVAL} is {step} and {INNER} {inner} for {heads} heads, which cannot be")
        types = [LINEAR if (layer + 1) % step else FULL for layer in range(values["num_hidden_layers"])]
        return {"linear_value_head_dim": inner // heads, "layer_types": tuple(types) if LINEAR in types else ()}

    def _window(self, layers: int) -> dict[str, Any]:
        """Fields of the window of layers that have one; empty if none do, or the architecture knows of none."""
        if self.entry.unused_window and (size := self.get("attention.sliding_window", int, 0)):
            return {"sliding_window": size}
        if not self.entry.windows or not (size := self.get("attention.sliding_window", int, self.entry.window)):
            return {}
        family = FAMILIES[self.entry.families[-1]]
        types = [family.layer_type({**ALL, **family.defaults}, layer) for layer in range(layers)]
        given = self.metadata.get(f"{self.architecture}.attention.sliding_window_pattern")
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            types = [SLIDING if (layer + 1) % given else FULL for layer in range(layers)]
        elif given is not None and (not isinstance(given, list) or given != [kind == SLIDING for kind in types]):
            key = f"{self.architecture}.attention.sliding_window_pattern"
            raise CheckpointError(f"{key} is {_brief(given)}, only the family's is implemented")
        return {"sliding_window": size, "layer_types": tuple(types) if FULL in types else ()}

    def _refuse_unknown(self) -> None:
        prefix = f"{self.architecture}."
        for name, value in self.metadata.items():
            key = name.removeprefix(prefix)
            known = {*_READ, *_IGNORED, *self.entry.keys.values()} | (_WINDOW if self.entry.windows else set())
            known |= {*self.entry.sizes.values(), *RECURRENT_KEYS} if self.entry.recurrent else set()
            known |= {TEMPERATURE, LOG} if self.entry.temperature else set()
            known |= {"attention.sliding_window"} if self.entry.unused_window else set()
            known |= {*EXPERT_COUNTS.values(), self.entry.expert_width} if self.entry.experts else set()
            if not name.startswith(prefix) or key in known or self._is_neutral(key, _uniform(value)):
                continue
            only = f", only {_NEUTRAL[key][0]!r} is" if key in _NEUTRAL else ", which is not"
            raise CheckpointError(f"{name} is {_brief(value)}{only} implemented")

    def _is_neutral(self, key: str, value: Any) -> bool:
        """Whether a key that is not read leaves the mathematics as it is."""
        if key == FACTOR and "longrope" in FAMILIES[self.entry.families[0]].ropes:
            return True  # which is read beside the divisors
        if key in (FACTOR, "rope.scaling.yarn_attn_factor"):
            return value in _NEUTRAL[key]  # here 0 is a factor, too
        if key == "attention.sliding_window":
            return not value or value >= self.get("context_length", int)
        if key == "attention.scale" and value:
            head_dim = self.get("attention.key_length", int, self._head_dim())
            return isinstance(value, float) and math.isclose(value, head_dim**-0.5, rel_tol=1e-6)
        return not value or value in _NEUTRAL.get(key, ())

    def _head_dim(self) -> int:
        width, heads = self.get("embedding_length", int), self.get("attention.head_count", int)
        return int(width) // max(int(heads), 1)

    def _scaling(self, context: int) -> RopeScaling | None:
        linear = shortest(self.get("rope.scale_linear", float, 1.0)) or 1.0  # how old files say it; 0 is unset
        kind = self.get("rope.scaling.type", str, "none" if linear == 1 else "linear")
        if kind not in ("none", "linear", "yarn"):
            raise CheckpointError(f"{self.architecture}.rope.scaling.type is {kind!r}, not none, linear or yarn")
        if kind == "none":
            return None
        # The share of the frequencies that yarn leaves alone; llama.cpp takes a negative one for the usual.
        extra = self.get("rope.scaling.yarn_ext_factor", float, -1.0)
        if extra >= 0 and extra != (usual := 1.0 if kind == "yarn" else 0.0):
            name = f"{self.architecture}.rope.scaling.yarn_ext_factor"
            raise CheckpointError(f"{name} is {extra!r}, for type {kind!r} only {usual!r} is implemented")
        factor = shortest(self.get("rope.scaling.factor", float, None if linear == 1 else linear))
        if kind == "linear":
            return RopeScaling(rope_type=kind, factor=factor, original_max_position_embeddings=context)
        fast, slow = (shortest(self.get(f"rope.scaling.yarn_{name}", float, only)) for name, only in BETAS.items())
        scaling = RopeScaling(
            rope_type=kind,
            factor=factor,
            original_max_position_embeddings=self.get("rope.scaling.original_context_length", int, context),
            beta_fast=fast,
            beta_slow=slow,
        )
        return self._tempered(scaling) if self.entry.temperature else scaling

    def _tempered(self, scaling: RopeScaling) -> RopeScaling:
        """With queries that are scaled by position, and yarn's factor of DeepSeek."""
        beta, multiplier = (shortest(self.get(key, float, 0.0)) for key in (TEMPERATURE, LOG))
        if multiplier not in (0.0, 1.0):
            raise CheckpointError(f"{self.architecture}.{LOG} is {multiplier!r}, only 1.0 is implemented")
        return replace(scaling, llama_4_scaling_beta=beta or None, attention_factor=1.0 if multiplier else None)

    def _longrope(self, context: int, divisors: Mapping[str, Tensor]) -> RopeScaling:
        """The scaling of Phi-3 that these divisors are of."""
        if ROPE_SHORT not in divisors:
            raise CheckpointError(f"{ROPE_LONG} is there without {ROPE_SHORT}")
        long, short = (tuple(map(shortest, divisors[name].tolist())) for name in (ROPE_LONG, ROPE_SHORT))
        original = self.get("rope.scaling.original_context_length", int, context)
        scaling = RopeScaling(
            rope_type="longrope",
            factor=max(context / original, 1.0),
            original_max_position_embeddings=original,
            short_factor=short,
            long_factor=long,
        )
        given = self.get(FACTOR, float, 1.0)
        usual = math.isclose(given, attention_factor(scaling), rel_tol=1e-6)
        return scaling if usual else replace(scaling, attention_factor=shortest(given))

    def _llama3(self, config: LLaMAConfig, divisors: Tensor) -> LLaMAConfig:
        """With the scaling of Llama 3 that these divisors were made with; only the published bounds are tried."""
        if config.rope_scaling is not None:
            raise CheckpointError(
                f"{ROPE_FREQS} and rope.scaling.type {config.rope_scaling.rope_type!r} exclude each other"
            )
        original = self.get("rope.scaling.original_context_length", int, LLAMA3_CONTEXT)
        if (divisors == 1).all():
            return config
        factor = shortest(divisors.max().item())
        scaling = RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=original)
        scaled = replace(config, rope_scaling=scaling)
        made = llama3_divisors(scaled)
        if divisors.shape != made.shape or not torch.allclose(divisors, made, rtol=1e-4, atol=0):
            raise CheckpointError(f"{ROPE_FREQS} holds other divisors than those of Llama 3 ({scaling})")
        return scaled


def shortest(value: float) -> float:
    """Return the shortest decimal of the float32 that GGUF holds; 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _uniform(value: Any) -> Any:
    """A value that is told for each layer, once if it is the same in all of them."""
    alike = isinstance(value, list) and value and all(item == value[0] for item in value)
    return value[0] if alike else value


def _has_bias(shapes: Iterable[str], projections: Iterable[str]) -> bool:
    return any(name.endswith(tuple(f".{projection}.bias" for projection in projections)) for name in shapes)


def absent_biases(config: LLaMAConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the biases that the configuration asks for where no layer of the file has one: they are
    zero.

    Hugging Face's LLaMA has either all biases of the attention, or of the MLP, or none; GGUF has each by itself.
    """
    if architecture(config) == "qwen2" or not (config.attention_bias or config.mlp_bias):
        return {}  # Qwen2 has them always
    lost = tuple(f".{name}.bias" for name in (*_ATTENTION, *_OUT, *_MLP) if not _has_bias(shapes, [name]))
    return {name: shape for name, shape in expected_shapes(config).items() if name.endswith(lost)}


def _brief(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
