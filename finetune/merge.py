"""Merge an adapter into its base: a plain checkpoint again, proven to say the same.

python finetune/merge.py --adapter_dir out/lora/NAME --destination_path checkpoints/NAME-merged
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision


def main(
    *,
    adapter_dir: Path,
    destination_path: Path,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    precision: Precision = "auto",
    onto: Literal["stored", "nf4"] = "stored",
) -> None:
    """Add the update in float32, round once, and compare logits with base + adapter before the folder appears.

    Args:
        adapter_dir: Adapter folder made by finetune/lora.py.
        destination_path: Folder to make.
        dtype: Store the weights in this dtype; left out, in that of the base.
        precision: In which the logits are compared; auto is bfloat16 where the hardware is fast at it.
        onto: Add the update to the base as it is stored, or to what 4-bit quantisation (nf4) leaves of it, which is
            what an adapter from QLoRA training has seen.
    """
    from lit_llama.convert.merge import merge

    merge(adapter_dir, destination_path, dtype=dtype, precision=precision, onto=onto)


if __name__ == "__main__":
    CLI(main)
