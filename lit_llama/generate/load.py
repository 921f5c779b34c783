"""A checkpoint folder or an adapter folder -> everything needed to talk to it; the folder says which it is."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_llama.device import Precision, cores, peak_memory, pick_device, pick_dtype
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.decode import generate
from lit_llama.generate.sampling import Sampling
from lit_llama.model.adapter import CONFIG_FILE, base_of, load_adapter, trained_on
from lit_llama.model.attention import KVCache
from lit_llama.model.checkpoint import load_model
from lit_llama.model.config import LLaMAConfig, Onto
from lit_llama.model.llama import LLaMA
from lit_llama.model.weights import Weights
from lit_llama.progress import stderr
from lit_llama.text.encode import answer_opening, end_id
from lit_llama.text.prompts import folder_style, named_style
from lit_llama.text.styles import PromptStyle
from lit_llama.text.tokenizer import Streamer, Tokenizer
from lit_llama.text.vocabulary import adapter_tokenizer, special_ids, tokenizer_home


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
    folder: Path | str,
    *,
    precision: Precision = "auto",
    prompt_style: str | None = None,
    quantize: Onto | None = None,
    base_dir: Path | str | None = None,
) -> Speaker:
    """Load a checkpoint folder, or an adapter folder with its base.

    Args:
        folder: What finetune/ or prepare/checkpoint.py wrote, or any Hugging Face model folder.
        precision: Of weights and activations.
        prompt_style: Ask in this style instead of the folder's own.
        quantize: How to hold the linear layers; None as they were held when the adapter was trained, or as they are
            stored.
        base_dir: Where the base of an adapter is; None looks for it, see `base_of`.

    Raises:
        ResourceError: The quantisation cannot be had here.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: The base or its tokenizer is not the one the adapter was trained on.
    """
    start = time.perf_counter()
    folder = Path(folder)
    base = _base(folder, None if base_dir is None else Path(base_dir))
    device = pick_device()
    dtype = pick_dtype(precision, device)
    torch.set_num_threads(cores())
    method = trained_on(folder) if quantize is None and base != folder else quantize
    held = None if method == "stored" else method
    tokenizer = adapter_tokenizer(folder, base, LLaMAConfig.from_folder(base).vocab_size)
    model = load_model(base, device, dtype, held)
    remarks = [*Weights(base).remarks]
    if base != folder:
        remarks += load_adapter(model, folder).remarks
        model.requires_grad_(False).eval()
    style = named_style(prompt_style) if prompt_style else folder_style(folder) or folder_style(base)
    what = f"{folder} on {base}" if base != folder else str(folder)
    how = f"{held} and {str(dtype)[6:]}" if held else str(dtype)[6:]
    stderr().print(f"{what}: {how} on {device}, loaded in {time.perf_counter() - start:.1f} s")
    specials = [special_ids(place, tokenizer) for place in dict.fromkeys((base, folder))]
    if (home := tokenizer_home(folder, base)) != base:
        remarks.append(f"{home}: its own tokenizer is used ({tokenizer.size} tokens, texts end in {tokenizer.eos})")
    for remark in (*remarks, *tokenizer.remarks, *(remark for special in specials for remark in special.remarks)):
        stderr().print(remark, markup=False)
    return make_speaker(model, tokenizer, style, frozenset().union(*(special.ends for special in specials)))


def _base(folder: Path, base_dir: Path | None) -> Path:
    """The model that a folder holds, or that its adapter belongs to."""
    if (folder / CONFIG_FILE).is_file():
        return base_of(folder, base_dir)
    if base_dir is not None:
        raise UserError(f"--base_dir is the base of an adapter, but {folder} is none: it has no {CONFIG_FILE}")
    return folder


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
