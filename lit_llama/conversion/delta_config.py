"""Configuration of deltas: every choice, default and line of help once; quick to import."""

from dataclasses import dataclass
from typing import Literal

from lit_llama.model.config import PlainType
from lit_llama.text.config import StyleName

Policy = Literal["ziya", "vicuna", "alpaca", "add"]
"""How a base grows to the vocabulary of a delta, see delta_writing.py."""


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Settings of the sum of base and delta, or of their difference.

    Args:
        policy: How a base grows to the vocabulary of the delta: ziya takes embedding and head from the delta, vicuna
            puts rows of zeros to the base, alpaca rows that are the mean of the others, add needs equal shapes. auto
            decides by shapes and values, and stops where they leave a doubt; for a difference it is add where the
            shapes are equal, else ziya.
        dtype: Dtype of the result; left out, both sides must be stored in the same.
        prompt_style: How the sum is asked; left out, as the delta's chat template says.
        accept_rounded_base: Go on with a base in float16 that once was bfloat16.
        max_shard_size: Largest file of weights, such as 5GB or 200MB.

    Raises:
        UserError: The size is none.
    """

    policy: Policy | Literal["auto"] = "auto"
    dtype: PlainType | None = None
    prompt_style: StyleName | None = None
    accept_rounded_base: bool = False
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        _ = self.shard_bytes

    @property
    def shard_bytes(self) -> int:
        """Most bytes of a file of weights."""
        from lit_llama.model.files.shards import parse_size

        return parse_size(self.max_shard_size)
