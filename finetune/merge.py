"""Merge an adapter into its base: a plain checkpoint again, proven to say the same.

python finetune/merge.py --adapter_dir out/lora/NAME --destination_path checkpoints/NAME-merged
python finetune/merge.py --adapter_dir out/lora/NAME --destination_path NAME.gguf --format gguf --dtype q8_0
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision


def main(
    *,
    adapter_dir: Path,
    base_dir: Path | None = None,
    destination_path: Path,
    format: Literal["hf", "gguf"] = "hf",
    dtype: Literal["bfloat16", "float16", "float32", "q8_0"] | None = None,
    precision: Precision = "auto",
    onto: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
) -> None:
    """Add the update in float32, round once, and compare logits with base + adapter before the folder appears.

    Args:
        adapter_dir: Adapter folder made by finetune/lora.py or by PEFT.
        base_dir: Its base model, where it is not found where the adapter says.
        destination_path: Folder to make, or with --format gguf the file.
        format: hf for a Hugging Face folder, gguf for one file that llama.cpp and Ollama read.
        dtype: Store the weights in this dtype; left out, in that of the base. q8_0 (8 bits) is for GGUF files.
        precision: In which the logits are compared; auto is bfloat16 where the hardware is fast at it.
        onto: Add the update to the base as it is stored, or to what quantisation leaves of it. Left out, it is what the
            adapter has seen in its training, as its folder records; anything else gives another model than that.
    """
    from lit_llama.convert.merge import merge, merge_into_gguf

    write = merge_into_gguf if format == "gguf" else merge
    write(adapter_dir, destination_path, dtype=dtype, precision=precision, onto=onto, base_dir=base_dir)


if __name__ == "__main__":
    CLI(main)
