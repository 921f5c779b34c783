"""Published deltas: add one to its base, make one, verify a sum.

python prepare/delta.py apply --base_dir checkpoints/llama-13b --delta_dir checkpoints/ziya-delta \
    --destination_path checkpoints/ziya-13b
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.flags import config_flags


@config_flags("config", DeltaConfig)
def apply(*, base_dir: Path, delta_dir: Path, destination_path: Path, config: DeltaConfig) -> None:
    """Add a delta to its base, tensor by tensor. What is interrupted goes on where it stopped.

    Args:
        base_dir: The original model, a Hugging Face folder.
        delta_dir: What its publisher adds, with the tokenizer of the sum; with equal shapes it may have none, and that
            of the base is taken.
        destination_path: Folder to make; it must not exist.
        config: How the sum is made.
    """
    from lit_llama.conversion.delta import apply as run

    run(base_dir, delta_dir, destination_path, config)


@config_flags("config", DeltaConfig, without=["prompt_style", "accept_rounded_base"])
def make(*, base_dir: Path, target_dir: Path, destination_path: Path, config: DeltaConfig) -> None:
    """Make the delta that turns a base into another model.

    Args:
        base_dir: The original model, a Hugging Face folder.
        target_dir: The model to come back to.
        destination_path: Folder to make; it must not exist.
        config: How the difference is made.
    """
    from lit_llama.conversion.delta import make as run

    run(base_dir, target_dir, destination_path, config)


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
