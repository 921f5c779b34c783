"""Shapes and settings of the models and of their adapters. Imports no torch, so that help stays quick."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import CheckpointError
from lit_llama.model.config_json import read_fields, write_fields
from lit_llama.model.config_json import text_part as text_part
from lit_llama.model.family import LINEAR, SLIDING
from lit_llama.model.lora_config import ALL_LINEAR as ALL_LINEAR
from lit_llama.model.lora_config import LINEARS as LINEARS
from lit_llama.model.lora_config import LoRAConfig as LoRAConfig
from lit_llama.model.lora_config import is_pattern as is_pattern
from lit_llama.model.lora_config import matches_pattern as matches_pattern
from lit_llama.model.places import describe_quantization, wrong_place
from lit_llama.model.rope_scaling import RopeScaling as RopeScaling
from lit_llama.model.rope_scaling import is_number
from lit_llama.objects import ObjectError, as_object, read_text

_ABOVE_ZERO = {
    "rope_theta": 10000,
    "local_rope_theta": 10000,
    "partial_rotary_factor": 0.5,
    "attention_multiplier": 0.125,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50,
    "final_logit_softcapping": 30,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
}
"""Fields that are numbers above zero, and an example."""
_MAY_LACK = (
    "local_rope_theta",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_LARGEST = 1 << 31
"""Sizes and ids are below."""


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig:
    """Shape of a model of the LLaMA family, named as in config.json of Hugging Face (Touvron et al. 2023,
    arXiv:2302.13971).

    Args:
        model_type: What config.json calls it; only reading and writing that file depend on it.
        vocab_size: Rows of the embedding (R), at least the number of tokens of the tokenizer.
        hidden_size: Width of the residual stream (C).
        intermediate_size: Width of the MLP (I).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H).
        num_key_value_heads: Key/value heads (G); fewer than H is grouped-query attention.
        head_dim: Size of one head (D).
        max_position_embeddings: Longest sequence the model was trained on, in tokens; see also `context_length`.
        rms_norm_eps: Added to the mean square before the root.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched, if they are.
        local_rope_theta: Base in layers with a window where these are not stretched; None: all layers turn alike.
        partial_rotary_factor: Share of the components of a head that are rotated, the first ones.
        rope_interleaved: Component 2 i turns against 2 i + 1, instead of i against i + half of them.
        no_rope_layers: 1 for each layer that rotates queries and keys, 0 for one that does not; empty: all do.
        attention_bias: The projections to queries, keys and values add a bias.
        attention_out_bias: The projection out of the attention does.
        mlp_bias: The three of the MLP do.
        joined_qkv: The projections to queries, keys and values are one, qkv_proj.
        joined_gate_up: Those to gate and up are one, gate_up_proj.
        hidden_act: What is applied to the gate, see llama.ACTIVATIONS.
        layer_norms: Names of the norms before and after the attention, and before and after the MLP; "" for none.
        norm_offset: Added to the weight of every norm.
        use_qk_norm: Queries and keys are normalised before their rotation, head by head.
        joined_qk_norm: The heads of a token are normalised together.
        attention_multiplier: Factor of the scores; None is 1 / sqrt(D).
        query_pre_attn_scalar: Number whose inverse root is that factor; None for none.
        attn_logit_softcapping: Bound c of the scores s, which are c tanh(s / c); None for none.
        final_logit_softcapping: That of the logits.
        embedding_multiplier: Factor of the embeddings, rounded to their dtype.
        residual_multiplier: Factor of what attention and MLP add to the stream.
        logits_scaling: Divisor of the logits.
        sliding_window: Tokens that a token sees, itself the last of them; None is all.
        layer_types: sliding_attention, full_attention or linear_attention for each layer; empty: all have the window.
        attention_gate: q_proj gives a gate for each component of a head, too, by whose sigmoid the result is
            multiplied.
        linear_conv_kernel_dim: Tokens that the convolution of a layer of linear attention sees.
        linear_key_head_dim: Size of its queries and keys.
        linear_value_head_dim: Size of its values.
        linear_num_key_heads: Heads of its queries and keys.
        linear_num_value_heads: Heads of its values; a multiple of those.
        num_local_experts: MLPs of a layer among which tokens are shared (E); None: one MLP for all.
        num_experts_per_tok: Those that a token goes to (K).
        moe_intermediate_size: Width of each; None is I.
        norm_topk_prob: What the experts of a token count is made to add up to 1.
        mlp_only_layers: Layers with one MLP all the same.
        decoder_sparse_step: Of every so many layers the last one has experts.
        expert_block: Name of the module with the experts in a layer.
        expert_projections: Names of the projections to gate and up, and of that down, in an expert.
        tie_word_embeddings: The output head is the embedding matrix.
        bos_token_id: Beginning of text, or None.
        eos_token_id: Every id that ends a text.
        pad_token_id: Kept for other programs; nothing here needs padding.
    """

    model_type: str = "llama"
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
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    no_rope_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    joined_qkv: bool = False
    joined_gate_up: bool = False
    hidden_act: str = "silu"
    layer_norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm_offset: float = 0.0
    use_qk_norm: bool = False
    joined_qk_norm: bool = False
    attention_multiplier: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_gate: bool = False
    linear_conv_kernel_dim: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    expert_block: str = "mlp"
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type is int and not (type(value) is int and 1 <= value < _LARGEST):
                raise CheckpointError(
                    f"{entry.name} is {value!r:.60}, expected a positive whole number below {_LARGEST}"
                )
            if entry.type is bool and not isinstance(value, bool):
                raise CheckpointError(f"{entry.name} is {value!r}, expected true or false")
        if not (is_number(self.rms_norm_eps) and 0 <= self.rms_norm_eps < 1):
            raise CheckpointError(
                f"rms_norm_eps is {self.rms_norm_eps!r:.60}, expected a number from 0 to 1, such as 1e-6"
            )
        for name, usual in _ABOVE_ZERO.items():
            value = getattr(self, name)
            if not ((value is None and name in _MAY_LACK) or (is_number(value) and value > 0)):
                raise CheckpointError(f"{name} is {value!r:.60}, expected a number above 0, such as {usual}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, rotary embedding needs an even number")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise CheckpointError(
                f"partial_rotary_factor is {self.partial_rotary_factor}, which rotates {self.rotary_dim} of the "
                f"{self.head_dim} components of a head; an even number of them is needed"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for index in ids if isinstance(ids, tuple) else [] if ids is None else [ids]:
                if type(index) is not int or abs(index) >= _LARGEST:
                    raise CheckpointError(f"{name} holds {index!r:.60}, expected the id of a token")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        scaling = self.rope_scaling
        for name in ("short_factor", "long_factor") if scaling and scaling.rope_type == "longrope" else ():
            if (count := len(getattr(scaling, name))) != self.rotary_dim // 2:
                raise CheckpointError(f"{name} has {count} entries, expected {self.rotary_dim // 2}")
        if self.sliding_window is not None and not (type(self.sliding_window) is int and self.sliding_window >= 1):
            raise CheckpointError(
                f"sliding_window is {self.sliding_window!r}, expected a positive whole number or none"
            )
        self._check_experts()
        self._check_linear()
        for name in ("layer_types", "no_rope_layers"):
            if (count := len(getattr(self, name))) not in (0, self.num_hidden_layers):
                raise CheckpointError(f"{name} has {count} entries, one for each layer is needed")

    def _check_experts(self) -> None:
        for name in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
            value = getattr(self, name)
            needed = self.num_local_experts is not None and name != "moe_intermediate_size"
            if (value is None and needed) or not (value is None or (type(value) is int and 1 <= value < _LARGEST)):
                raise CheckpointError(f"{name} is {value!r:.60}, expected a positive whole number below {_LARGEST}")
        if self.num_local_experts is not None and self.num_local_experts < (self.num_experts_per_tok or 0):
            raise CheckpointError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the {self.num_local_experts} experts"
            )
        if any(type(layer) is not int for layer in self.mlp_only_layers):
            raise CheckpointError(f"mlp_only_layers is {self.mlp_only_layers!r:.60}, expected numbers of layers")

    def _check_linear(self) -> None:
        sizes = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name.startswith("linear_")}
        for name, value in sizes.items() if LINEAR in self.layer_types else ():
            if not (type(value) is int and 1 <= value < _LARGEST):
                raise CheckpointError(f"{name} is {value!r:.60}, expected a positive whole number below {_LARGEST}")
        keys, values = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
        if LINEAR in self.layer_types and values % keys:
            raise CheckpointError(f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")

    def recurrent(self, layer: int) -> bool:
        """Whether a layer keeps a state in place of keys and values: linear attention by the gated delta rule."""
        return bool(self.layer_types) and self.layer_types[layer] == LINEAR

    @property
    def recurrent_layers(self) -> list[int]:
        """Layers that keep a state."""
        return [layer for layer in range(self.num_hidden_layers) if self.recurrent(layer)]

    @property
    def attending_layers(self) -> list[int]:
        """Layers that keep keys and values."""
        return [layer for layer in range(self.num_hidden_layers) if not self.recurrent(layer)]

    @property
    def linear_channels(self) -> tuple[int, int, int]:
        """Channels of the queries, keys and values of a layer of linear attention."""
        keys = (self.linear_num_key_heads or 0) * (self.linear_key_head_dim or 0)
        return keys, keys, (self.linear_num_value_heads or 0) * (self.linear_value_head_dim or 0)

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_local_experts is not None and chosen

    def mlp_name(self, layer: int) -> str:
        """Return the name of a layer's MLP, or of its experts."""
        return self.expert_block if self.sparse(layer) else "mlp"

    def mlp_width(self, layer: int) -> int:
        """Return the width of all the MLPs of a layer that a token goes through."""
        if not self.sparse(layer):
            return self.intermediate_size
        return (self.num_experts_per_tok or 0) * (self.moe_intermediate_size or self.intermediate_size)

    def window(self, layer: int) -> int | None:
        """Return the tokens that a token sees in a layer, itself the last of them; None is all."""
        return self.sliding_window if self._slides(layer) else None

    def _slides(self, layer: int) -> bool:
        return not self.layer_types or self.layer_types[layer] == SLIDING

    def rotary(self, layer: int) -> "LLaMAConfig | None":
        """Return a configuration whose rotary fields are those of a layer; None if it rotates nothing."""
        if self.recurrent(layer) or (self.no_rope_layers and not self.no_rope_layers[layer]):
            return None
        if self.local_rope_theta is None or self.window(layer) is None:
            return self
        return replace(self, rope_theta=self.local_rope_theta, rope_scaling=None)

    @property
    def rotary_dim(self) -> int:
        """Components of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float | None:
        """Factor of the scores; None is 1 / sqrt(D)."""
        scalar = self.query_pre_attn_scalar
        return self.attention_multiplier if scalar is None else scalar**-0.5

    def beyond(self, layer: int) -> str:
        """Name the first thing that a layer computes and the fused layers and the packed kernels do not, for people;
        "" if there is none.
        """
        usual = LLaMAConfig.layer_norms
        there = {
            "recurrent layers": self.recurrent(layer),
            "gates of the attention": self.attention_gate,
            "layers without rotary positions": self.rotary(layer) is None,
            "partly rotated heads": self.rotary_dim < self.head_dim,
            "interleaved rotary positions": self.rope_interleaved,
            "two kinds of rotary positions": self.local_rope_theta is not None,
            "norms elsewhere than before attention and MLP": self.layer_norms != usual,
            "norms with an offset": bool(self.norm_offset),
            "norms over all heads": self.joined_qk_norm,
            "projections that are one": self.joined_qkv or self.joined_gate_up,
            f"activation {self.hidden_act}": self.hidden_act != "silu",
            "bound of the scores": self.attn_logit_softcapping is not None,
            "scale of the scores": self.attention_scale is not None,
            "queries scaled by position": bool(self.rope_scaling and self.rope_scaling.llama_4_scaling_beta),
            "mixtures of experts": self.sparse(layer),
            "scale of the residuals": self.residual_multiplier != 1,
        }
        return next((name for name, is_so in there.items() if is_so), "")

    @property
    def beyond_llama(self) -> str:
        """Name the first thing that the packed kernels do not compute, of any layer or outside the layers; "" if there
        is none.
        """
        outer = {
            "scale of the embeddings": self.embedding_multiplier != 1,
            "scale of the logits": self.logits_scaling != 1,
            "bound of the logits": self.final_logit_softcapping is not None,
        }
        found = next((name for layer in range(self.num_hidden_layers) if (name := self.beyond(layer))), "")
        return found or next((name for name, is_so in outer.items() if is_so), "")

    def shortened(self, layers: int) -> "LLaMAConfig":
        """Return the configuration of a model of the first layers alone."""
        types, rotated = self.layer_types[:layers], self.no_rope_layers[:layers]
        return replace(self, num_hidden_layers=layers, layer_types=types, no_rope_layers=rotated)

    @property
    def context_length(self) -> int:
        """Longest sequence the model is made for, in tokens."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type in ("llama3", "longrope"):  # whose limit is the stretched one
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "LLaMAConfig":
        """Read the contents of a config.json, in the spelling of transformers 4 or 5.

        Raises:
            CheckpointError: A field is missing, or asks for mathematics this model does not compute.
        """
        values = read_fields(raw)
        scaling = values.pop("rope_scaling")
        return cls(**values, rope_scaling=RopeScaling(**scaling) if scaling else None)

    @classmethod
    def from_folder(cls, folder: Path) -> "LLaMAConfig":
        """Read `folder/config.json`; errors name the file."""
        path = folder / "config.json"
        if not path.is_file():
            raise wrong_place(folder)
        try:
            raw = as_object(read_text(path))
            if raw.get("quantization_config") or raw.get("compression_config"):
                raise CheckpointError(describe_quantization(raw, folder))
            return cls.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ObjectError as error:
            raise CheckpointError(f"{path} {error}") from error
        except (ValueError, AttributeError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{path} is not a model configuration: {error}") from error

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """Return the config.json that transformers 4 and 5 both read; `dtype` such as "bfloat16"."""
        raw = write_fields(asdict(self), dtype)
        assert LLaMAConfig.from_dict(raw) == self, f"{self.model_type} cannot say all of {self}"
        return raw


Checkpointing = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: selective gate and up, full all but the input of a layer."""
Quantization = Literal["nf4", "nf4-dq", "int8", "fp8"]
"""How the linear layers of a base are held: see quantize.py."""

Held = Literal["stored", "nf4", "nf4-dq", "int8", "int4", "fp8"]
"""How generation holds the linear layers: as they are stored, or quantised; int8 and int4 on a CPU in groups with a
scale, see kernels/packing.py."""

KVCacheType = Literal["auto", "int8"]
"""How generation holds keys and values: in the dtype of activations, or as 8-bit codes with a scale for each token and
head."""

PlainType = Literal["bfloat16", "float16", "float32"]
"""In what weights are stored in folders and adapters."""

GGUFType = Literal["bfloat16", "float16", "float32", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
"""In what they are stored in GGUF files: the numbers are bits, `k` and `m` llama.cpp's mixtures."""

Onto = Literal["stored", "nf4", "nf4-dq", "int8", "fp8"]
"""What an adapter is put on: the base as it is stored, or with quantised linear layers."""
