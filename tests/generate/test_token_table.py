"""Bytes of tokens, and constraints that an LLM makes of its own tokenizer."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizer_zoo import SHAPES, write_shape

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place
from lit_llama.text.tokenizer.stream import token_bytes

TEXTS = ["Zoë's naïve café, 北京 \U0001f600", '{"a": [1, true]}\n\t  x', "<SQL> select </SQL>", "ÿ\u0301 🇨🇿"]


def check(tokenizer: Tokenizer) -> None:
    parts = token_bytes(tokenizer)
    assert len(parts) == tokenizer.size
    for text in TEXTS:  # several of their characters are spread over ids
        ids = tokenizer.encode(text, Place.MORE)
        made = b"".join(parts[index] for index in ids).decode()  # some put a blank behind an added word
        assert made == text or made.replace("<SQL>  ", "<SQL> ") == text == "<SQL> select </SQL>"
    draw, plain = random.Random(0), sorted({*range(tokenizer.size)} - {*tokenizer.words.values()})
    for _ in range(300):  # in any order; of what is no UTF-8, decoders make different signs
        ids = [index for index in draw.choices(plain, k=4) if parts[index]]
        made = b"".join(parts[index] for index in ids)
        assert b"\xef\xbf\xbd" not in made
        if "\ufffd" not in made.decode("utf-8", "replace"):
            assert tokenizer.decode(ids, Place.MORE) == made.decode()
    assert {parts[index] for index in tokenizer.control.values()} <= {b""}
    assert all(parts[index] == word.encode() for word, index in tokenizer.words.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_tokens_are_those_of_their_texts(tmp_path: Path, shape: str) -> None:
    """Catches: a blank that begins a token and is lost, a byte of a character taken for its replacement."""
    check(Tokenizer.from_path(write_shape(tmp_path, shape, marks=("<user>",))))


def test_bytes_of_sentencepiece(beside: Any) -> None:
    word = {"content": "<SQL>", "special": False, "lstrip": False, "rstrip": False}
    folder = beside(tokenizer_config={"added_tokens_decoder": {"400": word, "401": word | {"content": "</SQL>"}}})
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.words
    check(tokenizer)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return load(tiny_folder)


def answer(llm: LLM, **constraint: Any) -> str:
    sampling = Sampling(max_new_tokens=60, temperature=1.0, seed=3)
    request = llm.request([5, 6, 7], sampling, constraint=llm.constraint(**constraint))
    assert isinstance(request, Request)
    text = llm.text_behind(request.ids, sampling)
    found = "".join(text.take(step) for step in llm.engine.stream(request))
    assert text.finish_reason == "stop"
    return found


def test_an_llm_keeps_to_constraints_in_its_own_tokens(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"é": {"enum": ["北京", "x"]}}, "required": ["é"]}
    made = json.loads(answer(llm, json_schema={**schema, "additionalProperties": False}))
    assert made["é"] in ("北京", "x")
    assert re.fullmatch("[a-c]{2} [0-9]{2}", answer(llm, regex="[a-c]{2} [0-9]{2}"))
    assert answer(llm, choice=["naïve 北京", "no"]) in ("naïve 北京", "no")
    assert re.fullmatch(r"\d(,\d){2}", answer(llm, grammar='start: d "," d "," d\nd: /[0-9]/'))
    assert answer(llm, choice=["a<|im_end|>b"]) == "a<|im_end|>b"  # words, though they spell a control token


def test_one_constraint_at_a_time(llm: LLM) -> None:
    with pytest.raises(UserError, match="found 2 of them"):
        llm.constraint(regex="a", choice=["a"])
    with pytest.raises(UserError, match="found 0 of them"):
        llm.constraint()
