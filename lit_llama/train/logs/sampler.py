"""Answers to the same few prompts of the test split throughout a run, taken without disturbing it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.device import Numerics
from lit_llama.errors import DataError
from lit_llama.generate.answer import Answer, answer_requests, question_ids
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engines import copied_engine, torch_engine
from lit_llama.generate.llm import LLM, make_llm
from lit_llama.model.kernels.decode import PackedCache
from lit_llama.model.kernels.paged import BLOCK, PagedCache
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.folder import TEST_FILE
from lit_llama.text.message import Conversation
from lit_llama.text.prompts.encode import folder_style
from lit_llama.text.read.formats.sources import question_of, read_questions
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import special_ids

SAMPLES_FILE = "samples.jsonl"
MAX_NEW_TOKENS = 128
OPENING = 64
"""Most tokens of a plain text that are given to be continued."""


@dataclass(frozen=True)
class Prompt:
    """One test row to be answered.

    Args:
        row: Its number in test.jsonl, from 0.
        text: What is asked, for people.
        reference: The answer of the data.
        ids: What the model is given.
    """

    row: int
    text: str
    reference: str
    ids: Sequence[int]


class Sampler:
    """Greedy answers to fixed prompts.

    Args:
        llm: The model in training, with what its prompts and answers are made of.
        prompts: At least one.
        micro_batch_tokens: Tokens of the cache, so that it is small beside what a training step holds.
        numerics: Numbers that the run computes in; those of the weights if left out.
        packs: Pack a copy of the weights each time, which the kernels of a CPU answer with several times as fast.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Prompt],
        micro_batch_tokens: int,
        numerics: Numerics | None = None,
        *,
        packs: bool = False,
    ) -> None:
        self._llm, self.prompts, self._limit, self._numerics = llm, prompts, micro_batch_tokens, numerics
        self._packs = packs

    @classmethod
    def from_folders(
        cls,
        model: LLaMA,
        tokenizer: Tokenizer,
        checkpoint_dir: Path,
        data_dir: Path,
        count: int,
        micro_batch_tokens: int,
        numerics: Numerics,
        packs: bool,
    ) -> "Sampler":
        """Ask `count` rows of the test split in the style of the data folder; `tokenizer` is that of the checkpoint.

        Raises:
            DataError: No row of test.jsonl can be asked.
        """
        ends = special_ids(checkpoint_dir, tokenizer).ends
        llm = make_llm(model, tokenizer, folder_style(data_dir), ends)
        return cls(llm, test_prompts(llm, data_dir / TEST_FILE, count), micro_batch_tokens, numerics, packs=packs)

    def answers(self) -> list[Answer]:
        """Answer every prompt with at most MAX_NEW_TOKENS tokens.

        No random number is drawn, and the model is left in the mode in which it was found.
        """
        model = self._llm.model
        assert model is not None, "a model that is trained is not packed"
        training = model.training
        model.eval()
        try:
            with self._numerics.autocast() if self._numerics else nullcontext():
                return self._answer(model)
        finally:
            model.train(training)

    def rows(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield answers beside what was asked, as they stand in samples.jsonl."""
        for prompt, answer in zip(self.prompts, answers, strict=True):
            yield {
                "row": prompt.row,
                "prompt": prompt.text,
                "answer": answer.text,
                "reference": prompt.reference,
                "stopped": answer.stopped,
            }

    def _answer(self, model: LLaMA) -> list[Answer]:
        """All answers, from an engine whose memory is given back afterwards.

        Raises:
            UserError: One failed.
        """
        config, tokenizer = model.config, self._llm.tokenizer
        limits = [min(MAX_NEW_TOKENS, config.context_length - len(prompt.ids)) for prompt in self.prompts]
        lengths = [len(prompt.ids) + limit for prompt, limit in zip(self.prompts, limits, strict=True)]
        blocks, count = cache_blocks(lengths, self._limit), len(self.prompts)
        dtype = model.model.embed_tokens.weight.dtype
        if self._packs:
            size = PackedCache.bytes_of_block(config, dtype)
            engine = copied_engine(model, tokenizer.size, blocks * size, count, dtype)
        else:
            size = PagedCache.bytes_of_block(config, dtype)
            engine = torch_engine(model, tokenizer.size, blocks * size, count)
        llm = replace(self._llm, engine=engine)
        requests = [
            llm.request(prompt.ids, Sampling(max_new_tokens=limit))
            for prompt, limit in zip(self.prompts, limits, strict=True)
        ]
        answers = [answer for [answer] in answer_requests(llm, requests)]
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return answers


def cache_blocks(lengths: Sequence[int], micro_batch_tokens: int) -> int:
    """Count the blocks of a cache for sequences that grow to such lengths: of all of them, or of as many tokens as a
    micro-batch has, but never less than the longest needs. One more is the engine's own.
    """
    needed = [-(-length // BLOCK) for length in lengths]
    return max(*needed, min(sum(needed), -(-micro_batch_tokens // BLOCK))) + 1


def test_prompts(llm: LLM, path: Path, count: int) -> list[Prompt]:
    """Choose rows that stand evenly over the file; one that leaves the model no room is passed over for the next that
    fits.

    Raises:
        DataError: The file is missing or unusable, or no row of it fits.
    """
    rows = _read(path)
    found: dict[int, Prompt] = {}
    for start in range(min(count, len(rows))):
        at = start * len(rows) // min(count, len(rows))
        for number in (*range(at, len(rows)), *range(at)):
            if number not in found and (prompt := _prompt(llm, number, rows[number])) is not None:
                found[number] = prompt
                break
    if not found:
        raise DataError(f"{path}: no row can be asked of a model that reads {llm.config.context_length}")
    return [found[number] for number in sorted(found)]


def _read(path: Path) -> Sequence[Conversation | str]:
    """The rows of test.jsonl: what they ask, or plain texts."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
            file.seek(0)
            if "text" in first:
                return [json.loads(line)["text"] for line in file]
            if not first.keys() & {"chosen", "rejected", "label"}:
                return read_questions(path)
            return [question_of(_first_answer(json.loads(line)), number) for number, line in enumerate(file)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _first_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference row as a chat that ends in its chosen answer, or in the only one."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    if "prompt" not in row:
        return {"messages": row["messages"]} | tools
    return {"messages": [*row["prompt"], *(row.get("chosen") or row["rejected"])]} | tools


def _prompt(llm: LLM, number: int, row: Conversation | str) -> Prompt | None:
    tokenizer = llm.tokenizer
    if isinstance(row, str):
        ids = tokenizer.encode(row[: 40 * (OPENING + MAX_NEW_TOKENS)])
        cut = min(OPENING, len(ids) // 2)
        text, reference = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + MAX_NEW_TOKENS])
        ids = [*([tokenizer.control[tokenizer.bos]] if tokenizer.bos else []), *ids[:cut]]
    else:
        ids, text, reference = question_ids(llm, row), row.asked, row.response
    return Prompt(number, text, reference, ids) if 0 < len(ids) < llm.config.context_length else None
