"""Settings of low-rank adapters. Imports no torch, so that help stays quick."""

import math
import re
from dataclasses import dataclass, field
from typing import TypeGuard

from lit_llama.errors import UserError
from lit_llama.model.patterns import check_pattern, matches_whole
from lit_llama.wording import param

LINEARS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    *("w1", "w2", "w3"),
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
)
"""The linear layers of decoder layers, which `all-linear` stands for; a model has those of its configuration. w1, w2
and w3 are gate, down and up in the experts of Mixtral, and the last ones those of linear attention."""

ALL_LINEAR = ("all-linear", "all")
"""What target_modules may say for them: PEFT's word, and the one that others have made common."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters: y = W x + (alpha / r) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of A (r, in) and B (out, r).
        alpha: The update is scaled by alpha / r.
        dropout: Probability of dropping an element of the input of A while training.
        target_modules: all-linear (or all), or names such as q_proj,v_proj; lm_head and embed_tokens can be named, too.
            Also a regular expression for whole names, such as '.*layers\\.[01]\\..*(q|v)_proj', as PEFT takes it.
        use_rslora: Scale by alpha / sqrt(r) instead, which keeps the size of the update when r grows (Kalajdzievski
            2023, arXiv:2312.03732).
        use_dora: Train the length of each row of W + (alpha / r) B A apart from its direction (Liu et al. 2024,
            arXiv:2402.09353).
        rank_pattern: Another r for modules whose name, or its end from a dot on, a regular expression matches, such as
            '{"v_proj": 16, "layers.0.mlp.up_proj": 4}'; the first match counts.
        alpha_pattern: Another alpha likewise.
        modules_to_save: Names, or ends of names, of modules of which a whole copy is trained: embed_tokens, lm_head
            (both after resize_vocab), norm. A tied head and embedding go separate ways from here.
        loraplus_lr_ratio: The learning rate of B is this many times that of A (LoRA+, Hayou et al. 2024,
            arXiv:2402.12354).
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: str | list[str] = field(default_factory=list)
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(parameter=f"lora.{name}", value=getattr(self, name), expected="true or false")
        _check_rank("r", self.r)
        self._check_alpha("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError(parameter="lora.dropout", value=self.dropout, expected="0 <= dropout < 1")
        if isinstance(self.target_modules, list) and len(self.target_modules) == 1:  # as a file may hold a word
            alone = self.target_modules[0]
            if alone in ALL_LINEAR or is_pattern(alone):
                object.__setattr__(self, "target_modules", alone)
        if self.pattern is not None:
            _check_expression("target_modules", self.pattern)
        if not all(self.targets):
            raise UserError(
                "is empty, expected all-linear or names such as q_proj,v_proj", parameter="lora.target_modules"
            )
        if not all(self.saved):
            raise UserError(
                "holds an empty name, expected names such as embed_tokens,lm_head", parameter="lora.modules_to_save"
            )
        if not 0 < self.loraplus_lr_ratio < math.inf:
            raise UserError(parameter="lora.loraplus_lr_ratio", value=self.loraplus_lr_ratio, expected="more than 0")
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            self._check_alpha(f"alpha_pattern[{key!r}]", alpha)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                _check_expression(name, key)

    def _check_alpha(self, name: str, value: float) -> None:
        if not 0 < value < math.inf:
            raise UserError(parameter=f"lora.{name}", value=value, expected="more than 0")

    @property
    def targets(self) -> list[str]:
        """Names of the modules to adapt, or one regular expression."""
        if self.target_modules in ALL_LINEAR:
            return list(LINEARS)  # a model has some of them
        if self.pattern is not None:
            return [self.pattern]
        return _names(self.target_modules) or [""]

    def covers_linears(self, *, recurrent: bool = False) -> bool:
        """Whether the targets are all linear layers of a decoder, by that word or by their names.

        Args:
            recurrent: Some of its layers have linear attention.
        """
        if self.target_modules in ALL_LINEAR:
            return True
        named = set(self.targets)
        attention = {"qkv_proj", "o_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
        mlp = {"gate_up_proj", "down_proj"}, {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}
        linear = ({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"} if recurrent else set(),)
        return named <= {*LINEARS} and all(any(way <= named for way in ways) for ways in (attention, mlp, linear))

    @property
    def pattern(self) -> str | None:
        """The regular expression for full names that target_modules is, if it is none of names."""
        return self.target_modules if is_pattern(self.target_modules) else None

    @property
    def saved(self) -> list[str]:
        """Names, or ends of names, of the modules that are trained whole."""
        return _names(self.modules_to_save)

    def shape_of(self, name: str) -> tuple[int, float]:
        """Return the rank of a module's update and the factor of B A, by its full name."""
        rank = next((rank for key, rank in self.rank_pattern.items() if matches_pattern(name, key)), self.r)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches_pattern(name, key)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def is_pattern(target_modules: object) -> TypeGuard[str]:
    """Tell whether target_modules is a regular expression: text with a character that no name or list of names has."""
    return isinstance(target_modules, str) and re.search(r"[^\w.,\s-]", target_modules) is not None


def matches_pattern(name: str, key: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module of this full name, as PEFT decides it."""
    return matches_whole(rf"(?:.*\.)?(?:{key})", name)


def _names(names: str | list[str]) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else names


def _check_expression(name: str, text: str) -> None:
    try:
        check_pattern(text)
    except ValueError as error:
        raise UserError(f"{param(f'lora.{name}')}: {error}") from error


def _check_rank(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(parameter=f"lora.{name}", value=value, expected="a whole number of 1 or more")
