"""Ours on rows that ask for JSON: with and without a schema to be kept to, with and without guessed tokens."""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks.generation.worker import Result, serve
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.text.message import Conversation
from lit_llama.text.prompts.encode import prompt_ids
from lit_llama.text.read.formats.sources import read_questions


def main(folder: Path, rows_file: Path) -> None:
    """Load and serve."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    llm, examples = load(folder), read_questions(rows_file)

    def extract(rows: int, together: int, guess: bool, schema: bool) -> Result:
        """Greedy answers to the first rows, so many at a time: their tokens, and how many are the right JSON."""
        engine = Engine(
            llm.engine.runner,
            tokens=llm.tokenizer.size,
            config=EngineConfig(speculate=guess, max_sequences=together),
        )
        asked = examples[:rows]
        requests = [_request(llm, example, schema) for example in asked]
        start = time.perf_counter()
        tickets = [engine.add(request) for request in requests]
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - start
        made = [[token for step in ticket.steps for token in step.ids] for ticket in tickets]
        texts = [llm.tokenizer.decode([t for t in ids if t not in llm.stop_ids]) for ids in made]
        right = sum(_equal(text, example.response) for text, example in zip(texts, asked, strict=True))
        return {"seconds": seconds, "tokens": sum(map(len, made)), "right": right, "texts": texts}

    serve({"extract": extract})


def _request(llm: LLM, question: Conversation, schema: bool) -> Request:
    style = llm.require_style()
    ids = prompt_ids(llm.tokenizer, style, question.prompt, question.tools)
    sampling = Sampling(max_new_tokens=96, stop_ids=llm.stop_ids)
    constraint = llm.constraint(json_schema=_schema(question)) if schema else None
    return Request(ids, sampling, constraint=constraint)


def _schema(question: Conversation) -> dict[str, object]:
    """An object of the fields that the instruction names: texts or numbers."""
    text = str(question.prompt[-1]["content"])
    found = re.search(r"as JSON: ([^.]+)\.", text)
    names = [name.strip() for name in found[1].split(",")] if found else []
    value = {"anyOf": [{"type": "string"}, {"type": "number"}]}
    return {
        "type": "object",
        "properties": dict.fromkeys(names, value),
        "required": names,
        "additionalProperties": False,
    }


def _equal(text: str, reference: str | None) -> bool:
    try:
        return json.loads(text) == json.loads(reference or "")
    except ValueError:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
