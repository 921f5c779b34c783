"""Adapter and its base -> a plain checkpoint, proven to say the same."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lit_llama.conversion.frame import companions_of_adapter, with_dtype, write_companions
from lit_llama.conversion.gguf.metadata import to_metadata
from lit_llama.conversion.gguf.modelfile import check_modelfile, write_modelfile
from lit_llama.conversion.gguf.scan import model_name
from lit_llama.conversion.gguf.writer import check_file, check_type, write_gguf
from lit_llama.conversion.merged import Merged
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.tokens import complete
from lit_llama.device import Precision, pick_device, pick_dtype, resident_memory, total_memory
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError
from lit_llama.folder.lock import reserving
from lit_llama.folder.manifest import check_folder, sha256_file
from lit_llama.folder.place import temporary_folder
from lit_llama.folder.publish import check_destination, check_no_file, check_space, publish, write_json
from lit_llama.memory import amount, amounts
from lit_llama.model.adapters.peft_folder import META_FILE, base_of, trained_on
from lit_llama.model.adapters.tensors import find_file
from lit_llama.model.assemble import adapted, assemble
from lit_llama.model.config import LLaMAConfig, Onto, PlainType, text_part
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.model.files.shards import write_weights
from lit_llama.model.files.weights import byte_size
from lit_llama.model.llama import LLaMA
from lit_llama.model.places import ADAPTER, MODEL, check_places
from lit_llama.objects import read_object
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import TEMPLATE_FILE, folder_style, prompt_ids
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import adapter_tokenizer, identity
from lit_llama.wording import param, params

PROBES = (
    "What food do llamas eat?",
    "Extract the order as JSON: item, quantity.\n\nTwo blue lamps for Zoë O'Brien, please.",
    "用一句话介绍北京。",
    "def add(a, b):",
)
"""Prompts on which the merged model is compared with base + adapter."""


@dataclass(frozen=True)
class Proof:
    """Distance of the merged model from base + adapter, in logits over all positions of the probes."""

    max_difference: float
    mean_difference: float
    adapter_effect: float  # mean difference that the adapter itself makes
    top1_agreement: float


@reserving
def merge(
    adapter_dir: Path,
    destination: Path,
    *,
    dtype: str | None,
    precision: Precision,
    onto: Onto | None = None,
    base_dir: Path | None = None,
) -> Proof:
    """Write what the adapter makes of each weight, computed in float32 and rounded once; then compare logits.

    Low-rank updates give W + scale * B A, DoRA m V / |V| of that, modules trained whole their copy. A head that was
    tied to the embedding is stored apart where the two differ now.

    An adapter has learned to work with what it saw. Where its base was quantised, that is what quantisation leaves of
    the weights, and added to the stored ones it gives another model than the one that was trained: often a good one,
    never the same. So `onto` is by default what the adapter's folder records.

    Args:
        adapter_dir: An adapter folder.
        destination: Folder to make.
        dtype: Dtype of the adapted tensors; None keeps that of the base.
        precision: In which the logits are compared.
        onto: The base's weights as they are stored, or what quantisation leaves of them; None as in the training.
        base_dir: Where the base is; None looks for it, see `base_of`.

    Raises:
        CheckpointError: The adapter is empty, all zero, or does not fit its base, or the base's tokenizer does not.
        IntegrityError: The base or its tokenizer is not the one the adapter was trained on, or the merged model does
            not carry it.
        ResourceError: Disk or memory is too small, said before anything is written.
    """
    proof = _write(adapter_dir, destination, dtype, precision, onto, base_dir)
    stderr().print(f"{destination}: ready for generate/ and for any program that reads Hugging Face folders")
    return proof


def _write(
    adapter_dir: Path,
    destination: Path,
    dtype: str | None,
    precision: Precision,
    onto: Onto | None,
    base_dir: Path | None,
    gguf: bool = False,
) -> Proof:
    if destination.resolve() == adapter_dir.resolve():
        raise UserError(
            "is the adapter's own folder", parameter="destination_path", value=destination, remedy="name another"
        )
    if not gguf:
        check_no_file(destination)
    check_destination(destination, "config.json")
    if dtype not in (None, *get_args(PlainType)):
        raise UserError(f"is a type of GGUF files: it needs {param('format', 'gguf')}", parameter="dtype", value=dtype)
    check_places({"adapter_dir": ADAPTER, "base_dir": MODEL}, {"adapter_dir": adapter_dir, "base_dir": base_dir})
    check_folder(adapter_dir)
    base = base_of(adapter_dir, base_dir)
    config = LLaMAConfig.from_folder(base)
    if gguf:
        to_metadata(config)  # before the work, which can take hours
    onto = _choose(adapter_dir, onto)
    tokenizer = adapter_tokenizer(adapter_dir, base, config.vocab_size)
    merged = Merged(base, adapter_dir, onto, dtype)
    for remark in merged.remarks:
        stderr().print(remark)
    raw = text_part(read_object(base / "config.json", CheckpointError))
    if merged.unties:
        raw["tie_word_embeddings"] = False
    _check_memory(merged, precision, onto)
    with publish(destination, "config.json") as folder:
        check_space(folder, sum(map(byte_size, merged.specs.values())))
        write_weights(folder, merged.specs, merged.__getitem__)
        write_json(folder / "config.json", with_dtype(raw, dtype))
        template = adapter_dir / TEMPLATE_FILE
        own = template.read_bytes() if template.is_file() else None
        style = folder_style(adapter_dir)
        write_companions(folder, companions_of_adapter(adapter_dir, base), own, style, tokenizer)
        complete(folder)
        proof = _prove(base, adapter_dir, folder, tokenizer, precision, onto)
        meta = {
            "format": 1,
            "base": {"path": str(base), "fingerprint": fingerprint(base)},
            "adapter": {"path": str(adapter_dir), "sha256": sha256_file(find_file(adapter_dir))},
            "onto": onto,
            "tokenizer": identity(tokenizer),
            "proof": proof.__dict__,
        }
        write_json(folder / META_FILE, meta)
    return proof


def _choose(adapter_dir: Path, onto: Onto | None) -> Onto:
    """What to merge onto, with a line where that is not what the adapter was trained on."""
    trained: Onto = trained_on(adapter_dir) or "stored"
    if onto is not None and onto != trained:
        stderr().print(
            f"{param('onto', onto)}: the adapter was trained on the base {_name(trained)}; merged onto it "
            f"{_name(onto)} the "
            "model is another than the one that was trained"
        )
    return onto or trained


def _name(onto: Onto) -> str:
    return "as it is stored" if onto == "stored" else f"quantised to {onto}"


@reserving
def merge_into_gguf(
    adapter_dir: Path,
    destination: Path,
    *,
    dtype: str | None,
    precision: Precision,
    onto: Onto | None = None,
    base_dir: Path | None = None,
    modelfile: bool = False,
) -> Proof:
    """Merge as `merge` does, into a folder that goes again, and write that as one GGUF file.

    Args:
        adapter_dir: An adapter folder.
        destination: File to make.
        dtype: As in `GGUFType`; None keeps that of the base.
        precision: In which the logits are compared.
        onto: As for `merge`.
        base_dir: As for `merge`.
        modelfile: Write a Modelfile for Ollama beside the file.
    """
    check_file(destination)
    check_type(dtype)
    if modelfile:
        check_modelfile(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(destination) as held:
        folder = held / "merged"
        # Rounded once: what is float32 in the file, or packed from it, was never bfloat16 in between.
        kept = dtype if dtype in (None, *get_args(PlainType)) else "float32"
        proof = _write(adapter_dir, folder, kept, precision, onto, base_dir, gguf=True)
        source = replace(open_folder(folder), path=adapter_dir)  # for messages: the folder goes again
        write_gguf(source, destination, dtype, name=model_name(destination.name))
    if modelfile:
        write_modelfile(destination)
    size = amount(destination.stat().st_size)
    stderr().print(f"{destination}: {size}, ready for llama.cpp and Ollama")
    return proof


def _check_memory(merged: Merged, precision: Precision, onto: Onto) -> None:
    """Say what comparing the two models takes, before hours of writing end in want of memory.

    Raises:
        ResourceError: There is less.
    """
    device = pick_device()
    dtype = pick_dtype(precision, device)
    values = sum(math.prod(shape) for _, shape in merged.specs.values())
    # One model at a time, and what is added to it; a tensor that is merged is there in float32 twice.
    largest = max(math.prod(shape) for _, shape in merged.specs.values())
    needed = max(values * dtype.itemsize + merged.added_bytes, 3 * 4 * largest)
    there = total_memory(device) - (resident_memory() if device.type == "cpu" else 0)
    wanted, free = amounts(needed, there)
    said = f"comparing the models takes {wanted} of the {free} that the {device.type} has free"
    if needed <= there:
        stderr().print(said)
        return
    ways = [f"{param('precision', 'bf16-true')} takes half"] if dtype == torch.float32 else []
    if device.type == "cuda":
        ways.append("CUDA_VISIBLE_DEVICES= before the command compares on the CPU")
    raise ResourceError(f"{said}; {', or '.join(ways) or 'merge on a machine with more memory'}")


def _prove(
    base: Path, adapter_dir: Path, merged: Path, tokenizer: Tokenizer, precision: Precision, onto: Onto
) -> Proof:
    device = pick_device()
    dtype = pick_dtype(precision, device)
    style = folder_style(adapter_dir)
    probes = [
        prompt_ids(tokenizer, style, [{"role": "user", "content": text}]) if style else tokenizer.encode(text)
        for text in PROBES
    ]
    held = None if onto == "stored" else onto
    stored = _logits(load_model(base, device, dtype), probes) if held else None
    model = load_model(base, device, dtype, held)
    plain = _logits(model, probes)
    if stored is not None:
        moved = (plain - stored).abs().mean().item()
        stderr().print(
            f"{held} moves the logits of the base by {moved:.2e} in the mean; the adapter is merged onto that"
        )
    wanted = _logits(assemble(model, adapted(adapter_dir)).model.eval(), probes)
    del model  # one model at a time
    found = _logits(load_model(merged, device, dtype), probes)
    difference = (found - wanted).abs()
    proof = Proof(
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        adapter_effect=(plain - wanted).abs().mean().item(),
        top1_agreement=(found.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
    )
    stderr().print(
        f"logits of merged against base + adapter in {str(dtype)[6:]}, {len(wanted)} positions: "
        f"max |difference| {proof.max_difference:.2e}, mean {proof.mean_difference:.2e} "
        f"(the adapter itself moves them by {proof.adapter_effect:.2e}), "
        f"same most likely token at {proof.top1_agreement:.1%}"
    )
    if not proof.adapter_effect:
        raise IntegrityError(f"{adapter_dir} changes no logit of its base: there is nothing to merge")
    if not proof.mean_difference < proof.adapter_effect / 2:
        raise IntegrityError(
            f"the merged model does not carry the adapter: its logits are {proof.mean_difference:.2e} off, the adapter "
            f"moves them by {proof.adapter_effect:.2e}. Rounding hides so small an update: use "
            f"{params(dtype='float32', precision='32-true')}"
        )
    return proof


@torch.inference_mode()
def _logits(model: LLaMA, probes: list[list[int]]) -> Tensor:
    device = model.model.embed_tokens.weight.device
    return torch.cat([model(torch.tensor(ids, device=device)).float().cpu() for ids in probes])
