"""Log-likelihoods of references and choices, against transformers' loss on the same ids."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llama.errors import DataError, NumericalError
from lit_llama.generate.evaluate.likelihood import chat_texts, likelihoods, raw_texts
from lit_llama.generate.llm import LLM, load
from lit_llama.text.message import instruct
from lit_llama.text.pipeline.encoder import Encoder

EXAMPLES = [
    instruct("Say hi", "", "hello"),
    instruct("Extract", "two lamps", '{"item": "blue lamp"}'),
    instruct("naïve 北京 " * 12, "", "北京 😀"),
]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return load(tiny_folder, precision="32-true")


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def loss(model: Any, ids: list[int], labels: list[int]) -> float:
    """Mean over the labels, as transformers has it, which shifts them."""
    with torch.inference_mode():
        return float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)


def test_the_loss_of_references_is_that_of_training(llm: LLM, theirs: Any) -> None:
    """Labels that are shifted twice or not at all, a prompt that counts, or an end that is left out."""
    texts = [chat_texts(llm, example, [example.response])[0] for example in EXAMPLES]
    encoder = Encoder(llm.tokenizer, llm.require_style(), max_seq_length=256)
    for example, text, found in zip(EXAMPLES, texts, likelihoods(llm, texts), strict=True):
        batch = encoder.encode(encoder.render([example])).batch
        ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
        count = sum(label != -100 for label in labels)
        assert found.tokens == count and text.ends == 1
        assert -(found.text + found.ends) / count == pytest.approx(loss(theirs, ids, labels), rel=1e-4)
        inner = [label if label != llm.tokenizer.control["<|im_end|>"] else -100 for label in labels]
        assert -found.text / (count - 1) == pytest.approx(loss(theirs, ids, inner), rel=1e-4)
        assert found.bytes == len(example.response.encode())


def test_choices_behind_raw_text_are_scored_by_their_own_tokens(llm: LLM, theirs: Any) -> None:
    """A prompt that counts for its choices, or the mean of tokens in place of their sum."""
    prompt, choices = "The quantity of item is", [" two", " 2, as JSON", " é"]
    texts = raw_texts(llm, prompt, choices)
    before = llm.tokenizer.encode(prompt)
    for choice, text, found in zip(choices, texts, likelihoods(llm, texts), strict=True):
        assert list(text.ids[: text.start]) == before and text.ends == 0
        assert llm.tokenizer.decode(list(text.ids)) == prompt + choice
        labels = [-100] * text.start + list(text.ids[text.start :])
        assert found.text == pytest.approx(-loss(theirs, list(text.ids), labels) * found.tokens, rel=1e-4)
        assert found.ends == 0.0 and found.tokens == len(text.ids) - text.start
        with torch.inference_mode():
            best = theirs(torch.tensor([text.ids])).logits[0].argmax(-1).tolist()
        assert found.greedy == (best[text.start - 1 : -1] == list(text.ids[text.start :]))


def test_scores_do_not_depend_on_what_is_scored_beside(llm: LLM) -> None:
    texts = [text for example in EXAMPLES for text in chat_texts(llm, example, [example.response, "other", "x"])]
    together = likelihoods(llm, texts)
    assert together == [likelihoods(llm, [text])[0] for text in texts]
    assert llm.engine.statistics().reused > 0, "the prompt of several answers is computed once"


def test_a_model_of_nan_is_named(tiny_folder: Path) -> None:
    """A perplexity of nan in the table."""
    bad = load(tiny_folder, precision="32-true", packed=False)
    assert bad.model is not None
    bad.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"not finite.*damaged"):
        likelihoods(bad, chat_texts(bad, EXAMPLES[0], ["hello"]))


def test_what_cannot_be_scored_is_named(llm: LLM) -> None:
    with pytest.raises(DataError, match=r"row 7.*tokens"):
        chat_texts(llm, instruct("a", row=7), ["word " * 300])
    with pytest.raises(DataError, match="the prompt is empty, and the model has no token that begins a text"):
        raw_texts(llm, "", ["a"])
