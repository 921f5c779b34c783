"""Architectures of llama.cpp, as far as they are written and read: one entry for each, by its name in GGUF.

Names of tensors and keys: the gguf package, and llama.cpp's models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lit_llama.conversion.source import Names
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.families import ALL, FAMILIES
from lit_llama.model.family import FULL, LINEAR, SLIDING

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_JOINED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_ROUTER, _STACKS = "ffn_gate_inp", ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of llama.cpp.

    Args:
        families: Model types that it computes; a file is read as the first, or as the last if its layers have a window.
        inner: Names of the tensors of a layer, and Hugging Face's.
        paired: Rotary partners of queries and keys stand side by side in the file, and in halves of a head elsewhere.
        exact: Names of tensors of a layer that are no weight or bias of a module, and Hugging Face's.
        keys: Keys of fields that are numbers and decide the mathematics.
        sizes: Keys of fields that are whole numbers.
        recurrent: Layers are of linear attention, and full in an interval.
        windows: Layers have a window, in the pattern of the family.
        unused_window: A file may tell a window, which llama.cpp does not compute.
        window: The window of a file that does not say it; 0 for none.
        local_rope_theta: Base of the frequencies in layers with a window; None is that of the others.
        partial: A part of a head may be rotated.
        whole_heads: The heads are together as wide as the model.
        head: The output head is "own", "tied" to the embedding, or "any" of the two.
        temperature: Queries are scaled by position.
        by_width: Number of layers of the one size whose scores are scaled by the width of the model for each head, and
            not by the size of a head; 0 for none.
        experts: The family whose layers have experts; "" for none.
        expert_width: Key of the width of an expert; "" where it is that of an MLP.
    """

    families: tuple[str, ...]
    inner: Mapping[str, str] = field(default_factory=lambda: _ATTENTION | _MLP | _NORMS)
    paired: bool = False
    exact: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    recurrent: bool = False
    windows: bool = False
    unused_window: bool = False
    window: int = 0
    local_rope_theta: float | None = None
    partial: bool = False
    whole_heads: bool = False
    head: str = "any"
    temperature: bool = False
    by_width: int = 0
    experts: str = ""
    expert_width: str = ""

    @cached_property
    def _inner(self) -> Mapping[str, str]:
        """Names of the tensors of a layer, and Hugging Face's; of stacked experts with {} for the number of one."""
        if not self.experts:
            return self.inner
        implied = FAMILIES[self.experts].implied
        block = implied.get("expert_block", LLaMAConfig.expert_block)
        projections = implied.get("expert_projections", LLaMAConfig.expert_projections)
        stacks = {theirs: f"{block}.experts.{{}}.{ours}" for theirs, ours in zip(_STACKS, projections, strict=True)}
        return {**self.inner, _ROUTER: f"{block}.gate", **stacks}

    def names(self, native: str) -> str | None:
        """Return GGUF's name of a tensor that Hugging Face calls `native`, of an expert that of the tensor in which all
        of a layer are; None if there is none."""
        return self._names(re.sub(r"\.experts\.\d+\.", ".experts.{}.", native))

    @cached_property
    def _names(self) -> Names:
        return Names(
            outer={f"{ours}.weight": f"{theirs}.weight" for theirs, ours in _OUTER.items()},
            layer="blk.{}.",
            inner={f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in self._inner.items() for kind in KINDS}
            | {ours: theirs for theirs, ours in self.exact.items()},
        )

    def native_name(self, name: str) -> str | None:
        """Translate blk.0.attn_q.weight into model.layers.0.self_attn.q_proj.weight; None for what has no place.

        A name with {} for a number is that of stacked experts.
        """
        layer = name.split(".", 2)
        if len(layer) == 3 and layer[0] == "blk" and layer[2] in self.exact:
            return f"model.layers.{layer[1]}.{self.exact[layer[2]]}"
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self._inner:
            return f"model.layers.{parts[1]}.{self._inner[parts[2]]}.{kind}"
        return None

    def scalar(self, config: LLaMAConfig) -> float:
        """Return the number whose inverse root llama.cpp scales the scores by."""
        if config.num_hidden_layers == self.by_width:
            return config.hidden_size // config.num_attention_heads
        return config.head_dim


KINDS = ("weight", "bias")
_GLM = _ATTENTION | _JOINED_MLP
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(families=("llama", "mistral", "mixtral"), paired=True, experts="mixtral"),
    "qwen2": Architecture(families=("qwen2",)),
    "qwen3": Architecture(families=("qwen3",)),
    "qwen3moe": Architecture(
        families=("qwen3_moe",),
        inner=_ATTENTION | _NORMS,
        experts="qwen3_moe",
        expert_width="expert_feed_forward_length",
    ),
    "qwen35": Architecture(
        families=("qwen3_5_text",),
        inner=_ATTENTION
        | _MLP
        | {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
        | {"attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z"}
        | {"ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a"}
        | {"ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj"},
        exact={
            "ssm_a": "linear_attn.A_log",
            "ssm_dt.bias": "linear_attn.dt_bias",
            "ssm_conv1d.weight": "linear_attn.conv1d.weight",
        },
        sizes={
            "linear_conv_kernel_dim": "ssm.conv_kernel",
            "linear_key_head_dim": "ssm.state_size",
            "linear_num_key_heads": "ssm.group_count",
            "linear_num_value_heads": "ssm.time_step_rank",
        },
        recurrent=True,
        partial=True,
    ),
    "granite": Architecture(
        families=("granite",),
        paired=True,
        keys={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "smollm3": Architecture(families=("smollm3",), paired=True),
    "olmo2": Architecture(
        families=("olmo2", "olmo3"),
        inner=_ATTENTION
        | _MLP
        | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        windows=True,
        whole_heads=True,
        head="own",
    ),
    "phi3": Architecture(
        families=("phi3",),
        inner={"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"} | _JOINED_MLP | _NORMS,
        unused_window=True,
        partial=True,
        whole_heads=True,
    ),
    "chatglm": Architecture(families=("glm",), inner=_GLM | _NORMS, partial=True),
    "glm4": Architecture(
        families=("glm4",),
        inner=_GLM
        | {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        partial=True,
    ),
    "gemma2": Architecture(
        families=("gemma2",),
        inner=_ATTENTION | _MLP | _FOUR_NORMS,
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        windows=True,
        window=4096,
        head="tied",
        by_width=46,
    ),
    "gemma3": Architecture(
        families=("gemma3_text",),
        inner=_ATTENTION | _MLP | _FOUR_NORMS,
        windows=True,
        local_rope_theta=10000.0,
        by_width=62,
    ),
    "mistral3": Architecture(families=("ministral3",), paired=True, temperature=True),
}


def architecture(config: LLaMAConfig) -> str:
    """Return GGUF's name of the family: Mistral is a LLaMA there.

    Raises:
        CheckpointError: Its form in GGUF is not implemented.
    """
    for name, entry in ARCHITECTURES.items():
        if config.model_type in entry.families:
            return name
    known = ", ".join(family for entry in ARCHITECTURES.values() for family in entry.families)
    raise CheckpointError(f"model_type {config.model_type!r} is not written as GGUF, only {known} are")


def entry_of(config: LLaMAConfig) -> Architecture:
    """Return the entry of the family; raises what `architecture` does."""
    return ARCHITECTURES[architecture(config)]


def is_stacked(name: str) -> bool:
    """Whether a tensor that GGUF calls `name` holds the matrices of all experts of a layer."""
    return name.endswith(tuple(f".{stack}.weight" for stack in _STACKS))


def is_router(name: str) -> bool:
    """Whether a tensor that GGUF calls `name` is a router, which is stored as vectors are."""
    return name.endswith(f".{_ROUTER}.weight")


def interval(config: LLaMAConfig) -> int:
    """Count the layers of which the last one is of full attention and the others of linear; 0 if they are otherwise."""
    first = config.layer_types.index(FULL) + 1 if config.layer_types else 1
    wanted = [LINEAR if (layer + 1) % first else FULL for layer in range(config.num_hidden_layers)]
    return first if list(config.layer_types or wanted) == wanted else 0


def check_form(config: LLaMAConfig) -> None:
    """Refuse a model of which llama.cpp takes something else for granted.

    Raises:
        CheckpointError: It does, or knows no such model.
    """
    name = architecture(config)
    entry, family = ARCHITECTURES[name], FAMILIES[config.model_type]
    own = {**ALL, **family.defaults}
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    usual = [family.layer_type(own, layer) for layer in range(config.num_hidden_layers)]
    types = list(config.layer_types) or [SLIDING if config.sliding_window else FULL] * config.num_hidden_layers
    window = config.sliding_window is not None
    other = {
        f"layer_types is {config.layer_types}": entry.windows and window and types != usual,
        f"layer_types are {config.layer_types}": entry.recurrent and not interval(config),
        f"linear_key_head_dim is {keys} and linear_value_head_dim {values}": entry.recurrent and keys != values,
        "sliding_window is none": entry.windows and not window and config.model_type == entry.families[-1],
        f"head_dim is {config.head_dim}": entry.whole_heads
        and config.head_dim * config.num_attention_heads != config.hidden_size,
        "tie_word_embeddings is true": entry.head == "own" and config.tie_word_embeddings,
        "tie_word_embeddings is false": entry.head == "tied" and not config.tie_word_embeddings,
        f"query_pre_attn_scalar is {config.query_pre_attn_scalar}": config.query_pre_attn_scalar is not None
        and config.query_pre_attn_scalar != entry.scalar(config),
        f"local_rope_theta is {config.local_rope_theta}": name == "olmo2"
        and config.local_rope_theta not in (None, config.rope_theta),
        "final_logit_softcapping is there": config.final_logit_softcapping is not None
        and "final_logit_softcapping" not in entry.keys,
        **{f"{field} is none": getattr(config, field) is None for field in entry.keys},
        f"rotary positions of {config.model_type} are not stretched": entry.temperature and config.rope_scaling is None,
        **_other_experts(entry, config),
    }
    if found := next((what for what, is_so in other.items() if is_so), None):
        raise CheckpointError(f"{found}, which the architecture {name!r} of llama.cpp does not compute")


def _other_experts(entry: Architecture, config: LLaMAConfig) -> dict[str, bool]:
    """What experts are that llama.cpp does not compute, and whether they are."""
    if config.model_type != entry.experts:
        return {}
    plain = [layer for layer in range(config.num_hidden_layers) if not config.sparse(layer)]
    other_width = config.moe_intermediate_size not in (None, config.intermediate_size)
    return {
        "norm_topk_prob is false": not config.norm_topk_prob,
        f"layers {plain} have no experts": bool(plain),
        f"moe_intermediate_size is {config.moe_intermediate_size}": other_width and not entry.expert_width,
    }
