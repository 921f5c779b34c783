"""A checkpoint folder or an adapter folder -> everything needed to talk to it; the folder says which it is."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_llama.device import Precision, cores, peak_memory, pick_device, pick_dtype
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.answer_text import AnswerText
from lit_llama.generate.decode import generate
from lit_llama.generate.defaults import folder_sampling
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import FolderSampling
from lit_llama.model.adapter import CONFIG_FILE, base_of, load_adapter, trained_on
from lit_llama.model.attention import KVCache
from lit_llama.model.checkpoint import load_model
from lit_llama.model.config import LLaMAConfig, Onto
from lit_llama.model.llama import LLaMA
from lit_llama.model.weights import Weights
from lit_llama.progress import stderr
from lit_llama.text.encode import answer_opening, end_id, place_behind, prompt_ids
from lit_llama.text.places import Place
from lit_llama.text.prompts import folder_style, named_style
from lit_llama.text.styles import PromptStyle
from lit_llama.text.tokenizer import Tokenizer
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
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        cache: KVCache | None = None,
        cached: Sequence[int] = (),
        number: int = 0,
        opening: str = "",
    ) -> "Stream":
        """Continue one prompt; gives new ids and the text that became certain with them.

        Args:
            prompt: Ids that are not in the cache.
            sampling: How tokens are drawn, and where the text ends.
            cache: See `generate`, as for `cached`.
            cached: Ids before the prompt that are in the cache.
            number: Of the answer, for its draws.
            opening: Text that is left out at the beginning.
        """
        text = self.text(sampling, opening, place_behind(self.tokenizer, [*cached[-1:], *prompt]))
        steps = generate(
            self.model,
            [prompt],
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=text.stop_ids,
            sampling=sampling,
            tokens=self.tokenizer.size,
            cache=cache,
            cached=cached,
            numbers=[number],
            ended=lambda *_: text.finish_reason is not None,
        )
        return Stream(steps, text)

    def answer(self, prompt: Sequence[int], sampling: Sampling, **more: Any) -> "Stream":
        """As `stream`, for a prompt in the folder's style: the text is the answer without its opening."""
        return self.stream(prompt, sampling, opening=self.opening, **more)

    def text(self, sampling: Sampling, opening: str = "", place: Place = Place.MORE) -> AnswerText:
        """What turns the ids of an answer into text."""
        return AnswerText(self.tokenizer, sampling, self.stop_ids | frozenset(sampling.stop_ids), opening, place)

    def require_style(self) -> PromptStyle:
        """The prompt style of the folder.

        Raises:
            CheckpointError: It has none, so nobody knows how to ask.
        """
        return _required(self.style)


class Stream:
    """An answer as it comes: iterating gives (new ids, text that became certain with them).

    Attributes:
        text: How it ended, once it has: `text.finish_reason`; and how many tokens it has.
    """

    def __init__(self, steps: Iterator[list[tuple[int, int]]], text: AnswerText) -> None:
        self.text = text
        self._pieces = self._run(steps)

    def __iter__(self) -> Iterator[tuple[list[int], str]]:
        return self._pieces

    def _run(self, steps: Iterator[list[tuple[int, int]]]) -> Iterator[tuple[list[int], str]]:
        for [(_, token)] in steps:
            yield [token], self.text.push(token)


@dataclass(frozen=True)
class Opened:
    """All of a folder but its weights: what can be checked before they are loaded.

    Attributes:
        folder: What was named.
        base: The model that it holds or adapts.
        tokenizer: That of answers.
        style: How it is asked; None if the folder does not say.
        ends: Ids that end a text.
        sampling: How its publisher samples it.
        remarks: What people should know of the files.
    """

    folder: Path
    base: Path
    tokenizer: Tokenizer
    style: PromptStyle | None
    ends: frozenset[int]
    sampling: FolderSampling
    remarks: tuple[str, ...] = ()

    def check_style(self, system: str = "") -> None:
        """Find out whether questions can be put.

        Args:
            system: Message that they begin with.

        Raises:
            CheckpointError: There is no prompt style, or the tokenizer lacks tokens of it.
            UserError: The style has no system message.
        """
        turns = [{"role": "system", "content": system}] if system else []
        prompt_ids(self.tokenizer, _required(self.style), [*turns, {"role": "user", "content": "."}])

    def load(self, *, precision: Precision = "auto", quantize: Onto | None = None) -> Speaker:
        """Load the weights; arguments and errors as for `load`."""
        start = time.perf_counter()
        device = pick_device()
        dtype = pick_dtype(precision, device)
        torch.set_num_threads(cores())
        adapted = self.base != self.folder
        method = trained_on(self.folder) if quantize is None and adapted else quantize
        held = None if method == "stored" else method
        model = load_model(self.base, device, dtype, held)
        remarks = [*Weights(self.base).remarks]
        if adapted:
            remarks += load_adapter(model, self.folder).remarks
            model.requires_grad_(False).eval()
        what = f"{self.folder} on {self.base}" if adapted else str(self.folder)
        how = f"{held} and {str(dtype)[6:]}" if held else str(dtype)[6:]
        stderr().print(f"{what}: {how} on {device}, loaded in {time.perf_counter() - start:.1f} s")
        for remark in (*remarks, *self.remarks):
            stderr().print(remark)
        return make_speaker(model, self.tokenizer, self.style, self.ends)


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
    opened = open_folder(folder, prompt_style=prompt_style, base_dir=base_dir)
    return opened.load(precision=precision, quantize=quantize)


def open_folder(folder: Path | str, *, prompt_style: str | None = None, base_dir: Path | str | None = None) -> Opened:
    """Read all of a folder but its weights; arguments and errors as for `load`."""
    folder = Path(folder)
    base = _base(folder, None if base_dir is None else Path(base_dir))
    tokenizer = adapter_tokenizer(folder, base, LLaMAConfig.from_folder(base).vocab_size)
    style = named_style(prompt_style) if prompt_style else folder_style(folder) or folder_style(base)
    specials = [special_ids(place, tokenizer) for place in dict.fromkeys((base, folder))]
    remarks = [*tokenizer.remarks, *(remark for special in specials for remark in special.remarks)]
    if (home := tokenizer_home(folder, base)) != base:
        remarks.insert(0, f"{home}: its own tokenizer is used ({tokenizer.size} tokens, texts end in {tokenizer.eos})")
    ends = frozenset[int]().union(*(special.ends for special in specials))
    return Opened(folder, base, tokenizer, style, ends, folder_sampling(folder, base), tuple(remarks))


def _required(style: PromptStyle | None) -> PromptStyle:
    if style is None:
        raise CheckpointError(
            "the folder has no chat template, so it does not say how to put an instruction; name the style the model "
            "was trained with, for example --prompt_style alpaca, or continue raw text with generate/base.py"
        )
    return style


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


def report(tokens: int, seconds: float, device: torch.device, ending: str = "") -> None:
    """Speed and peak memory, on stderr.

    Args:
        tokens: That were made.
        seconds: That it took.
        device: Where.
        ending: How the answer ended, where that should be said.
    """
    stderr().print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s; "
        f"peak memory {peak_memory(device) / 1e9:.2f} GB{ending}"
    )
