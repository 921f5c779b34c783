"""Flags of sampling: what a door offers, what a folder says, and which of them counts."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_llama.cli import CLI
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Asked, FolderSampling, Loading, folder_sampling, loading_flags, sampling_flags


def door(command: list[str], monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> dict[str, Any]:
    """What a door gets from a command line."""
    seen: dict[str, Any] = {}

    @sampling_flags(**defaults)
    def main(*, prompt: str = "hi", sampling: Asked, limit: int = 3) -> None:
        """Do it.

        Args:
            prompt: A text.
            sampling: How tokens are drawn.
            limit: A number.
        """
        seen.update(prompt=prompt, sampling=sampling, limit=limit)

    monkeypatch.setattr("sys.argv", ["door.py", *command])
    CLI(main)
    return seen


def test_flags_become_one_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is typed under another name, dropped, or that takes the place of a default of the door."""
    words = "--temperature 0.5 --top_k 7 --min_p 0.1 --repetition_penalty 1.2 --presence_penalty 0.3 --num_samples 4"
    seen = door([*words.split(), "--limit", "9", "--seed", "5"], monkeypatch, max_new_tokens=50, top_p=0.8)
    assert (seen["prompt"], seen["limit"]) == ("hi", 9)
    assert seen["sampling"].over(FolderSampling()) == Sampling(
        temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3, n=4, seed=5,
        max_new_tokens=50,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ()),
        (["--stop", "[/INST]"], ("[/INST]",)),
        (["--stop", "[a,b]", "x y", "--stop", "# z"], ("[a,b]", "x y", "# z")),
        (["--stop=--END", "null"], ("--END", "null")),
        (["--stop", "\n\n"], ("\n\n",)),
        (["--stop", '["a"]'], ('["a"]',)),
    ],
)
def test_stop_texts_are_taken_as_they_stand(
    words: list[str], wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[/INST] taken for a list, # for a comment, null for none, and the last of several flags for all."""
    assert door(words, monkeypatch)["sampling"].over(FolderSampling()).stop == wanted


def test_stop_texts_of_a_file_are_a_list(monkeypatch: pytest.MonkeyPatch, put: Callable[[str, str], Path]) -> None:
    """A file of settings whose list is one text."""
    path = put("run.yaml", 'stop: ["[END]", "a, b"]\ntemperature: 0.5\n')
    asked = door(["--config", str(path)], monkeypatch)["sampling"]
    assert asked.over(FolderSampling()) == Sampling(stop=["[END]", "a, b"], temperature=0.5)


def test_every_flag_has_help_and_its_default() -> None:
    """A flag without a line, a default that the door does not have, or the parameter that they stand for."""

    @sampling_flags(samples=False, temperature=0.7, max_new_tokens=512)
    def main(*, sampling: Asked) -> None:
        """Do it.

        Args:
            sampling: How tokens are drawn.
        """

    parameters, text = inspect.signature(main).parameters, main.__doc__ or ""
    assert parameters["max_new_tokens"].default == 512 and parameters["temperature"].default is None
    assert "sampling" not in parameters and "num_samples" not in parameters and "    sampling:" not in text
    for name in parameters:
        assert f"\n    {name}: " in text
    assert "what generation_config.json says, else 0.7." in text


def test_flags_become_one_loading_beside_one_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is lost on its way from a door to the weights, or one that the door does not offer."""
    seen: dict[str, Any] = {}

    @sampling_flags(temperature=0.5)
    @loading_flags(without=["draft_dir"])
    def main(*, sampling: Asked, loading: Loading, limit: int = 3) -> None:
        """Do it.

        Args:
            sampling: How tokens are drawn.
            loading: How it is loaded.
            limit: A number.
        """
        seen.update(sampling=sampling.alone(), loading=loading, limit=limit)

    words = "--precision 32-true --quantize int8 --base_dir there --prompt_style chatml --batch_size 5 --plan --top_k 4"
    monkeypatch.setattr("sys.argv", ["door.py", *words.split(), "--plan_memory", "16GB"])
    CLI(main)
    assert seen["sampling"] == Sampling(temperature=0.5, top_k=4) and seen["limit"] == 3
    assert seen["loading"] == Loading(
        precision="32-true", quantize="int8", base_dir=Path("there"), prompt_style="chatml", batch_size=5, plan=True,
        plan_memory="16GB",
    )  # fmt: skip
    parameters, text = inspect.signature(main).parameters, main.__doc__ or ""
    assert not {"draft_dir", "packed", "loading"} & parameters.keys()
    for name in parameters:
        assert f"\n    {name}: " in text and parameters[name].default == getattr(
            Loading(), name, parameters[name].default
        )
    with pytest.raises(UserError, match="--batch_size is 0, expected 1 or more"):
        Loading(batch_size=0)
    with pytest.raises(UserError, match="--kv_cache is 'fp8', expected auto or int8"):
        Loading(kv_cache="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"stop": [""]}, "--stop holds ''"),
        ({"min_new_tokens": 300}, "--min_new_tokens is 300, expected 0 to --max_new_tokens 256"),
    ],
)
def test_a_bad_value_is_found_before_anything_else(given: dict[str, Any], named: str) -> None:
    """Minutes of loading before a typing error is told."""
    with pytest.raises(UserError, match=named):
        Asked(given, Sampling())


def test_a_number_of_answers_below_1_is_named_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name that it has inside."""
    with pytest.raises(SystemExit):
        door(["--num_samples", "0"], monkeypatch)
    assert "--num_samples is 0, expected 1 or more" in capsys.readouterr().err


def test_several_answers_want_chance() -> None:
    """Three times the same answer."""
    with pytest.raises(UserError, match=r"--num_samples is 3, .*--temperature 0\.8"):
        Asked({"n": 3}, Sampling()).over(FolderSampling())
    assert Asked({"n": 3, "temperature": 0.1}, Sampling()).over(FolderSampling()).n == 3


def test_filters_without_chance_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A user who varies top_p and wonders why nothing changes."""
    Asked({"top_p": 0.5, "top_k": 3}, Sampling()).over(FolderSampling())
    assert "--top_k, --top_p: without effect at temperature 0" in capsys.readouterr().err
    Asked({"top_p": 0.5, "temperature": 1.0}, Sampling()).over(FolderSampling())
    Asked({"stop": ["x"]}, Sampling()).over(FolderSampling())
    assert capsys.readouterr().err == ""
    Asked({"stop": [r"\n"]}, Sampling()).over(FolderSampling())
    assert "a backslash and an n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6}),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, {"repetition_penalty": 1.05, "min_p": 0.1, "temperature": 1.0}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.9}),
        ({"stop_strings": ["###"], "suppress_tokens": [5, 6]}, {"stop": ["###"], "banned_ids": [5, 6]}),
        ({"eos_token_id": [2], "max_length": 20, "temperature": None, "stop_strings": []}, {}),
    ],
)
def test_a_folder_says_how_it_is_sampled(config: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    """do_sample passed over, filters of the door beside those of the folder, and penalties that go with the draws."""
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = Asked({}, Sampling(temperature=0.7, top_p=0.9)).over(folder_sampling(tmp_path / "adapter", tmp_path))
    unset = {} if {"temperature", "top_k", "top_p", "min_p"} & wanted.keys() else {"temperature": 0.7, "top_p": 0.9}
    assert found == Sampling(**(unset | wanted))


def test_the_words_of_a_folder_are_said_and_flags_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is drawn from although nobody asked for it, and nobody is told; a flag that is overruled."""
    path = tmp_path / "generation_config.json"
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    path.write_text(json.dumps(config))
    found = Asked({"top_p": 0.5}, Sampling()).over(folder_sampling(tmp_path))
    assert (found.temperature, found.top_p, found.repetition_penalty) == (0.6, 0.5, 1.1)
    told = f"{path} decides: temperature 0.6, repetition_penalty 1.1; flags come first\n"
    assert capsys.readouterr().err == told
    found = Asked({"temperature": 0.0}, Sampling()).over(folder_sampling(tmp_path))
    assert found.greedy and capsys.readouterr().err == f"{path} decides: repetition_penalty 1.1; flags come first\n"
    given = {"temperature": 0.1, "top_p": 1.0, "repetition_penalty": 1.0}
    assert Asked(given, Sampling()).over(folder_sampling(tmp_path)) == Sampling(**given)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_what_a_folder_asks_for_in_vain_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beams or forbidden repetitions that are left out without a word, and words about settings that change nothing."""
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "guidance_scale": None, "top_k": 50})
    )
    Asked({"temperature": 0.0}, Sampling()).over(folder_sampling(tmp_path))
    err = capsys.readouterr().err
    assert (
        err.endswith("asks for what is not done here: num_beams 4, no_repeat_ngram_size 3\n") and "typical" not in err
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1]", "is not a JSON object"),
        ('{"temperature": "hot"}', "temperature is 'hot'"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"top_p": 90}', "top_p is 90"),
        ('{"stop_strings": 5}', "stop_strings is 5"),
        ('{"suppress_tokens": [-1]}', r"suppress_tokens is \[-1\]"),
    ],
)
def test_a_folder_that_says_nonsense_is_named(text: str, named: str, tmp_path: Path) -> None:
    """A traceback, or an error that blames a flag."""
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{named}"):
        folder_sampling(tmp_path)
