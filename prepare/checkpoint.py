"""Bring weights into the Hugging Face layout: checkpoints/<name>/ with config.json, *.safetensors and the tokenizer.

python prepare/checkpoint.py --source llama-2-7b --destination_path checkpoints/llama-2-7b
python prepare/checkpoint.py --source model.gguf --destination_path checkpoints/NAME
python prepare/checkpoint.py --source out/lora/NAME --format gguf --destination_path NAME-adapter.gguf
python prepare/checkpoint.py --source lora.pth --base_dir checkpoints/llama-7b --destination_path out/lora/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.model.config import GGUFType


def main(
    *,
    source: Path,
    destination_path: Path,
    format: Literal["hf", "meta", "lit", "gguf"] = "hf",
    dtype: GGUFType | None = None,
    max_shard_size: str = "5GB",
    num_shards: int = 1,
    resize_vocab: int | None = None,
    rms_norm_eps: float | None = None,
    base_dir: Path | None = None,
    lora_alpha: float = 16,
    modelfile: bool = False,
    verify: bool = False,
) -> None:
    """Convert weights from one layout into another, tensor by tensor. What `source` is, is found out.

    Args:
        source: A folder of Meta's (consolidated.NN.pth, params.json, tokenizer.model), a .pth of lit-llama, a folder of
            litgpt's (lit_model.pth), a GGUF file or one of its parts, a Hugging Face folder with safetensors or
            pytorch_model.bin, or an adapter.
        destination_path: Folder to make, such as checkpoints/NAME, or with --format gguf the file.
        format: Layout to write: hf (Hugging Face), meta (for Meta's code), lit (for lit-llama), gguf (one
            file for llama.cpp and Ollama, also of an adapter).
        dtype: Dtype to round all weights to; left out, none is rounded but quantised ones, which become bfloat16.
            With --format gguf also q8_0, q6_k, q5_k_m, q4_k_m and q4_0: as many bits a value, vectors excepted; those
            with k need the extra `kquants`.
        max_shard_size: Most bytes of a safetensors file, such as 200MB, unless one tensor is larger.
        num_shards: Number of consolidated.NN.pth to write with --format meta.
        resize_vocab: Rows that embedding and head are to have, where the tokenizer has more tokens than they have rows;
            new rows are the mean of the trained ones.
        rms_norm_eps: Epsilon of the norms of a lit-llama .pth, which does not hold it; left out, that of LLaMA 1.
        base_dir: Base model of an adapter: of a LoRA .pth of lit-llama, a GGUF adapter or a folder of mlx-lm, which
            become a PEFT adapter folder, or of an adapter folder that does not find its own, with --format gguf.
        lora_alpha: Alpha that a LoRA of lit-llama was trained with, which its file does not hold; 16 in its scripts.
        modelfile: With --format gguf, write a Modelfile for `ollama create` beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
    """
    from lit_llama.api.weights import convert

    convert(
        source,
        destination_path,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        num_shards=num_shards,
        resize_vocab=resize_vocab,
        rms_norm_eps=rms_norm_eps,
        base_dir=base_dir,
        lora_alpha=lora_alpha,
        modelfile=modelfile,
        verify=verify,
    )


if __name__ == "__main__":
    CLI(main)
