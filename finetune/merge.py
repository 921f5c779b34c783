"""Merge an adapter into its base: a plain checkpoint again, proven to say the same.

python finetune/merge.py --adapter_dir out/lora/NAME --destination_path checkpoints/NAME-merged
python finetune/merge.py --adapter_dir out/lora/NAME --destination_path NAME.gguf --format gguf --dtype q8_0
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.model.config import GGUFType


def main(
    *,
    adapter_dir: Path,
    base_dir: Path | None = None,
    destination_path: Path,
    format: Literal["hf", "gguf"] = "hf",
    dtype: GGUFType | None = None,
    precision: Precision = "auto",
    onto: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
    modelfile: bool = False,
    verify: bool = False,
) -> None:
    """Add the update in float32, round once, and compare logits with base + adapter before the folder appears.

    Args:
        adapter_dir: Adapter folder made by finetune/lora.py or by PEFT.
        base_dir: Its base model, where it is not found where the adapter says.
        destination_path: Folder to make, or with --format gguf the file.
        format: hf for a Hugging Face folder, gguf for one file that llama.cpp and Ollama read.
        dtype: Store the weights in this dtype; left out, in that of the base. With --format gguf also q8_0, q6_k,
            q5_k_m, q4_k_m and q4_0: as many bits a value, vectors excepted; those with k need the extra `kquants`.
        precision: In which the logits are compared; auto is bfloat16 where the hardware is fast at it.
        onto: Add the update to the base as it is stored, or to what quantisation leaves of it. Left out, it is what the
            adapter has seen in its training, as its folder records; anything else gives another model than that.
        modelfile: With --format gguf, write a Modelfile for `ollama create` beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
    """
    from lit_llama.api.weights import merge

    merge(
        adapter_dir,
        destination_path,
        base_dir=base_dir,
        format=format,
        dtype=dtype,
        precision=precision,
        onto=onto,
        modelfile=modelfile,
        verify=verify,
    )


if __name__ == "__main__":
    CLI(main)
