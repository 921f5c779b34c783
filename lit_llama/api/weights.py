"""Weights from one layout, place or shape into another: merge, convert, add_delta, download."""

from pathlib import Path
from typing import Any, Literal

from lit_llama.api.results import Merged, Place, Result, called, path_of
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.device import Precision
from lit_llama.errors import UserError
from lit_llama.model.config import GGUFType, Onto
from lit_llama.settings import check_choice, settled
from lit_llama.wording import param

Layout = Literal["hf", "meta", "lit", "gguf"]


def merge(
    adapter_dir: Place,
    destination_path: Place,
    *,
    base_dir: Place | None = None,
    format: Literal["hf", "gguf"] = "hf",
    dtype: GGUFType | None = None,
    precision: Precision = "auto",
    onto: Onto | None = None,
    modelfile: bool = False,
    verify: bool = False,
    verbose: bool | None = None,
) -> Merged:
    """Merge an adapter into its base: a plain checkpoint again, or a GGUF file, proven to say the same.

        lit_llama.merge("out/lora/mine", "checkpoints/mine")

    Args:
        adapter_dir: What `finetune` or PEFT made.
        destination_path: Folder to make, or with format="gguf" the file.
        base_dir: Its base model, where it is not found where the adapter says.
        format: hf for a Hugging Face folder, gguf for one file that llama.cpp and Ollama read.
        dtype: Store the weights in this dtype; None for that of the base. For gguf also q8_0, q6_k,
            q5_k_m, q4_k_m and q4_0.
        precision: In which the logits are compared.
        onto: Add the update to the base as it is stored, or to what quantisation leaves of it; None as in the training.
        modelfile: With format="gguf", write a Modelfile for Ollama beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        verbose: As for `load`.

    Raises:
        UserError: Settings that exclude each other, or a destination that is there.
        CheckpointError: The adapter is empty, all zero, or does not fit its base.
        IntegrityError: The base is not the one the adapter was trained on, or the merged model does not carry it.
        ResourceError: Disk or memory is too small, said before anything is written.
    """
    for name, value, kind in (
        ("format", format, Literal["hf", "gguf"]),
        ("dtype", dtype, GGUFType | None),
        ("precision", precision, Precision),
        ("onto", onto, Onto | None),
    ):
        check_choice(name, value, kind)
    adapter, destination, base = Path(adapter_dir), Path(destination_path), path_of(base_dir)
    with called(verbose) as talk:
        from lit_llama.conversion.merge import merge as write
        from lit_llama.conversion.merge import merge_into_gguf
        from lit_llama.model.adapters.peft_folder import verify_folders

        if verify:
            verify_folders(adapter, base_dir=base)
        if format == "gguf":
            proof = merge_into_gguf(
                adapter,
                destination,
                dtype=dtype,
                precision=precision,
                onto=onto,
                base_dir=base,
                modelfile=modelfile,
            )
        elif modelfile:
            raise UserError(f"is for a model with {param('format', 'gguf')}", parameter="modelfile")
        else:
            proof = write(adapter, destination, dtype=dtype, precision=precision, onto=onto, base_dir=base)
        return Merged(folder=destination, log=tuple(talk.lines), proof=proof)


def convert(
    source: Place,
    destination_path: Place,
    *,
    format: Layout = "hf",
    dtype: GGUFType | None = None,
    max_shard_size: str = "5GB",
    num_shards: int = 1,
    resize_vocab: int | None = None,
    rms_norm_eps: float | None = None,
    base_dir: Place | None = None,
    lora_alpha: float = 16,
    modelfile: bool = False,
    verify: bool = False,
    verbose: bool | None = None,
) -> Result:
    """Bring weights from one layout into another, tensor by tensor. The layout of `source` is found out.

        lit_llama.convert("model.gguf", "checkpoints/NAME")

    Args:
        source: A folder of Meta's, of litgpt's or of Hugging Face's, a .pth of lit-llama, a GGUF file, or an adapter.
        destination_path: Folder to make, or with format="gguf" the file.
        format: Layout to write: hf (Hugging Face), meta, lit (lit-llama), gguf (llama.cpp and Ollama).
        dtype: Round all weights to it; None rounds none but quantised ones, which become bfloat16.
        max_shard_size: Most bytes of a safetensors file, such as 200MB, unless one tensor is larger.
        num_shards: Number of consolidated.NN.pth, for format="meta".
        resize_vocab: Rows that embedding and head are to have, where the tokenizer has more tokens.
        rms_norm_eps: Epsilon of the norms of a lit-llama .pth, which does not hold it.
        base_dir: Base model of an adapter of another program, which becomes a PEFT adapter folder.
        lora_alpha: Alpha that a LoRA of lit-llama was trained with, which its file does not hold.
        modelfile: With format="gguf", write a Modelfile for Ollama beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        verbose: As for `load`.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
        UserError: There is nothing to do, settings exclude each other, or the destination is whole already.
        ResourceError: The disk has no room.
    """
    check_choice("format", format, Layout)
    check_choice("dtype", dtype, GGUFType | None)
    found, destination, base = Path(source), Path(destination_path), path_of(base_dir)
    with called(verbose) as talk:
        from lit_llama.conversion import convert as write
        from lit_llama.conversion import convert_adapter
        from lit_llama.model.adapters.peft_folder import verify_folders
        from lit_llama.model.files.shards import parse_size

        adapter = base is not None and format == "hf"
        if verify:
            verify_folders(found if found.is_dir() else None, base if adapter else None, base_dir=base)
        if base is not None and adapter:
            convert_adapter(found, base, destination, lora_alpha)
        else:
            write(
                found,
                destination,
                layout=format,
                dtype=dtype,
                max_shard_size=parse_size(max_shard_size),
                num_shards=num_shards,
                rms_norm_eps=rms_norm_eps,
                resize_vocab=resize_vocab,
                base_dir=base,
                modelfile=modelfile,
            )
        return Result(folder=destination, log=tuple(talk.lines))


def add_delta(
    base_dir: Place,
    delta_dir: Place,
    destination_path: Place,
    *,
    verbose: bool | None = None,
    **settings: Any,
) -> Result:
    """Add a published delta to its base, tensor by tensor; what is interrupted goes on where it stopped.

        lit_llama.add_delta("checkpoints/llama-13b", "checkpoints/ziya-delta", "checkpoints/ziya-13b")

    Args:
        base_dir: The original model, a Hugging Face folder.
        delta_dir: What its publisher adds.
        destination_path: Folder to make.
        verbose: As for `load`.
        settings: Of `DeltaConfig`: policy, dtype, prompt_style, accept_rounded_base and max_shard_size.

    Raises:
        UserError: A setting is unknown or none of its choices, or the destination exists or lies in an input.
        CheckpointError: Base and delta do not fit each other, or are not what they are called.
        IntegrityError: The delta was made from another base.
        ResourceError: The disk has no room.
    """
    base, delta, destination = Path(base_dir), Path(delta_dir), Path(destination_path)
    config = settled(DeltaConfig, settings)
    with called(verbose) as talk:
        from lit_llama.conversion.delta import apply

        apply(base, delta, destination, config)
        return Result(folder=destination, log=tuple(talk.lines))


def download(
    repo_id: str,
    destination_path: Place | None = None,
    *,
    revision: str | None = None,
    file: str | None = None,
    endpoint: str | None = None,
    verbose: bool | None = None,
) -> Result:
    """Download a model or an adapter from the Hugging Face Hub: only what is needed, checked.

        lit_llama.load(lit_llama.download("HuggingFaceTB/SmolLM2-135M-Instruct"))

    Args:
        repo_id: OWNER/NAME, as in the address of the model's page.
        destination_path: Folder to make; None for checkpoints/NAME.
        revision: A branch, tag or commit; None for the main branch.
        file: A GGUF file of the repository, instead of the model folder; of a model in parts the first.
        endpoint: Address of the Hub; None for HF_ENDPOINT or the public one.
        verbose: As for `load`.

    Raises:
        UserError: There is no such repository, revision or file, or no leave to read it.
        CheckpointError: The repository holds nothing that can be used.
        ResourceError: The network or the disk does not do; the same call goes on.
        IntegrityError: A file arrived damaged.
    """
    with called(verbose) as talk:
        from lit_llama.conversion.download import download as fetch

        made = fetch(repo_id, path_of(destination_path), revision=revision, file=file, endpoint=endpoint)
        return Result(folder=made, log=tuple(talk.lines))
