"""A checkpoint folder or an adapter folder -> everything needed to talk to it; the folder says which it is."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast, overload

import torch

from lit_llama.conversion.merged import Merged
from lit_llama.device import cores
from lit_llama.errors import CheckpointError, ResourceError, UserError
from lit_llama.folder.manifest import check_folder
from lit_llama.generate.engine.constraint import Constraint, TokenTable
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.speculative import check_takes_back
from lit_llama.generate.engines import packed_engine, speculate, torch_engine
from lit_llama.generate.flags import FolderSampling, Loading, folder_sampling
from lit_llama.generate.plan import (
    GenerationPlan,
    cache_limit,
    numbers,
    offloading,
    plan_generation,
    remedy,
    shortfall,
)
from lit_llama.generate.text_model import AnswerText, Messages, Stream, TextModel, TextStream
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, base_of, trained_on, verify_folders
from lit_llama.model.assemble import adapted, assemble
from lit_llama.model.config import KVCacheType, LLaMAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.weights import Weights
from lit_llama.model.llama import LLaMA
from lit_llama.model.offload import offload
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import (
    answer_opening,
    end_id,
    folder_style,
    for_style,
    named_style,
    place_behind,
    prompt_ids,
    required_style,
)
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place
from lit_llama.text.tokenizer.stream import token_bytes
from lit_llama.text.tokenizer.vocabulary import adapter_tokenizer, difference, special_ids, tokenizer_home
from lit_llama.wording import call, param


@dataclass(frozen=True, kw_only=True)
class LLM(TextModel):
    """An engine with its tokenizer, its prompt style, and the ids that end its answers.

    Attributes:
        engine: What answers.
        config: Shape of the model.
        device: Where it computes.
        opening: Text of the style that answers begin with and that is not shown.
        model: What the engine runs, where its weights were not packed.
        adapter: Name of the adapter that answers, where the engine has several models; None for its own.
        defaults: How its publisher samples it, where a call does not say.
        remarks: What people should know of it, such as that it is larger than the memory.
    """

    engine: Engine
    config: LLaMAConfig
    device: torch.device
    tokenizer: Tokenizer
    style: PromptStyle | None
    stop_ids: frozenset[int]
    opening: str = ""
    model: LLaMA | None = None
    adapter: str | None = None
    defaults: FolderSampling = field(default_factory=FolderSampling)
    remarks: tuple[str, ...] = ()

    def request(self, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Request:
        """Build the request of the engine for a prompt, which ends at what ends a text here.

        Args:
            prompt: Ids.
            sampling: How tokens are drawn.
            more: Other fields of `Request`.
        """
        stops = self.text(sampling).stop_ids
        fields = {"adapter": self.adapter, **more}
        return Request(prompt, replace(sampling, stop_ids=frozenset(stops)), **fields)

    @cached_property
    def guarded(self) -> Tokenizer:
        """The tokenizer, in which the words that open turns are control tokens."""
        return for_style(self.tokenizer, self.style) if self.style else self.tokenizer

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id adds to a text; none of a control token."""
        return token_bytes(self.guarded)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that a token adds to a text at most."""
        return max(map(len, self.token_bytes))

    @cached_property
    def token_table(self) -> TokenTable:
        """The tokenizer as constraints read it.

        Raises:
            ResourceError: llguidance is not installed.
        """
        tokenizer, parts = self.guarded, self.token_bytes
        silent = [index for index, part in enumerate(parts) if not part]
        named = [part or b"<%d>" % index for index, part in enumerate(parts)]
        return TokenTable(named, silent, self.stop_ids, partial(tokenizer.encode, place=Place.MORE))

    def constraint(self, **form: Any) -> Constraint:
        """Return the form that an answer has to have, for `request`; see `Constraint.of`.

        Args:
            form: One of json_schema, regex, choice and grammar.
        """
        return Constraint.of(lambda: self.token_table, **form)

    @overload
    def stream(self, prompt: str | Messages, sampling: Sampling | None = None, **more: Any) -> TextStream: ...

    @overload
    def stream(self, prompt: Sequence[int], sampling: Sampling, *, opening: str = "", **more: Any) -> Stream: ...

    def stream(
        self,
        prompt: str | Messages | Sequence[int],
        sampling: Sampling | None = None,
        *,
        opening: str = "",
        **more: Any,
    ) -> Stream | TextStream:
        """Answer one prompt, once, as it is made.

        Args:
            prompt: An instruction or messages, as for `generate` and `chat`, which give pieces of text; or ids to be
                continued, which give new ids and the text that became certain with them.
            sampling: How tokens are drawn, and where the text ends; needed for ids.
            opening: Of ids, text that is left out at the beginning.
            more: Of a text, as for `generate`; of ids, fields of the Request, such as its number.
        """
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            return self.stream_text(cast("str | Messages", prompt), sampling, **more)
        if sampling is None:
            raise UserError("a prompt of ids needs a Sampling beside it")
        prompt = cast("Sequence[int]", prompt)
        request = self.request(prompt, replace(sampling, n=1), **more)
        return Stream(self.engine.stream(request), self.text_behind(prompt, sampling, opening))

    def answer(self, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Stream:
        """Stream the answer to a prompt in the folder's style, without its opening; as `stream` in all else."""
        return self.stream(prompt, sampling, opening=self.opening, **more)

    def text(self, sampling: Sampling, opening: str = "", place: Place = Place.MORE) -> AnswerText:
        """Build the text that the ids of an answer turn into."""
        return AnswerText(self.tokenizer, sampling, self.stop_ids | frozenset(sampling.stop_ids), opening, place)

    def text_behind(self, prompt: Sequence[int], sampling: Sampling, opening: str = "") -> AnswerText:
        """Build the text of an answer that stands behind a prompt, as `text` does."""
        return self.text(sampling, opening, place_behind(self.tokenizer, prompt))

    def require_style(self) -> PromptStyle:
        """Return the prompt style of the folder.

        Raises:
            CheckpointError: It has none, so nobody knows how to ask.
        """
        return required_style(self.style, self.tokenizer)


@dataclass(frozen=True)
class Opened:
    """Folder without its weights: everything that can be checked before they are loaded.

    Attributes:
        folder: What was named.
        base: The model that it holds or adapts.
        tokenizer: That of answers.
        style: How it is asked; None if the folder does not say.
        ends: Ids that end a text.
        sampling: How its publisher samples it.
        loading: How it is loaded.
        remarks: What people should know of the files.
    """

    folder: Path
    base: Path
    tokenizer: Tokenizer
    style: PromptStyle | None
    ends: frozenset[int]
    sampling: FolderSampling
    loading: Loading = field(default_factory=Loading)
    remarks: tuple[str, ...] = ()

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter on a base."""
        return self.base != self.folder

    def check_style(self, system: str = "") -> None:
        """Find out whether questions can be put.

        Args:
            system: Message that they begin with.

        Raises:
            CheckpointError: There is no prompt style, or the tokenizer lacks tokens of it.
            UserError: The style has no system message.
        """
        style = required_style(self.style, self.tokenizer)
        turns = [{"role": "system", "content": system}] if system else []
        prompt_ids(self.tokenizer, style, [*turns, {"role": "user", "content": "."}])

    def plan(self) -> GenerationPlan:
        """Return the memory that answers take, known before a weight is read.

        Raises:
            UserError: `Loading.plan_memory` is no amount.
            ResourceError: The quantisation cannot be had here.
        """
        loading = self.loading
        apart = self.adapted and not loading.merge_adapter
        trained = trained_on(self.folder) if loading.quantize is None and apart else None
        plan = plan_generation(
            LLaMAConfig.from_folder(self.base),
            precision=loading.precision,
            held=loading.quantize or trained or "stored",
            as_trained=trained is not None,
            max_sequences=loading.batch_size,
            kv_cache=loading.kv_cache,
            memory=loading.plan_memory,
        )
        return plan if loading.packed else replace(plan, packs=False)

    def load(self) -> LLM:
        """Load the weights; errors as for the function `load`."""
        draft = None if self.loading.draft_dir is None else open_draft(self.loading.draft_dir, self)
        start = time.perf_counter()
        plan = self.plan()
        torch.set_num_threads(cores())
        model, remarks = self._model(plan)
        llm = make_llm(model, self.tokenizer, self.style, self.ends, plan.max_sequences, plan.kv_cache)
        if plan.packed:
            llm = replace(llm, engine=packed_engine(model, self.tokenizer.size, plan), model=None)
        what = f"{self.folder} on {self.base}" if self.adapted else str(self.folder)
        stderr().print(f"{what}: {numbers(plan)} on {plan.device}, loaded in {time.perf_counter() - start:.1f} s")
        if plan.offloaded:
            remarks.insert(0, f"{shortfall(plan)}; {offloading(plan)}; {remedy(plan)}")
        elif not plan.fits:
            remarks.insert(0, f"warning: {shortfall(plan)}; {remedy(plan)}")
        if plan.states:
            remarks.append("recurrent layers: every prompt is computed from its first token, and no tokens are guessed")
        for remark in (remarks := [*remarks, *self.remarks]):
            stderr().print(remark)
        if draft is not None:
            speculate(llm.engine, draft.load().engine, draft.tokenizer.size, plan.max_sequences)
        return replace(llm, defaults=self.sampling, remarks=tuple(remarks))

    def on(self, llm: LLM, adapter: str | None) -> LLM:
        """Build an LLM of the same engine, asked and ending as this folder says, with an adapter of the engine."""
        own: dict[str, Any] = {"defaults": self.sampling, "remarks": self.remarks}
        return replace(llm, adapter=adapter, **own, **_texts(self.tokenizer, self.style, self.ends))

    def _model(self, plan: GenerationPlan) -> tuple[LLaMA, list[str]]:
        """The model as a plan has it, its adapter on it, and what people should know of the files."""
        layers = plan.config.num_hidden_layers
        first = layers - plan.offloaded
        # Weights that are packed or brought from elsewhere are mapped until then, so that they are not there twice.
        dtype = None if plan.packed else plan.dtype
        if self.loading.merge_adapter:
            if plan.offloaded:
                raise ResourceError(
                    f"{shortfall(plan)}: its layers stay in their files, which no adapter can be merged into as they "
                    f"are loaded; merge it with {call('merge')}, or leave {param('merge_adapter')} out"
                )
            merged = Merged(self.base, self.folder, trained_on(self.folder) or "stored", None)
            return load_model(self.base, plan.device, dtype, plan.quantization, source=merged), [*merged.remarks]
        model = load_model(self.base, plan.device, dtype, plan.quantization, stored_from=first)
        remarks = [*Weights(self.base).remarks]
        stored = list(model.model.layers[first:].parameters())
        if self.adapted:
            assemble(model, adapted(self.folder, remarks)).model.requires_grad_(False).eval()
        if plan.offloaded:
            offload(model, plan.device, plan.dtype, first, stored)
        return model, remarks


def load(folder: Path | str, **options: Any) -> LLM:
    """Load a checkpoint folder, or an adapter folder with its base.

    Args:
        folder: An adapter folder, or any Hugging Face model folder.
        options: Fields of `Loading`, such as `precision` and `quantize`.

    Raises:
        ResourceError: The quantisation cannot be had here.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: The base or its tokenizer is not the one the adapter was trained on.
    """
    return open_folder(folder, Loading(**options)).load()


def open_folder(folder: Path | str, loading: Loading | None = None) -> Opened:
    """Read all of a folder but its weights; errors as for `load`."""
    loading = loading or Loading()
    folder = Path(folder)
    if loading.verify:
        verify_folders(folder, base_dir=loading.base_dir)
    check_folder(folder)
    base = _base(folder, loading)
    named = loading.prompt_style
    style = named_style(named) if named else folder_style(folder) or folder_style(base)
    tokenizer = adapter_tokenizer(folder, base, LLaMAConfig.from_folder(base).vocab_size)
    specials = [special_ids(place, tokenizer) for place in dict.fromkeys((base, folder))]
    remarks = [*tokenizer.remarks, *(remark for special in specials for remark in special.remarks)]
    if (home := tokenizer_home(folder, base)) != base:
        remarks.insert(0, f"{home}: its own tokenizer is used ({tokenizer.size} tokens, texts end in {tokenizer.eos})")
    ends = frozenset[int]().union(*(special.ends for special in specials))
    return Opened(folder, base, tokenizer, style, ends, folder_sampling(folder, base), loading, tuple(remarks))


def open_draft(draft_dir: Path | str, folder: Opened) -> Opened:
    """Read all of a draft but its weights, which are held as its folder says.

    Args:
        draft_dir: A checkpoint or adapter folder.
        folder: What it guesses for.

    Raises:
        CheckpointError: It has another vocabulary; or as for `open_folder`.
        UserError: One of the two has recurrent layers.
    """
    way = folder.loading
    draft = open_folder(draft_dir, Loading(precision=way.precision, batch_size=way.batch_size, kv_cache=way.kv_cache))
    for place in (folder.base, draft.base):
        check_takes_back(LLaMAConfig.from_folder(place), place)
    if differ := difference(draft.tokenizer.vocabulary, folder.tokenizer.vocabulary):
        raise CheckpointError(
            f"{draft_dir} cannot guess tokens for {folder.folder}, as they have different vocabularies {differ}; "
            "name a draft with the same tokenizer"
        )
    return draft


def _base(folder: Path, loading: Loading) -> Path:
    """The model that a folder holds, or that its adapter belongs to."""
    if (folder / CONFIG_FILE).is_file():
        return base_of(folder, loading.base_dir)
    none = f"an adapter, but {folder} is none: it has no {CONFIG_FILE}"
    if loading.base_dir is not None:
        raise UserError(f"is the base of {none}", parameter="base_dir")
    if loading.merge_adapter:
        raise UserError(f"is for {none}", parameter="merge_adapter")
    return folder


def make_llm(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle | None,
    ends: frozenset[int],
    max_sequences: int = 32,
    kv_cache: KVCacheType = "auto",
) -> LLM:
    """Put an LLM together; its answers end in one of `ends`, or in what ends an answer in its style."""
    weight = model.model.norm.weight  # which is on the device, wherever other weights are
    cache_bytes = cache_limit(model.config, weight.dtype, weight.device, max_sequences, kv_cache)
    return LLM(
        engine=torch_engine(model, tokenizer.size, cache_bytes, max_sequences, kv_cache),
        config=model.config,
        device=weight.device,
        model=model,
        **_texts(tokenizer, style, ends),
    )


def _texts(tokenizer: Tokenizer, style: PromptStyle | None, ends: frozenset[int]) -> dict[str, Any]:
    """Attributes of an LLM that have to do with texts."""
    end = end_id(tokenizer, style) if style else None
    return {
        "tokenizer": tokenizer,
        "style": style,
        "stop_ids": ends if end is None else ends | {end},
        "opening": answer_opening(tokenizer, style) if style else "",
    }
