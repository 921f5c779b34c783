"""The model of lm-evaluation-harness, against the one that the harness has of transformers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lit_llama[harness]'")


@pytest.fixture(scope="module")
def models(tiny_folder: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from lit_llama.generate.evaluate.harness import LitLLaMA

    ours = LitLLaMA(pretrained=str(tiny_folder), precision="32-true", device="cpu")
    return ours, HFLM(pretrained=str(tiny_folder), dtype="float32", device="cpu")


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, number) for number, each in enumerate(arguments)]


def test_scores_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    """A boundary between context and continuation elsewhere, or windows that overlap."""
    asked = instances(("Extract the order", " as JSON"), ("a b ", "c"), ("", "hello"), ("é" * 400, " 北京"))
    ours, theirs = (model.loglikelihood(asked) for model in models)
    for (one, greedy), (other, their_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3) and greedy == their_greedy
    whole = instances(("Write a response that completes the request.",))
    ours, theirs = (model.loglikelihood_rolling(whole) for model in models)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_answers_and_chats_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    asked = instances(("Extract the order", {"until": ["e"], "max_gen_toks": 9, "do_sample": False}))
    ours, theirs = (model.generate_until(asked) for model in models)
    assert ours == theirs
    chat = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "h"}]
    ours, theirs = (model.apply_chat_template(chat[:1]) for model in models)
    assert ours == theirs and models[0].tok_encode(ours) == models[1].tok_encode(theirs)
    assert models[0].apply_chat_template(chat, add_generation_prompt=False) == ours + "h"


def test_what_is_not_done_is_refused() -> None:
    from lit_llama.errors import UserError
    from lit_llama.generate.evaluate.harness import sampling_of

    assert sampling_of({"until": "x", "do_sample": False, "temperature": 0.7}).temperature == 0
    with pytest.raises(UserError, match="asks for best_of"):
        sampling_of({"best_of": 3})
