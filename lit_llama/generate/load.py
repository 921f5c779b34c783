"""A checkpoint folder or an adapter folder -> everything needed to talk to it; the folder says which it is."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_llama.device import Precision, cores, peak_memory, pick_device, pick_dtype
from lit_llama.errors import CheckpointError
from lit_llama.generate.decode import generate
from lit_llama.generate.sampling import Sampling
from lit_llama.model.adapter import CONFIG_FILE, base_of, load_adapter
from lit_llama.model.attention import KVCache
from lit_llama.model.checkpoint import check_vocabulary, load_model
from lit_llama.model.llama import LLaMA
from lit_llama.progress import stderr
from lit_llama.text.encode import end_id
from lit_llama.text.prompts import PromptStyle, folder_style, named_style
from lit_llama.text.tokenizer import Streamer, Tokenizer


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, its prompt style, and the ids that end its answers."""

    model: LLaMA
    tokenizer: Tokenizer
    style: PromptStyle | None
    stop_ids: frozenset[int]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, cache: KVCache | None = None
    ) -> Iterator[tuple[list[int], str]]:
        """Continue one prompt; yields new ids and the text that became certain with them."""
        streamer = Streamer(self.tokenizer)
        steps = generate(
            self.model,
            [prompt],
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=sampling,
            tokens=self.tokenizer.size,
            cache=cache,
        )
        for step in steps:
            ids = [token for _, token in step]
            yield ids, streamer.push(i for i in ids if i not in self.stop_ids)
        yield [], streamer.flush()

    def require_style(self) -> PromptStyle:
        """The prompt style of the folder.

        Raises:
            CheckpointError: It has none, so nobody knows how to ask.
        """
        if self.style is None:
            raise CheckpointError(
                "the folder has no chat template, so it does not say how to put an instruction; name the style the "
                "model was trained with, for example --prompt_style alpaca, or continue raw text with generate/base.py"
            )
        return self.style


def load(folder: Path, *, precision: Precision = "auto", prompt_style: str | None = None) -> Speaker:
    """Load a checkpoint folder, or an adapter folder with its base.

    Args:
        folder: What finetune/ or prepare/checkpoint.py wrote, or any Hugging Face model folder.
        precision: Of weights and activations.
        prompt_style: Ask in this style instead of the folder's own.

    Raises:
        CheckpointError: Something is missing or does not fit.
        IntegrityError: The base is not the one the adapter was trained on.
    """
    start = time.perf_counter()
    device = pick_device()
    dtype = pick_dtype(precision, device)
    torch.set_num_threads(cores())
    base = base_of(folder) if (folder / CONFIG_FILE).is_file() else folder
    model = load_model(base, device, dtype)
    if base != folder:
        load_adapter(model, folder)
        model.requires_grad_(False).eval()
    tokenizer = Tokenizer.from_path(base)
    check_vocabulary(base, model.config.vocab_size, tokenizer.size)
    style = named_style(prompt_style) if prompt_style else folder_style(folder) or folder_style(base)
    what = f"{folder} on {base}" if base != folder else str(folder)
    stderr().print(f"{what}: {str(dtype)[6:]} on {device}, loaded in {time.perf_counter() - start:.1f} s")
    return Speaker(model, tokenizer, style, _stop_ids(base, model, tokenizer, style))


def _stop_ids(folder: Path, model: LLaMA, tokenizer: Tokenizer, style: PromptStyle | None) -> frozenset[int]:
    """Every id that the folder's files call an end, and the one that ends an answer in the style."""
    stop = {tokenizer.eos_id, *model.config.eos_token_id}
    own = end_id(tokenizer, style) if style else None
    stop.update([] if own is None else [own])
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a JSON object: {error}") from error
        stop.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(stop)


def report(tokens: int, seconds: float, device: torch.device) -> None:
    """Speed and peak memory, on stderr."""
    stderr().print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s; "
        f"peak memory {peak_memory(device) / 1e9:.2f} GB"
    )
