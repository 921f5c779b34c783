"""A checkpoint folder or an adapter folder -> everything needed to talk to it; the folder says which it is."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_llama.device import Precision, cores, peak_memory, pick_device, pick_dtype
from lit_llama.errors import CheckpointError
from lit_llama.generate.decode import generate
from lit_llama.generate.sampling import Sampling
from lit_llama.model.adapter import CONFIG_FILE, base_of, load_adapter, trained_on
from lit_llama.model.attention import KVCache
from lit_llama.model.checkpoint import load_model
from lit_llama.model.config import Onto
from lit_llama.model.llama import LLaMA
from lit_llama.progress import stderr
from lit_llama.text.encode import answer_opening, end_id, place_behind
from lit_llama.text.prompts import folder_style, named_style
from lit_llama.text.streamer import Streamer
from lit_llama.text.styles import PromptStyle
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary, special_ids


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, its prompt style, and the ids that end its answers.

    Attributes:
        opening: Text of the style that answers begin with and that is not shown.
    """

    model: LLaMA
    tokenizer: Tokenizer
    style: PromptStyle | None
    stop_ids: frozenset[int]
    opening: str = ""

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, cache: KVCache | None = None
    ) -> Iterator[tuple[list[int], str]]:
        """Continue one prompt; yields new ids and the text that became certain with them."""
        streamer = Streamer(self.tokenizer, place_behind(self.tokenizer, prompt))
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

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, cache: KVCache | None = None
    ) -> Iterator[tuple[list[int], str]]:
        """As `stream`, for a prompt in the folder's style: the text is the answer without its opening."""
        opening = self.opening
        for ids, text in self.stream(prompt, max_new_tokens, sampling, cache):
            shown = text.removeprefix(opening)
            opening = "" if text else opening
            yield ids, shown

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


def load(
    folder: Path,
    *,
    precision: Precision = "auto",
    prompt_style: str | None = None,
    quantize: Onto | None = None,
) -> Speaker:
    """Load a checkpoint folder, or an adapter folder with its base.

    Args:
        folder: What finetune/ or prepare/checkpoint.py wrote, or any Hugging Face model folder.
        precision: Of weights and activations.
        prompt_style: Ask in this style instead of the folder's own.
        quantize: How to hold the linear layers; None as they were held when the adapter was trained, or as they are
            stored.

    Raises:
        ResourceError: The quantisation cannot be had here.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: The base or its tokenizer is not the one the adapter was trained on.
    """
    start = time.perf_counter()
    device = pick_device()
    dtype = pick_dtype(precision, device)
    torch.set_num_threads(cores())
    base = base_of(folder) if (folder / CONFIG_FILE).is_file() else folder
    method = trained_on(folder) if quantize is None and base != folder else quantize
    held = None if method == "stored" else method
    model = load_model(base, device, dtype, held)
    if base != folder:
        load_adapter(model, folder)
        model.requires_grad_(False).eval()
    tokenizer = Tokenizer.from_path(base)
    check_vocabulary(base, model.config.vocab_size, tokenizer)
    for record in dict.fromkeys((folder, base)):
        check_recorded(record, tokenizer, base)
    style = named_style(prompt_style) if prompt_style else folder_style(folder) or folder_style(base)
    what = f"{folder} on {base}" if base != folder else str(folder)
    how = f"{held} and {str(dtype)[6:]}" if held else str(dtype)[6:]
    stderr().print(f"{what}: {how} on {device}, loaded in {time.perf_counter() - start:.1f} s")
    special = special_ids(base, tokenizer)
    for remark in (*tokenizer.remarks, *special.remarks):
        stderr().print(remark, markup=False)
    return make_speaker(model, tokenizer, style, special.ends)


def make_speaker(model: LLaMA, tokenizer: Tokenizer, style: PromptStyle | None, ends: frozenset[int]) -> Speaker:
    """Put a speaker together; its answers end in one of `ends`, or in what ends an answer in its style."""
    end = end_id(tokenizer, style) if style else None
    stop_ids = ends if end is None else ends | {end}
    return Speaker(model, tokenizer, style, stop_ids, answer_opening(tokenizer, style) if style else "")


def report(tokens: int, seconds: float, device: torch.device) -> None:
    """Speed and peak memory, on stderr."""
    stderr().print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s; "
        f"peak memory {peak_memory(device) / 1e9:.2f} GB"
    )
