"""Bring weights into the Hugging Face layout: checkpoints/<name>/ with config.json, *.safetensors and the tokenizer.

python prepare/checkpoint.py --source model.gguf --destination_path checkpoints/NAME
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI


def main(
    *, source: Path, destination_path: Path, dtype: Literal["bfloat16", "float16", "float32"] | None = None
) -> None:
    """Convert foreign weights into a Hugging Face folder. A folder that already is one needs no conversion.

    Args:
        source: A GGUF file of a LLaMA model.
        destination_path: Folder to make, such as checkpoints/NAME.
        dtype: Dtype to store the weights in; left out, quantised ones become bfloat16.
    """
    from lit_llama.convert import convert

    convert(source, destination_path, dtype=dtype)


if __name__ == "__main__":
    CLI(main)
