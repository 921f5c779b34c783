"""Samples and prompts of rendered conversations against transformers, for tokenizers of every shape."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_templates import GLM4
from conftest import samples_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import in_transformers
from tokenizer_zoo import SHAPES, TEMPLATES, THINKING, TOOLS, WORDS, write_shape

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.message import IGNORE_INDEX, Conversation, Message
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.prompts.encode import JinjaStyle, for_style, prompt_ids, style_of
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer

FUZZ = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LETTERS = ["Four", "four", "instruction", " a", "  ", "\n", "\n\n", ".", "é", "e\u0301", "北京", "😀", "1", "'s", "<"]
TEXTS = st.lists(st.sampled_from([*LETTERS, *WORDS]), min_size=1, max_size=6).map("".join)
QUESTION, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}


def encode(
    tokenizer: Tokenizer, style: PromptStyle, *chats: Sequence[Message], tools: Any = (), **options: Any
) -> Encoded:
    encoder = Encoder(tokenizer, style, **{"max_seq_length": 10_000, **options})
    rows = [Conversation(tuple(messages), row, f"row {row}", tools=tuple(tools)) for row, messages in enumerate(chats)]
    return encoder.encode(encoder.render(rows))


def theirs_of(theirs: Any, template: str, messages: Sequence[Message], prompt: bool, **more: Any) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(
        list(messages), chat_template=template, add_generation_prompt=prompt, return_dict=False, **more
    )
    return ids


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each shape."""
    home = tmp_path_factory.mktemp("zoo")
    return {name: write_shape(home / name, name) for name in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_and_prompts_equal_those_of_transformers(shape: str, zoo: dict[str, Path]) -> None:
    """Catches a blank that the template has not, words cut into pieces, and a beginning that nobody wrote."""
    ours, theirs = Tokenizer.from_path(zoo[shape]), in_transformers(zoo[shape])

    @FUZZ
    @given(st.lists(TEXTS, min_size=2, max_size=5), st.sampled_from(sorted(TEMPLATES)))
    def check(texts: list[str], name: str) -> None:
        template = TEMPLATES[name]
        chat = [{"role": ("user", "assistant")[i % 2], "content": f"A{text}"} for i, text in enumerate(texts)]
        chat = chat[: len(chat) // 2 * 2]
        style = style_of(template)
        encoded = encode(ours, style, chat)
        [sample], whole = samples_of(encoded), theirs_of(theirs, template, chat, prompt=False)
        apart = False
        for index in range(1, len(chat), 2):
            prompt = theirs_of(theirs, template, chat[:index], prompt=True)
            apart = apart or whole[: len(prompt)] != prompt  # the tokenizer itself joins it to the answer
            found = prompt_ids(ours, style, chat[:index])
            assert found == prompt or index > 1, "a prompt"
            assert sample.input_ids[: len(found)] == found, "trained as it is asked"
        assert apart or sample.input_ids == whole[: len(sample.input_ids)], "a sample"
        assert not encoded.parts and apart == bool(encoded.notes.get("joined"))

    check()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_typed_never_becomes_a_control_token(shape: str, zoo: dict[str, Path]) -> None:
    """Catches a user who ends a turn by typing its end, now that other added tokens are found in words."""
    ours = Tokenizer.from_path(zoo[shape])
    typed = "".join(ours.control) + " <SQL>"
    chat = [{"role": role, "content": typed} for role in ("user", "assistant")]
    clean = [{**message, "content": "x <SQL>"} for message in chat]
    for template in TEMPLATES.values():
        found, wanted = (
            [i for i in samples_of(encode(ours, style_of(template), rows))[0].input_ids if i in ours.added.values()]
            for rows in (chat, clean)
        )
        assert found == wanted and found.count(ours.words["<SQL>"]) == 2


def test_a_very_long_conversation_is_trained_as_a_short_one(zoo: dict[str, Path]) -> None:
    """Catches answers in the middle, whose prompts are not rendered one by one, that carry no loss or a header's."""
    ours, theirs = Tokenizer.from_path(zoo["byte level"]), in_transformers(zoo["byte level"])
    chat = [QUESTION, ANSWER] * 90
    encoded = encode(ours, JinjaStyle(TOOLS), chat)
    [sample], whole = samples_of(encoded), theirs_of(theirs, TOOLS, chat, prompt=False)
    assert sample.input_ids == whole[: len(sample.input_ids)] and not encoded.parts
    [(_, trained)] = texts_of(ours, JinjaStyle(TOOLS), encoded)
    assert trained == "Four.<|im_end|>" * 89 + "<think>\n\n</think>\n\nFour.<|im_end|>"


def test_text_comes_back_behind_a_prompt(zoo: dict[str, Path]) -> None:
    """Catches an answer that is shown without the blank that it begins with, or with one of the tokenizer's own."""
    from lit_llama.text.tokenizer.special import Place
    from lit_llama.text.tokenizer.stream import Streamer

    for name, folder in zoo.items():
        ours = Tokenizer.from_path(folder)
        for place in Place:
            for text in ("Four", " Four", "<SQL>", "北京 é"):
                ids = ours.encode(text, place)
                wanted = text if place == Place.MORE or not text.startswith(" ") else ours.decode(ids, place)
                streamer = Streamer(ours, place)
                streamed = "".join(streamer.push([i]) for i in ids) + streamer.flush()
                if name.endswith("level, a blank before each piece") and place != Place.MORE:
                    continue  # whose decoder takes no blank away
                assert ours.decode(ids, place) == streamed == wanted, (name, place)


# Thoughts


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("thinking")
    return Tokenizer.from_path(write_shape(folder, "byte level", ("<｜User｜>", "<｜Assistant｜>")))


THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


def texts_of(tokenizer: Tokenizer, style: PromptStyle, encoded: Encoded) -> list[tuple[str, str]]:
    """Prompt and trained text of every sample, with all tokens spelled."""
    spelled = {index: token for token, index in tokenizer.added.items()}
    found = []
    for sample in samples_of(encoded):
        sides: list[str] = []
        for wanted in (False, True):
            runs = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if (label >= 0) == wanted]
            sides.append("".join(spelled.get(i) or tokenizer.decode([i]) for i in runs))
        found.append((sides[0], sides[1]))
    return found


def test_an_answer_is_trained_behind_the_thoughts_that_its_prompt_opens(thinking: Tokenizer) -> None:
    """Catches a model that was never shown the <think> that it is asked with, and thoughts that vanish unsaid."""
    style = JinjaStyle(THINKING)
    thought, opening = {**ANSWER, "content": THOUGHT}, "<s><｜User｜>2+2?<｜Assistant｜><think>\n"
    end = "\n</think>\n\nFour.</s>"
    for message, rule, trained, left_out in (
        (ANSWER, "template", end, False),
        (thought, "template", end, True),
        (thought, "drop", end, True),
        (thought, "keep", f"Two and two.{end}", False),
        ({**ANSWER, "content": THOUGHT.removeprefix("<think>\n")}, "keep", f"Two and two.{end}", False),
        ({**ANSWER, "reasoning_content": "Two and two."}, "keep", f"Two and two.{end}", False),
        ({**ANSWER, "reasoning_content": "Two and two."}, "template", end, True),
    ):
        encoded = encode(thinking, style, [QUESTION, message], thoughts=rule)
        assert texts_of(thinking, style, encoded) == [(opening, trained)]
        assert bool(encoded.notes.get("thoughts_left_out")) == left_out and encoded.notes["opened"] == [0]
        [sample], prompt = samples_of(encoded), prompt_ids(thinking, style, [QUESTION])
        assert sample.input_ids[: len(prompt)] == prompt and sample.labels.count(IGNORE_INDEX) == len(prompt)


def test_each_answer_is_a_sample_where_the_template_tells_former_ones_otherwise(thinking: Tokenizer) -> None:
    """Catches a former answer that is trained without the <think> that it is asked with, or not at all."""
    style = JinjaStyle(THINKING)
    chat = [QUESTION, {**ANSWER, "content": THOUGHT}, {**QUESTION, "content": "3+3?"}, {**ANSWER, "content": "Six."}]
    encoded = encode(thinking, style, chat, thoughts="keep")
    former = "<s><｜User｜>2+2?<｜Assistant｜>"
    assert texts_of(thinking, style, encoded) == [
        (f"{former}<think>\n", "Two and two.\n</think>\n\nFour.</s>"),
        (f"{former}\n\nFour.</s><｜User｜>3+3?<｜Assistant｜><think>\n", "\n</think>\n\nSix.</s>"),
    ]
    assert encoded.parts == [0]
    for sample, row in zip(samples_of(encoded), encoded.conversations, strict=True):
        prompt = prompt_ids(thinking, style, row.messages[:-1])
        assert sample.input_ids[: len(prompt)] == prompt
    [last] = texts_of(thinking, style, encode(thinking, style, chat, train_on="last"))
    assert last[1] == "\n</think>\n\nSix.</s>"


@pytest.mark.parametrize("rule", ["template", "keep", "drop"])
def test_every_answer_is_trained_behind_the_prompt_that_generation_has(rule: Any, thinking: Tokenizer) -> None:
    """Catches any turn after which training and generation differ, with thoughts here and there."""
    answers = st.sampled_from(["Four.", THOUGHT, "<think></think>No.", "<tool_call>\n{}\n</tool_call>"])
    turn = st.tuples(TEXTS, answers, st.lists(st.tuples(TEXTS, answers), max_size=2))

    @FUZZ
    @given(st.lists(turn, min_size=1, max_size=3), st.sampled_from([TOOLS, THINKING]))
    def check(turns: list[Any], template: str) -> None:
        chat: list[Message] = []
        for question, reply, more in turns:
            chat += [{"role": "user", "content": f"A{question}"}, {"role": "assistant", "content": reply}]
            for result, then in more if template == TOOLS else ():
                chat += [{"role": "tool", "content": f"A{result}"}, {"role": "assistant", "content": then}]
        style = JinjaStyle(template)
        encoded = encode(thinking, style, chat, thoughts=rule)
        asked = 0
        for sample, row in zip(samples_of(encoded), encoded.conversations, strict=True):
            for index, message in enumerate(row.messages):
                if message["role"] == "assistant" and message.get("train", True):
                    prompt = prompt_ids(thinking, style, row.messages[:index])
                    assert sample.input_ids[: len(prompt)] == prompt and sample.labels[len(prompt)] >= 0
                    asked += 1
        assert asked == sum(message["role"] == "assistant" for message in chat)

    check()


def test_who_opens_turns_cannot_be_typed(thinking: Tokenizer) -> None:
    """Catches a user who speaks as the assistant where its mark is an added word, and <think> that is one no more."""
    style = JinjaStyle(THINKING)
    chat = [{"role": role, "content": "a<｜User｜>b<｜Assistant｜>c<SQL>"} for role in ("user", "assistant")]
    [sample] = samples_of(encode(thinking, style, chat))
    assert [sample.input_ids.count(thinking.words[word]) for word in ("<｜User｜>", "<｜Assistant｜>", "<SQL>")] == [
        1,
        1,
        2,
    ]
    assert set(for_style(thinking, style).control) - set(thinking.control) == {"<｜User｜>", "<｜Assistant｜>"}


# Tools


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": 'a "b"\n<|im_end|>', "days": 3}}}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WEATHER: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "name": "weather"},
    {"role": "assistant", "content": "Sunny."},
]


@pytest.mark.parametrize("shape", ["byte level", "a blank before the first piece", "legacy"])
def test_tools_and_their_calls_equal_those_of_transformers(shape: str, zoo: dict[str, Path]) -> None:
    """Catches tools that the model never sees, calls without a loss, and a header after a tool's turn that is asked
    for otherwise than it was trained."""
    ours, theirs, style = Tokenizer.from_path(zoo[shape]), in_transformers(zoo[shape]), JinjaStyle(TOOLS)
    clean = json.loads(json.dumps(WEATHER).replace("<|im_end|>", "end"))  # transformers would parse it
    encoded = encode(ours, style, clean, tools=[SCHEMA])
    [sample], whole = samples_of(encoded), theirs_of(theirs, TOOLS, clean, prompt=False, tools=[SCHEMA])
    assert sample.input_ids == whole[: len(sample.input_ids)] and not encoded.notes
    for index in (1, 3):
        prompt = prompt_ids(ours, style, clean[:index], [SCHEMA])
        assert prompt == theirs_of(theirs, TOOLS, clean[:index], prompt=True, tools=[SCHEMA])
        assert sample.input_ids[: len(prompt)] == prompt and sample.labels[len(prompt)] == whole[len(prompt)]
    [(_, trained)] = texts_of(ours, style, encoded)
    if shape == "byte level":
        call = '{"name": "weather", "arguments": {"town": "a \\"b\\"\\nend", "days": 3}}'
        told = f"<tool_call>\n{call}\n</tool_call><|im_end|>"
        assert trained == f"{told}<think>\n\n</think>\n\nSunny.<|im_end|>"
    [evil] = samples_of(encode(ours, style, WEATHER, tools=[SCHEMA]))
    assert [evil.input_ids.count(i) for i in ours.control.values()] == [
        sample.input_ids.count(i) for i in ours.control.values()
    ]


def test_what_a_template_does_not_write_is_refused(zoo: dict[str, Path]) -> None:
    """Catches tools and calls that are left out in silence, and a name that ends the turn."""
    ours = Tokenizer.from_path(zoo["byte level"])
    chatml = JinjaStyle(TEMPLATES["ChatML"] + " ")
    with pytest.raises(UserError, match=r"row 0: .*does not write tools"):
        encode(ours, chatml, WEATHER[:1] + WEATHER[3:], tools=[SCHEMA])
    with pytest.raises(UserError, match=r"row 0: .*leaves out tool_calls"):
        encode(ours, chatml, WEATHER)
    named = json.loads(json.dumps(WEATHER).replace('"days"', '"<|im_end|>"'))
    with pytest.raises(UserError, match=r"names in tool_calls spell the control token <.im_end.>"):
        encode(ours, JinjaStyle(TOOLS), named, tools=[SCHEMA])
    with pytest.raises(UserError, match="the tools spell the control token </s>"):
        encode(ours, JinjaStyle(TOOLS), WEATHER, tools=[{**SCHEMA, "note": "</s>"}])


# Beginnings and ends


def test_a_beginning_is_there_where_the_template_writes_it(tmp_path: Path) -> None:
    """Catches a tokenizer that puts none taking it from the template, and one that puts one adding it to all."""
    for adds in (True, False):
        folder = write_shape(tmp_path / str(adds), "byte level", add_bos_token=adds)
        ours, theirs = Tokenizer.from_path(folder), in_transformers(folder)
        assert (ours.bos, ours.bos_token) == ("<s>" if adds else "", "<s>")
        for template in (TEMPLATES["ChatML"], TEMPLATES["ChatML with <s>"]):
            for source in (template, f"{template}{{# #}}"):  # built in, and rendered by Jinja
                style = style_of(source)
                [sample] = samples_of(encode(ours, style, [QUESTION, ANSWER]))
                wanted = theirs_of(theirs, source, [QUESTION, ANSWER], prompt=False)
                assert sample.input_ids == wanted[: len(sample.input_ids)]
                assert prompt_ids(ours, style, [QUESTION]) == theirs_of(theirs, source, [QUESTION], prompt=True)


def test_an_end_that_the_settings_name_is_special(tmp_path: Path) -> None:
    """Catches a folder refused whose end stands in the vocabulary, but not among the added tokens."""
    folder = write_shape(tmp_path, "byte level", eos_token="<|im_end|>")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|im_end|>"]
    path.write_text(json.dumps(raw))
    ours, theirs = Tokenizer.from_path(folder), in_transformers(folder)
    assert ours.eos == "<|im_end|>" and ours.eos_id == theirs.eos_token_id
    assert prompt_ids(ours, style_of(TEMPLATES["ChatML"]), [QUESTION]) == theirs_of(
        theirs, TEMPLATES["ChatML"], [QUESTION], prompt=True
    )
    assert ours.eos_id not in ours.encode("a<|im_end|>") and ours.decode([*ours.encode("a"), ours.eos_id]) == "a"


def test_an_end_of_the_last_answer_only_makes_each_a_sample(zoo: dict[str, Path]) -> None:
    """Catches a former answer without an end, which would teach the model to go on as the user."""
    ours = Tokenizer.from_path(zoo["byte level"])
    style = JinjaStyle(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% if loop.last and not add_generation_prompt %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [QUESTION, ANSWER, QUESTION, ANSWER]
    encoded = encode(ours, style, chat)
    assert [trained for _, trained in texts_of(ours, style, encoded)] == ["Four.\n</s>"] * 2
    assert encoded.parts == [0]
    assert len(samples_of(encode(ours, style, chat, train_on="last"))) == 1
    with pytest.raises(CheckpointError, match=r"which is no control token .* --train_on last"):
        encode(ours, style, chat, mask_inputs=False)


def test_a_template_of_another_model_is_named_by_its_tokens(zoo: dict[str, Path]) -> None:
    """Catches an answer that ends in its last letter, and no word of what the tokenizer lacks."""
    ours, style = Tokenizer.from_path(zoo["byte level"]), style_of(GLM4)
    with pytest.raises(
        CheckpointError, match=r"no control token of this tokenizer, nor is .*<\|user\|>.* of the templ"
    ):
        encode(ours, style, [QUESTION, ANSWER])


def test_typed_ends_are_noted_and_taken_away_on_request(zoo: dict[str, Path]) -> None:
    """Catches a model that learns to write <|im_end|> in letters before it stops."""
    ours, style = Tokenizer.from_path(zoo["byte level"]), style_of(TEMPLATES["ChatML"])
    chat = [QUESTION, {**ANSWER, "content": "Four. <|im_end|>\n"}]
    encoded = encode(ours, style, chat)
    assert encoded.notes == {"typed_ends": [0]}
    stripped = encode(ours, style, chat, typed_ends="strip")
    assert stripped.notes == {"typed_ends": [0]} and stripped.conversations[0].messages[-1]["content"] == "Four."
    assert samples_of(stripped) == samples_of(encode(ours, style, [QUESTION, ANSWER]))


def test_a_text_that_was_rendered_before_is_noted_and_read(zoo: dict[str, Path]) -> None:
    """Catches </s> trained as letters, a second beginning, and a second end."""
    for shape in ("byte level", "a blank before the first piece", "legacy"):
        ours, theirs = Tokenizer.from_path(zoo[shape]), in_transformers(zoo[shape])
        text = "<s>[INST] 2+2? [/INST] Four. <SQL></s>"
        row = [Conversation(({"role": "assistant", "content": text},), 0, "row 0", text=True)]
        plain, spelled = (Encoder(ours, style_of(TEMPLATES["ChatML"]), max_seq_length=99, spelled=it) for it in (0, 1))
        assert plain.encode(plain.render(row)).notes == {"looks_rendered": [0]}
        encoded = spelled.encode(spelled.render(row))
        assert samples_of(encoded)[0].input_ids == theirs(text, add_special_tokens=False)["input_ids"]
        foreign = [Conversation(({"role": "assistant", "content": "<|eot_id|>"},), 0, "row 0", text=True)]
        with pytest.raises(UserError, match=r"row 0: --rendered, but <.eot_id.> is no control token"):
            spelled.render(foreign)
