"""Published deltas: add one to its base, make one, verify a sum.

python prepare/delta.py apply --base_dir checkpoints/llama-13b --delta_dir checkpoints/ziya-delta \
    --destination_path checkpoints/ziya-13b
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.text.config import StyleName

Dtype = Literal["bfloat16", "float16", "float32"]


def apply(
    *,
    base_dir: Path,
    delta_dir: Path,
    destination_path: Path,
    policy: Literal["auto", "ziya", "vicuna", "alpaca", "add"] = "auto",
    dtype: Dtype | None = None,
    prompt_style: StyleName | None = None,
    accept_rounded_base: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Add a delta to its base, tensor by tensor. What is interrupted goes on where it stopped.

    Args:
        base_dir: The original model, a Hugging Face folder.
        delta_dir: What its publisher adds, with the tokenizer of the sum; with equal shapes it may have none, and that
            of the base is taken.
        destination_path: Folder to make; it must not exist.
        policy: How a base grows to the vocabulary of the delta: ziya takes embedding and head from the delta, vicuna
            puts rows of zeros to the base, alpaca rows that are the mean of the others, add needs equal shapes. auto
            decides by shapes and values, and stops where they leave a doubt.
        dtype: Dtype of the sum; left out, base and delta must be stored in the same.
        prompt_style: How the sum is asked; left out, as the delta's chat template says.
        accept_rounded_base: Go on with a base in float16 that once was bfloat16.
        max_shard_size: Largest file of weights, such as 5GB or 200MB.
    """
    from lit_llama.conversion.delta import apply as run
    from lit_llama.model.files.shards import parse_size

    run(
        base_dir,
        delta_dir,
        destination_path,
        policy=policy,
        dtype=dtype,
        prompt_style=prompt_style,
        accept_rounded_base=accept_rounded_base,
        max_shard_size=parse_size(max_shard_size),
    )


def make(
    *,
    base_dir: Path,
    target_dir: Path,
    destination_path: Path,
    policy: Literal["auto", "ziya", "vicuna", "alpaca", "add"] = "auto",
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Make the delta that turns a base into another model.

    Args:
        base_dir: The original model, a Hugging Face folder.
        target_dir: The model to come back to.
        destination_path: Folder to make; it must not exist.
        policy: As in apply; auto is add where the shapes are equal, else ziya.
        dtype: Dtype of the delta; left out, base and target must be stored in the same.
        max_shard_size: Largest file of weights, such as 5GB or 200MB.
    """
    from lit_llama.conversion.delta import make as run
    from lit_llama.model.files.shards import parse_size

    size = parse_size(max_shard_size)
    run(base_dir, target_dir, destination_path, policy=policy, dtype=dtype, max_shard_size=size)


def verify(*, merged_dir: Path, base_dir: Path | None = None, delta_dir: Path | None = None) -> None:
    """Check a folder against its SHA256SUMS; with base and delta also that its rows are their sum.

    Args:
        merged_dir: What apply or make wrote.
        base_dir: The original model.
        delta_dir: What was added to it.
    """
    from lit_llama.conversion.delta import verify as run

    run(merged_dir, base_dir, delta_dir)


if __name__ == "__main__":
    CLI(apply, make, verify)
