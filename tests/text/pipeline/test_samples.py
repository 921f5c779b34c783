"""Samples against an independent construction: turn by turn, what generation would be fed, and what is lost of it."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS, Sample, samples_of

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.message import IGNORE_INDEX, Conversation, Message
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.prompts.encode import JinjaStyle, named_style, prompt_ids
from lit_llama.text.prompts.styles import Alpaca, ChatML, PromptStyle, Segment, Vicuna
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place

WORDS = ["Zoë", "北京", "😀", "plain", "two  blanks", "\nline", " before", "after ", "<|im_end|>", "</s>", "<s>", "1,2"]
CHATML = JinjaStyle(
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Both kinds: one without a beginning that ends in <|im_end|>, one with <s> and </s>."""
    name = {"byte-level": "tiny_folder", "sentencepiece": "llama_tokenizer"}[request.param]
    return Tokenizer.from_path(request.getfixturevalue(name))


def styles(tokenizer: Tokenizer) -> list[PromptStyle]:
    """Those whose control tokens the tokenizer has."""
    return [Alpaca(), Vicuna(), *([ChatML(), CHATML] if "<|im_end|>" in tokenizer.control else [])]


def chat(turns: int, seed: int = 0, system: str = "") -> list[Message]:
    """Questions and answers out of words that are hard to cut."""
    draw = random.Random(seed)
    words = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 9))) or "x" for _ in range(2 * turns)]
    roles = ["user", "assistant"] * turns
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def rows_of(*chats: Sequence[Message]) -> list[Conversation]:
    return [Conversation(tuple(messages), row, f"a.jsonl:line {row + 1}") for row, messages in enumerate(chats)]


def text_rows(*texts: str) -> list[Conversation]:
    return [replace(row, text=True) for row in rows_of(*([{"role": "assistant", "content": text}] for text in texts))]


def encode(
    tokenizer: Tokenizer, rows: Sequence[Conversation], style: PromptStyle | None = None, **options: Any
) -> tuple[list[Sample], Encoded]:
    encoder = Encoder(tokenizer, style or Alpaca(), **{"max_seq_length": 100_000, **options})
    encoded = encoder.encode(encoder.render(rows))
    return samples_of(encoded), encoded


def answer_ids(tokenizer: Tokenizer, style: PromptStyle, answer: str) -> list[int]:
    """What a model has to say, up to its end."""
    opening = " " if style.name == "vicuna" else ""
    end = tokenizer.control["<|im_end|>"] if style.name in ("chatml", "chat_template") else tokenizer.eos_id
    return [*tokenizer.encode(opening + answer, Place.MORE), end]


def built(tokenizer: Tokenizer, style: PromptStyle, messages: Sequence[Message], last_only: bool) -> Sample:
    """The sample as generation would come to it: ask, append the answer, ask again."""
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = prompt_ids(tokenizer, style, messages[:index])
            assert prompt[: len(ids)] == ids, "what is asked begins with what was trained"
            answer = answer_ids(tokenizer, style, message["content"])
            trained = index + 1 == len(messages) or not last_only
            labels += [IGNORE_INDEX] * (len(prompt) - len(ids)) + (answer if trained else [IGNORE_INDEX] * len(answer))
            ids = prompt + answer
    return Sample(ids, labels)


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_chats_are_what_generation_feeds_token_for_token(turns: int, train_on: Any, tokenizer: Tokenizer) -> None:
    """Catches a mask off by one, a history with other ids than generation gives it, and a turn that carries no loss."""
    for style in styles(tokenizer):
        for seed in range(6):
            system = "Be brief." if style.name != "alpaca" and seed % 2 else ""
            messages = chat(turns, seed, system)
            [sample], encoded = encode(tokenizer, rows_of(messages), style, train_on=train_on)
            assert sample == built(tokenizer, style, messages, train_on == "last")
            assert not (encoded.cut or encoded.parts or encoded.dropped)
            [whole], _ = encode(tokenizer, rows_of(messages), style, train_on=train_on, mask_inputs=False)
            assert whole.input_ids == whole.labels == sample.input_ids


def test_many_rows_at_once_are_each_what_they_are_alone(tokenizer: Tokenizer) -> None:
    """Catches ids or labels of one row under another, and an order that is not that of the file."""
    rows = rows_of(*(chat(1 + seed % 4, seed) for seed in range(50)))
    together, encoded = encode(tokenizer, rows)
    assert encoded.conversations == rows
    for row, sample in zip(rows, together, strict=True):
        assert [sample] == encode(tokenizer, [row])[0]
    assert encode(tokenizer, [])[0] == []


@pytest.mark.parametrize("style", [Alpaca(), Vicuna()], ids=["alpaca", "vicuna"])
def test_no_control_token_comes_of_what_somebody_wrote(style: PromptStyle, tokenizer: Tokenizer) -> None:
    """Catches a row that ends the answer early or opens another turn: as many control tokens as of harmless words."""
    evil = " ".join([*tokenizer.control, "<|im_start|>user"])
    messages = [{"role": role, "content": evil} for role in ("user", "assistant") * 2]
    harmless = [{**message, "content": "x"} for message in messages]
    samples = encode(tokenizer, rows_of(messages, harmless), style)[0]
    controls = [[i for i in s.input_ids if i in tokenizer.control.values()] for s in samples]
    assert controls[0] == controls[1] and evil in tokenizer.decode(samples[0].input_ids)


# What is promised of every sample is checked on every sample


def test_a_tokenizer_that_makes_controls_of_words_is_found_out(tiny_folder: Path) -> None:
    """Catches an injection through a tokenizer that parses control tokens in any text."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    encode_batch = tokenizer.encode_batch

    def parsing(texts: Sequence[str], place: Place = Place.START) -> list[list[int]]:
        return [ids + [2] * ("<|im_end|>" in text) for ids, text in zip(encode_batch(texts, place), texts, strict=True)]

    tokenizer.encode_batch = parsing  # type: ignore[method-assign]
    good, evil = chat(1, 2), [*chat(1)[:1], {"role": "assistant", "content": "<|im_end|>"}]
    with pytest.raises(CheckpointError, match=r"a\.jsonl:line 3: this tokenizer makes a control token \(id 2\)"):
        encode(tokenizer, rows_of(*[[{**m, "content": "x"} for m in good]] * 2, evil), ChatML())


def test_what_a_tokenizer_cannot_spell_is_no_control_token(tmp_path: Path) -> None:
    """Catches refusing every row with a character outside an old vocabulary, whose <unk> is an added token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_path(tmp_path)
    [sample], _ = encode(tokenizer, rows_of([*chat(1)[:1], {"role": "assistant", "content": "ὦ"}]))
    assert 0 in sample.labels and sample.input_ids.count(1) == 1


class Unended(Alpaca):
    """Forgets the end of every answer but the last."""

    def render(self, messages: Sequence[Message], **options: Any) -> list[Segment]:
        segments = super().render(messages, **options)
        ends = [index for index, segment in enumerate(segments) if segment.template and segment.trained]
        return [segment for index, segment in enumerate(segments) if index not in ends[:-1]]


class Untrained(Alpaca):
    """Has the loss on the answer, but not on its end."""

    def render(self, messages: Sequence[Message], **options: Any) -> list[Segment]:
        return [
            replace(segment, trained=segment.trained and not segment.template)
            for segment in super().render(messages, **options)
        ]


class Unbegun(Alpaca):
    """Forgets the beginning."""

    def render(self, messages: Sequence[Message], **options: Any) -> list[Segment]:
        return super().render(messages, **options | {"bos": ""})


class Twice(Alpaca):
    """Begins twice."""

    def render(self, messages: Sequence[Message], **options: Any) -> list[Segment]:
        return [Segment(options["bos"], template=True), *super().render(messages, **options)]


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (Unended(), "line 2: the prompt style alpaca ends an answer in"),
        (Untrained(), "line 1: the prompt style alpaca ends an answer in"),
        (Unbegun(), "line 1: expected one <s> at the beginning, found none or two"),
        (Twice(), "line 1: expected one <s> at the beginning, found none or two"),
    ],
)
def test_a_style_that_breaks_a_promise_is_found_out(style: PromptStyle, message: str, llama_tokenizer: Path) -> None:
    """Catches a model that never stops after its first answer, or meets its beginning twice or never."""
    tokenizer = Tokenizer.from_path(llama_tokenizer)
    with pytest.raises(CheckpointError, match=message):
        encode(tokenizer, rows_of(chat(1), chat(3)), style)
    assert len(encode(tokenizer, rows_of(chat(1), chat(3)))[0]) == 2


def test_a_row_that_the_style_cannot_render_is_named_or_dropped(tokenizer: Tokenizer) -> None:
    """Catches one odd row among a million that stops everything without saying which one it is."""
    rows = rows_of(chat(1), chat(1, system="Be brief."), chat(2))
    with pytest.raises(UserError, match=r"a\.jsonl:line 2: the prompt style alpaca has no system message"):
        encode(tokenizer, rows)
    samples, encoded = encode(tokenizer, rows, on_error="skip")
    assert [sample.row for sample in samples] == [0, 2] == [row.row for row in encoded.conversations]
    assert [(entry.row, entry.reason) for entry in encoded.dropped] == [
        (1, "the prompt style alpaca has no system message")
    ]


def test_a_models_own_template_trains_as_the_built_in_style(tiny_folder: Path) -> None:
    """Catches --prompt_style chat_template that trains nothing, or other tokens than the same style built in."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    rows = rows_of(*(chat(1 + seed % 3, seed, "Be brief." * (seed % 2)) for seed in range(12)))
    options: list[dict[str, Any]] = [{}, {"train_on": "last"}, {"max_seq_length": 90, "overflow": "truncate_response"}]
    for option in options:
        found, wanted = (encode(tokenizer, rows, style, **option)[0] for style in (CHATML, named_style("chatml")))
        assert found == wanted and found


GENERATION = JinjaStyle(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_an_answer_marked_as_not_trained_is_in_the_prompt_without_loss(tokenizer: Tokenizer) -> None:
    """Catches a wrong answer that is learned, left out, or that takes the loss or the end of another one with it."""
    for style in [*styles(tokenizer), *([GENERATION] if "<|im_end|>" in tokenizer.control else [])]:
        for masked in ([0], [1], [0, 1], [0, 2]):
            messages = chat(4, 7)
            marked = [m | {"train": False} if i // 2 in masked and i % 2 else m for i, m in enumerate(messages)]
            ([plain], _), ([found], _) = (encode(tokenizer, rows_of(row), style) for row in (messages, marked))
            assert tokenizer.spaced or found.input_ids == plain.input_ids
            learned = [messages[2 * turn + 1]["content"] for turn in range(4) if turn not in masked]
            wanted = [i for answer in learned for i in answer_ids(tokenizer, style, answer)]
            assert [label for label in found.labels if label != IGNORE_INDEX] == wanted
            assert all(label in (IGNORE_INDEX, i) for label, i in zip(found.labels, found.input_ids, strict=True))
    with pytest.raises(UserError, match=r"line 1: an answer is marked not to be trained on, while --mask_inputs false"):
        encode(tokenizer, rows_of(marked), mask_inputs=False)


@pytest.mark.parametrize("name", ["tools", "tool_calls", "reasoning_content"])
def test_a_built_in_style_refuses_what_it_cannot_say(name: str, tokenizer: Tokenizer) -> None:
    """Catches tools, calls and thoughts that a style without words for them leaves out in silence."""
    [row] = rows_of(chat(1))
    call = {"type": "function", "function": {"name": "a", "arguments": {}}}
    value = "Let me see." if name == "reasoning_content" else [call]
    if name == "tools":
        row = replace(row, tools=(call,))
    else:
        row = replace(row, messages=(row.messages[0], {**row.messages[1], name: value}))
    with pytest.raises(UserError, match=rf"line 1: the prompt style alpaca cannot say {name}: use a model whose own"):
        encode(tokenizer, [row])
    assert [entry.row for entry in encode(tokenizer, [row], on_error="skip")[1].dropped] == [0]
