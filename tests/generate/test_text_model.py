"""Texts in, texts out: an LLM as a notebook uses it, against the ids of the engine."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML

import lit_llama
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.llm import LLM
from lit_llama.text.prompts.encode import prompt_ids

HI = [{"role": "user", "content": "Say hi"}]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with lit_llama.load(tiny_folder) as llm:
        yield llm


def by_ids(llm: LLM, folder: Path, messages: list[dict[str, str]], **sampling: Any) -> str:
    """The answer by way of ids: Jinja's rendering, and the library of tokenizers on both sides of the engine."""
    import jinja2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = jinja2.Template(CHATML, keep_trailing_newline=True).render(messages=messages, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    steps = llm.engine.stream(llm.request(ids, lit_llama.Sampling(**sampling)))
    return str(tokenizer.decode([token for step in steps for token in step.ids], skip_special_tokens=True))


def test_all_ways_of_asking_give_the_answer_of_the_engine(llm: LLM, tiny_folder: Path) -> None:
    """A prompt that is rendered twice or not at all, an answer of another prompt of the list, pieces that are lost."""
    wanted = by_ids(llm, tiny_folder, HI, max_new_tokens=12)
    assert wanted and llm.generate("Say hi", max_new_tokens=12) == wanted
    assert llm.chat(HI, max_new_tokens=12) == llm.chat("Say hi", max_new_tokens=12) == wanted
    other = by_ids(llm, tiny_folder, [{"role": "user", "content": "Say ho, twice"}], max_new_tokens=12)
    assert llm.generate(["Say ho, twice", "Say hi"], max_new_tokens=12) == [other, wanted]
    stream = llm.stream("Say hi", max_new_tokens=12)
    assert stream.finish_reason is None and "".join(stream) == stream.text == wanted
    assert stream.finish_reason in ("stop", "length") and stream.tokens <= 12
    assert "".join(llm.stream(HI, lit_llama.Sampling(max_new_tokens=12))) == wanted
    turns = [*HI, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "Again"}]
    assert llm.chat(turns, max_new_tokens=6) == by_ids(llm, tiny_folder, turns, max_new_tokens=6)
    headed = [{"role": "system", "content": "Be brief"}, *HI]
    assert llm.generate("Say hi", system="Be brief", max_new_tokens=6) == by_ids(
        llm, tiny_folder, headed, max_new_tokens=6
    )


def test_a_raw_text_is_continued_as_it_stands(llm: LLM) -> None:
    """A style around a text that is to be continued."""
    ids = llm.tokenizer.encode("Once upon")
    bos = [llm.tokenizer.control[llm.tokenizer.bos]] if llm.tokenizer.bos else []
    wanted = "".join(text for _, text in llm.stream(bos + ids, lit_llama.Sampling(max_new_tokens=9)))
    assert llm.generate("Once upon", raw=True, max_new_tokens=9) == wanted
    assert "".join(llm.stream("Once upon", raw=True, max_new_tokens=9)) == wanted
    with pytest.raises(UserError, match="raw continues texts"):
        llm.chat(HI, raw=True)


def test_draws_are_those_of_seed_and_place(llm: LLM) -> None:
    """The same answer for every place of a list, or another one for every call."""
    drawn = llm.generate(["Say hi"] * 3, temperature=1.5, seed=7, max_new_tokens=12)
    assert len({*drawn}) > 1 and drawn == llm.generate(["Say hi"] * 3, temperature=1.5, seed=7, max_new_tokens=12)
    assert drawn[0] == llm.generate("Say hi", temperature=1.5, seed=7, max_new_tokens=12)
    assert llm.generate("Say hi", lit_llama.Sampling(temperature=1.5, seed=7), max_new_tokens=12) == drawn[0]


def test_an_answer_says_how_it_ended(llm: LLM) -> None:
    """An answer that was cut off, and nobody can know."""
    whole = llm.generate("Say hi", max_new_tokens=12)
    cut, stopped = (llm.answers(["Say hi"], max_new_tokens=12, stop=stop)[0] for stop in ((), whole[3:5]))
    assert (cut.text, cut.stopped, cut.tokens, cut.error) == (whole, False, 12, None)
    assert (stopped.text, stopped.stopped) == (whole.partition(whole[3:5])[0], True)


def test_what_the_folder_says_counts_behind_the_call(tiny_folder: Path, tmp_path: Path, llm: LLM) -> None:
    """generation_config.json that is not read, or that wins over what was asked for."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5}')
    with lit_llama.load(folder) as own:
        drawn = own.generate("Say hi", seed=7, max_new_tokens=12)
        assert drawn == llm.generate("Say hi", temperature=1.5, seed=7, max_new_tokens=12)
        greedy = own.generate("Say hi", temperature=0, max_new_tokens=12)
        assert greedy == llm.generate("Say hi", max_new_tokens=12) != drawn


def test_longer_than_the_model_reads(llm: LLM, tiny_folder: Path) -> None:
    """Turns that are left out although nobody asked for that, or an error where they may be."""
    turns = [turn for n in range(30) for turn in ({"role": "user", "content": f"Question {n}?"}, ANSWERED)][:-1]
    with pytest.raises(UserError, match="more than the 256 the model reads"):
        llm.chat(turns, max_new_tokens=8)
    last = next(
        turns[start:]
        for start in range(0, len(turns), 2)
        if len(prompt_ids(llm.tokenizer, llm.require_style(), turns[start:])) <= 256 - 8
    )
    assert llm.chat(turns, max_new_tokens=8, overflow="drop_oldest") == by_ids(llm, tiny_folder, last, max_new_tokens=8)


ANSWERED = {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("Say hi", {"temprature": 1}, "temprature is not a setting of Sampling; did you mean temperature"),
        ("Say hi", {"temperature": -1}, "--temperature is -1"),
        ("Say hi", {"n": 2}, "n is 2, expected 1"),
        (" ", {}, "the prompt is empty"),
        ([{"role": "robot", "content": "x"}], {}, "message 0 is"),
        ([{"role": "user", "content": ["x"]}], {}, "the content of message 0"),
        ([*HI, ANSWERED], {}, "the last message is of the role assistant"),
        ([], {}, "the last message is of the role none"),
    ],
)
def test_what_cannot_be_asked_is_a_user_error(llm: LLM, prompt: Any, settings: dict[str, Any], said: str) -> None:
    """A traceback out of the engine for a misspelled word; an answer to an answer."""
    with pytest.raises(UserError, match=said):
        llm.chat(prompt, **settings)


def test_a_folder_without_a_style_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """An instruction that is put to a base model as if it were one that answers."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.jinja")))
    with lit_llama.load(folder) as llm:
        with pytest.raises(CheckpointError, match="has no chat template"):
            llm.generate("Say hi")
        assert isinstance(llm.generate("Say hi", raw=True, max_new_tokens=3), str)


def test_a_closed_model_lets_go_of_its_weights(tiny_folder: Path) -> None:
    """Weights that stay as long as the name does, a stream that cannot be ended, or an error without words."""
    import gc
    import weakref

    llm = lit_llama.load(tiny_folder, packed=False)
    assert llm.model is not None
    model, stream = weakref.ref(llm.model), llm.stream("Say hi", max_new_tokens=50)
    next(iter(stream))
    with llm:
        pass
    llm.close()
    stream.close()
    gc.collect()
    assert model() is None and not llm.engine.busy
    with pytest.raises(UserError, match="the model is closed"):
        llm.generate("Say hi")
    with pytest.raises(UserError, match="closed"):
        llm.engine.add(llm.request([3], lit_llama.Sampling()))
