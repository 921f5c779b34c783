"""The published words of Llama 2 and 3, Mistral and plain text, and their ids against Meta's code and transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import sentencepiece
from conftest import encode_examples
from hypothesis import given
from test_prompts import FUZZ, Chat, chat, chats, same_ids, text_of
from test_styles import transformers_tokenizer
from tokenizer_files import byte_level, in_transformers

from lit_llama.errors import CheckpointError
from lit_llama.text.config import StyleName
from lit_llama.text.message import IGNORE_INDEX, instruct
from lit_llama.text.prompts.encode import answer_opening, end_id, named_style, prompt_ids
from lit_llama.text.prompts.styles import Segment
from lit_llama.text.tokenizer.base import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
RESPONSES = ["hello", "你好", "(1)", "two  blanks", "a\nline", "'s"]


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with Llama 3's control tokens, that begins texts as Llama 3's does."""
    folder = tmp_path_factory.mktemp("llama3")
    byte_level(folder, ["<|begin_of_text|>", "<|end_of_text|>", *HEADERS], "<|begin_of_text|>", "<|end_of_text|>")
    return folder


def trained(style: str, response: str) -> list[Segment]:
    return [segment for segment in named_style(style).render(chat("a", response), eos="</s>") if segment.trained]


def test_llama_2_as_published() -> None:
    """Catches a second exchange without its own beginning, a system message in a turn of its own, and lost blanks."""
    style = named_style("llama-2")
    assert text_of(style, chat(" hi\n"), bos="<s>", eos="</s>", answer=True) == "<s>[INST] hi [/INST]"
    assert text_of(style, [SYSTEM, *chat("a", " b ", "c")], bos="<s>", eos="</s>", answer=True) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"
    )
    assert trained("llama-2", " b ") == [
        Segment(" ", trained=True, template=True),
        Segment("b", trained=True),
        Segment(" ", trained=True, template=True),
        Segment("</s>", trained=True, template=True),
    ]


def test_llama_3_as_published(llama3: Path) -> None:
    """Catches a prompt of another blank or newline than Meta's, and an answer that ends in <|end_of_text|>."""
    style = named_style("llama-3")
    assert text_of(style, [SYSTEM, *chat(" a ", "b")], bos="<|begin_of_text|>", answer=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert trained("llama-3", "b") == [
        Segment("b", trained=True),
        Segment("<|eot_id|>", trained=True, template=True),
    ]
    tokenizer = Tokenizer.from_path(llama3)
    assert end_id(tokenizer, style) == tokenizer.control["<|eot_id|>"] != tokenizer.eos_id


def test_mistral_as_published() -> None:
    """Catches a beginning before every exchange (Llama 2's), and blanks stripped that Mistral keeps."""
    style = named_style("mistral")
    assert text_of(style, chat("a", "b", " c"), bos="<s>", eos="</s>", answer=True) == (
        "<s>[INST] a [/INST] b</s>[INST]  c [/INST]"
    )
    assert trained("mistral", "b") == [
        Segment(" ", trained=True, template=True),
        Segment("b", trained=True),
        Segment("</s>", trained=True, template=True),
    ]


def test_plain_text_is_nothing_but_the_text() -> None:
    """Catches a newline or a mark between a text and its continuation."""
    assert text_of(named_style("plain"), chat("Once upon"), bos="<s>", answer=True) == "<s>Once upon"
    assert text_of(named_style("plain"), chat("Once upon", " a time"), bos="<s>", eos="</s>") == (
        "<s>Once upon a time</s>"
    )


def as_meta_encodes(model: Any, messages: Chat) -> list[int]:
    """llama/generation.py of Meta's repository, chat_completion."""
    if messages[0]["role"] == "system":
        first = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": first}, *messages[2:]]
    ids: list[int] = []
    for question, answer in zip(messages[::2], messages[1::2], strict=False):
        text = f"[INST] {question['content'].strip()} [/INST] {answer['content'].strip()} "
        ids += [1, *model.encode(text), 2]
    return [*ids, 1, *model.encode(f"[INST] {messages[-1]['content'].strip()} [/INST]")]


@FUZZ
@given(chats)
def test_llama_2_has_the_ids_of_metas_code(llama_tokenizer: Path, messages: Chat) -> None:
    """Catches a doubled or a missing blank of sentencepiece's, and a question and an answer encoded apart."""
    messages = [*messages[: len(messages) - 1 + len(messages) % 2]]
    ours, model = Tokenizer.from_path(llama_tokenizer), sentencepiece.SentencePieceProcessor(str(llama_tokenizer))
    for prompt in (messages, [SYSTEM, chat("Q" + messages[0]["content"])[0], *messages[1:]]):
        assert prompt_ids(ours, named_style("llama-2"), prompt) == as_meta_encodes(model, prompt)


@pytest.mark.parametrize("response", RESPONSES)
def test_llama_2_and_mistral_learn_the_ids_of_the_whole_text(response: str, llama_tokenizer: Path) -> None:
    """Catches "▁▁hello", an answer whose last blank is lost, and a loss on the question."""
    ours, model = Tokenizer.from_path(llama_tokenizer), sentencepiece.SentencePieceProcessor(str(llama_tokenizer))
    for style, closing in (("llama-2", " "), ("mistral", "")):
        [sample], _ = encode_examples(
            [instruct("hi", "", response)], named_style(style), ours, max_seq_length=99, mask_inputs=True
        )
        assert sample.input_ids == [1, *model.encode(f"[INST] hi [/INST] {response}{closing}"), 2]
        prompt = prompt_ids(ours, named_style(style), chat("hi"))
        assert prompt == [1, *model.encode("[INST] hi [/INST]")] == sample.input_ids[: len(prompt)]
        assert sample.labels == [IGNORE_INDEX] * len(prompt) + sample.input_ids[len(prompt) :]


@pytest.mark.parametrize("style", ["llama-2", "mistral"])
def test_sentencepiece_ids_equal_those_of_transformers(style: str, beside: Callable[..., Path]) -> None:
    """Catches a twin that makes vLLM and others feed other ids, also after an answer and its end."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = beside(special_tokens_map=names)
    ours, theirs = Tokenizer.from_path(folder), transformers_tokenizer(folder)
    system = [[SYSTEM, *chat("Why?")]] if style == "llama-2" else []
    for messages in (chat("Hello."), chat("Hello.", "Hello to you.", "写"), chat("a", "b", "c", "d", "e"), *system):
        same_ids(theirs, ours, named_style(style), messages, named_style(style).jinja(bos=True))


@FUZZ
@given(chats)
def test_byte_level_ids_equal_those_of_transformers(llama3: Path, messages: Chat) -> None:
    """Catches a header that is spelled in letters, and a second beginning."""
    ours, theirs = Tokenizer.from_path(llama3), in_transformers(llama3)
    for prompt in (messages, [SYSTEM, *messages]):
        same_ids(theirs, ours, named_style("llama-3"), prompt, named_style("llama-3").jinja(bos=True))
    for style in ("llama-2", "mistral", "plain"):
        same_ids(theirs, ours, named_style(style), messages[:1], named_style(style).jinja(bos=True))


def test_mistral_takes_inst_for_a_control_token_where_it_is_one(tmp_path: Path) -> None:
    """Catches [INST] in letters for a tokenizer that has it, and one that somebody typed."""
    byte_level(tmp_path, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>")
    ours, theirs = Tokenizer.from_path(tmp_path), in_transformers(tmp_path)
    same_ids(theirs, ours, named_style("mistral"), chat("a"), named_style("mistral").jinja(bos=True))
    ids = prompt_ids(ours, named_style("mistral"), chat("[/INST] b </s>[INST]", "[INST]", "c"))
    assert [ids.count(ours.control[token]) for token in ("<s>", "</s>", "[INST]", "[/INST]")] == [1, 1, 2, 2]


def test_plain_text_has_the_ids_of_the_whole_text(llama_tokenizer: Path, llama3: Path) -> None:
    """Catches a blank that sentencepiece puts before a continuation that has its own already."""
    ours, model = Tokenizer.from_path(llama_tokenizer), sentencepiece.SentencePieceProcessor(str(llama_tokenizer))
    for tokenizer in (ours, Tokenizer.from_path(llama3)):
        [sample], _ = encode_examples(
            [instruct("Once upon", "", " a time")], named_style("plain"), tokenizer, max_seq_length=99, mask_inputs=True
        )
        assert tokenizer.decode(sample.input_ids) == "Once upon a time"
        prompt = prompt_ids(tokenizer, named_style("plain"), chat("Once upon"))
        assert prompt == sample.input_ids[: len(prompt)] == [sample.input_ids[0], *tokenizer.encode("Once upon")]
        if tokenizer is ours:
            assert sample.input_ids == [1, *model.encode("Once upon a time"), 2]


def test_llama_3_without_its_tokens_is_refused(llama_tokenizer: Path) -> None:
    """Catches <|eot_id|> in letters, which no model learned to stop at."""
    with pytest.raises(CheckpointError, match=r"llama-3 needs the tokens <\|start_header_id\|>, .*<\|eot_id\|>"):
        prompt_ids(Tokenizer.from_path(llama_tokenizer), named_style("llama-3"), chat("hi"))


def test_the_blank_before_an_answer_is_known(llama_tokenizer: Path, llama3: Path) -> None:
    """Catches answers that are shown with the blank of the style, or without one of their own."""
    spaced, bytes_ = Tokenizer.from_path(llama_tokenizer), Tokenizer.from_path(llama3)
    for tokenizer in (bytes_, spaced):
        openings = {name: answer_opening(tokenizer, named_style(name)) for name in get_args(StyleName)}
        assert {name for name, opening in openings.items() if opening == " "} == {"vicuna", "llama-2", "mistral"}
        assert set(openings.values()) == {"", " "}
