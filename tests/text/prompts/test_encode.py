"""Ids and labels: the prompt of training is the prompt of generation, one end is learned, nobody types a control."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Sample, encode_examples

from lit_llama.errors import CheckpointError, DataError, UserError
from lit_llama.text.message import IGNORE_INDEX, Conversation, Dropped, instruct
from lit_llama.text.pipeline.encoder import Encoded
from lit_llama.text.prompts.encode import JinjaStyle, answer_opening, end_id, named_style, prompt_ids
from lit_llama.text.prompts.styles import Alpaca, ChatML, PromptStyle, Segment, Vicuna
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place

RESPONSES = [
    "Hello.",
    " starts with a blank",
    "\nstarts with a line",
    "\n\n  both",
    "你好，世界。",
    "😀",
    "é",
    ")",
    "1 2 3",
    "ends in a blank ",
    "ends in a line\n",
]
CONTROLS = "</s> <s> <unk> <|im_end|> <|im_start|> <|endoftext|>"


@pytest.fixture(scope="session", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Both kinds: one that wants no beginning and ends in <|im_end|>, one with <s> and </s>."""
    name = {"byte-level": "tiny_folder", "sentencepiece": "llama_tokenizer"}[request.param]
    return Tokenizer.from_path(request.getfixturevalue(name))


@pytest.fixture(scope="session")
def with_bos(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """The tiny tokenizer with a beginning of one's choice."""

    def make(bos: str, eos: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("bos")
        (folder / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
        settings = {"bos_token": bos, "eos_token": eos, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer.from_path(folder)

    return make


def encode(
    tokenizer: Tokenizer, *examples: Conversation, style: PromptStyle | None = None, **options: Any
) -> tuple[list[Sample], Encoded]:
    """Alpaca, no limit, prompts masked, unless said otherwise."""
    return encode_examples(examples, style or named_style("alpaca"), tokenizer, **options)


def prompt_of(tokenizer: Tokenizer, example: Conversation, style: PromptStyle) -> list[int]:
    """What generation feeds for the same instruction."""
    return prompt_ids(tokenizer, style, example.prompt)


def styles(tokenizer: Tokenizer) -> list[PromptStyle]:
    """Those whose control tokens the tokenizer has."""
    return [Alpaca(), Vicuna(), ChatML()] if "<|im_end|>" in tokenizer.control else [Alpaca(), Vicuna()]


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("given", ["", "an input", "输入\n"])
def test_the_mask_ends_where_generation_begins(response: str, given: str, tokenizer: Tokenizer) -> None:
    """Catches lit-llama's off-by-one: a joint encoding whose prompt is not the one that generation feeds."""
    example = instruct("Do it.", given, response, 7)
    for style in styles(tokenizer):
        prompt = prompt_of(tokenizer, example, style)
        end = tokenizer.control["<|im_end|>"] if style.name == "chatml" else tokenizer.eos_id
        opening = " " if style.name == "vicuna" else ""
        assert answer_opening(tokenizer, style) == opening
        answer = [*tokenizer.encode(opening + response, Place.MORE), end]
        [masked], _ = encode(tokenizer, example, style=style)
        [whole], _ = encode(tokenizer, example, style=style, mask_inputs=False)
        assert masked == Sample(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, 7)
        assert whole == Sample(prompt + answer, prompt + answer, 7)
        assert tokenizer.decode(masked.input_ids[len(prompt) : -1], Place.MORE) == opening + response


def test_one_beginning_and_one_end(tokenizer: Tokenizer) -> None:
    """Catches two beginnings, an end in the prompt, and an end that is not learned."""
    [sample], _ = encode(tokenizer, instruct("Do it.", "", "Done."), mask_inputs=False)
    assert sample.input_ids.count(tokenizer.eos_id) == 1 == sample.labels.count(tokenizer.eos_id)
    assert sample.input_ids[-1] == sample.labels[-1] == tokenizer.eos_id
    begins = [index for index, token_id in enumerate(sample.input_ids) if token_id in (0, 1)]
    assert begins == ([0] if tokenizer.bos else [])
    assert (
        sample.input_ids
        == prompt_of(tokenizer, instruct("Do it."), named_style("alpaca"))
        + sample.input_ids[-len(tokenizer.encode("Done.")) - 1 :]
    )


def test_a_beginning_that_is_also_the_end(with_bos: Callable[..., Tokenizer]) -> None:
    """Catches a check that counts beginnings and refuses tokenizers with one token for both (GPT-2, OPT)."""
    tokenizer = with_bos("<|endoftext|>", "<|endoftext|>")
    [sample], _ = encode(tokenizer, instruct("Do it.", "", "Done."))
    assert [index for index, token_id in enumerate(sample.input_ids) if token_id == 0] == [0, len(sample.input_ids) - 1]


def test_two_beginnings_are_refused(with_bos: Callable[..., Tokenizer]) -> None:
    """Catches a style and a tokenizer that both begin the text with <|im_start|>."""
    tokenizer = with_bos("<|im_start|>", "<|im_end|>")
    with pytest.raises(CheckpointError, match=r"row 3: expected one <.im_start.> at the beginning"):
        encode(tokenizer, instruct("Do it.", "", "Done.", 3), style=ChatML())
    assert len(encode(tokenizer, instruct("Do it.", "", "Done."))[0]) == 1


def test_typed_control_tokens_stay_text(tokenizer: Tokenizer) -> None:
    """Catches a raw row that ends the answer early or opens another turn."""
    example = instruct(f"Say {CONTROLS}", CONTROLS, CONTROLS)
    for style in styles(tokenizer):
        plain = instruct("Say it", "to me", "it")
        [typed], [clean] = encode(tokenizer, example, style=style)[0], encode(tokenizer, plain, style=style)[0]
        controls = [[i for i in sample.input_ids if i in tokenizer.control.values()] for sample in (typed, clean)]
        assert controls[0] == controls[1]
        assert tokenizer.decode(typed.input_ids).count(CONTROLS) == 3


def test_rows_keep_their_order_and_number(tokenizer: Tokenizer) -> None:
    """Catches the ids of one row under the number of another."""
    examples = [instruct(f"Count to {n}.", "", " ".join(map(str, range(n))), 10 * n) for n in range(1, 30)]
    samples, encoded = encode(tokenizer, *examples)
    assert not encoded.dropped and [sample.row for sample in samples] == [example.row for example in examples]
    for example, sample in zip(examples, samples, strict=True):
        assert encode(tokenizer, example)[0] == [sample]
        assert tokenizer.decode([i for i in sample.labels if i != IGNORE_INDEX]) == example.response


@pytest.fixture
def row(tokenizer: Tokenizer) -> tuple[Conversation, int, int]:
    """A row, its tokens, and those of its prompt."""
    example = instruct("Count.", "", "one two three four five six seven", 5)
    [sample], _ = encode(tokenizer, example)
    return example, len(sample.input_ids), sample.labels.count(IGNORE_INDEX)


def test_a_row_of_exactly_the_limit_is_kept_and_one_more_is_dropped(
    row: tuple[Conversation, int, int], tokenizer: Tokenizer
) -> None:
    """Catches an off-by-one at the limit, and a long row that is cut or lost without its name."""
    example, size, _ = row
    for overflow in ("drop", "truncate_response", "error"):
        [kept], encoded = encode(tokenizer, example, max_seq_length=size, overflow=overflow)
        assert len(kept.input_ids) == size and not encoded.cut and not encoded.dropped
    none, encoded = encode(tokenizer, example, max_seq_length=size - 1)
    assert not none and encoded.dropped == [Dropped(5, "row 5", f"longer than {size - 1} tokens", tokens=size)]
    with pytest.raises(DataError, match=rf"row 5 has {size} tokens, more than --max_seq_length {size - 1}"):
        encode(tokenizer, example, max_seq_length=size - 1, overflow="error")


@pytest.mark.parametrize("mask_inputs", [True, False])
def test_a_cut_answer_keeps_its_end(
    mask_inputs: bool, row: tuple[Conversation, int, int], tokenizer: Tokenizer
) -> None:
    """Catches lit-llama's cut, which loses the end and, for a long prompt, every label."""
    example, size, prompt = row
    [whole], _ = encode(tokenizer, example, mask_inputs=mask_inputs)
    for limit in range(prompt + 2, size):
        options: dict[str, Any] = {"max_seq_length": limit, "mask_inputs": mask_inputs, "overflow": "truncate_response"}
        [cut], encoded = encode(tokenizer, example, **options)
        assert encoded.cut == [5] and not encoded.dropped and len(cut.input_ids) == len(cut.labels) == limit
        assert cut.input_ids == [*whole.input_ids[: limit - 1], tokenizer.eos_id]
        assert cut.labels == [*whole.labels[: limit - 1], tokenizer.eos_id]


def test_a_prompt_that_fills_the_limit_is_dropped_by_name(
    row: tuple[Conversation, int, int], tokenizer: Tokenizer
) -> None:
    """Catches a sample that teaches nothing but to stop at once, or whose loss is the mean of nothing."""
    example, size, prompt = row
    for limit in (prompt + 1, prompt, prompt - 1, 3):
        samples, encoded = encode(tokenizer, example, max_seq_length=limit, overflow="truncate_response")
        assert not samples and encoded.dropped == [
            Dropped(5, "row 5", f"prompt alone fills {limit} tokens", tokens=size)
        ]


def test_the_end_of_a_style_has_to_be_in_the_tokenizer(llama_tokenizer: Path) -> None:
    """Catches <|im_end|> spelled out in letters: the model could never stop."""

    class Foreign(Alpaca):
        def render(self, messages: Any, **options: Any) -> list[Segment]:
            return super().render(messages, **options | {"eos": "<|end|>"})

    tokenizer = Tokenizer.from_path(llama_tokenizer)
    with pytest.raises(CheckpointError, match=r"row 4: the prompt style .* ends an answer in '.*>', which is no"):
        encode(tokenizer, instruct("Do it.", "", "Done.", 4), style=Foreign())
    for style in (ChatML(), named_style("ziya")):
        missing = ", ".join(style.tokens)
        with pytest.raises(CheckpointError, match=rf"{style.name} needs the tokens {re.escape(missing)}, which") as e:
            encode(tokenizer, instruct("Do it.", "", "Done.", 4), style=style)
        assert "--prompt_style" in str(e.value)
        with pytest.raises(CheckpointError, match="needs the tokens"):
            prompt_of(tokenizer, instruct("Do it."), style)


def test_a_style_that_does_not_end_its_answers_cannot_be_trained(tiny_folder: Path) -> None:
    """Catches a model that never stops, or a silent training on no token at all, for a foreign chat template."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    foreign = JinjaStyle("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(CheckpointError, match=r"row 0: the prompt style .* ends an answer in 'Done\.', which"):
        encode(tokenizer, instruct("Do it.", "", "Done."), style=foreign)
    assert end_id(tokenizer, foreign) is None

    class Silent(Alpaca):
        def render(self, messages: Any, **options: Any) -> list[Segment]:
            return [Segment(segment.text, template=segment.template) for segment in super().render(messages, **options)]

    with pytest.raises(UserError, match="does not say where an answer is"):
        encode(tokenizer, instruct("Do it.", "", "Done."), style=Silent())


def test_a_conversation_goes_on_as_it_was_trained(tokenizer: Tokenizer) -> None:
    """Catches a second turn whose history has other ids than the first turn's answer had."""
    for style in styles(tokenizer):
        for response in RESPONSES:
            [first], _ = encode(tokenizer, instruct("Do it.", "", response), style=style)
            turns = [("user", "Do it."), ("assistant", response), ("user", "Again.")]
            messages = [{"role": role, "content": text} for role, text in turns]
            assert prompt_ids(tokenizer, style, messages)[: len(first.input_ids)] == first.input_ids
