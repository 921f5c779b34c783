"""Names of parameters and calls: Python's for a caller in Python, flags and commands within a door."""

import json
import pickle
import shlex
import sys
from pathlib import Path

import pytest
from conftest import run_here

import lit_llama
from lit_llama.commands import Commands, call_as_command, spoken
from lit_llama.errors import CheckpointError, DataError, Interrupted, UserError, check_seed
from lit_llama.wording import Wording, call, param, params, word_as, wording


def test_a_parameter_is_named_as_it_is_typed() -> None:
    """A flag in a notebook, a name that no shell takes, or a value that a shell cuts in pieces."""
    values: dict[str, object] = {
        "lora.dropout": 0,
        "mask_inputs": True,
        "data_kind": "sft-chosen",
        "out_dir": Path("out/my run"),
        "stop": ["a b", "c"],
        "fields": {"input": "it's"},
        "limit": None,
        "test_split_size": 5.0,
    }
    typed = (
        "--lora.dropout 0",
        "--mask_inputs true",
        "--as sft-chosen",
        "--out_dir 'out/my run'",
        "--stop 'a b' c",
        "--fields 'input=it'\"'\"'s'",
        "--limit null",
        "--test_split_size 5",
    )
    assert tuple(param(name, value) for name, value in values.items()) == typed
    assert params(**values) == " ".join(typed) and param("data_kind") == "--as"
    before = word_as(Wording())
    try:
        assert param("lora.dropout", 0) == "`lora.dropout=0`" and param("data_kind") == "`data_kind`"
        assert param("out_dir", Path("out/my run")) == "`out_dir='out/my run'`"
        given = eval(
            f"dict({params(**{key: value for key, value in values.items() if '.' not in key}).replace('`', '')})"
        )
        assert given == {key: value for key, value in values.items() if "." not in key} | {"out_dir": "out/my run"}
    finally:
        word_as(before)


def test_a_call_is_a_command_of_a_door(python_names: None) -> None:
    """A command in a notebook, one of another door, one that a shell reads otherwise, or scripts for `lit-llama`."""
    given = {"adapter_dir": Path("out/lora/it's"), "destination_path": "a b"}
    assert call("merge", **given) == "`lit_llama.merge(adapter_dir=\"out/lora/it's\", destination_path='a b')`"
    assert call("merge") == "`lit_llama.merge`" and call("load", raw=True) == "`lit_llama.load`"
    going_on = {"config": Path("out/run.yaml"), "method": "dpo", "resume": "auto", "train.epochs": 2}
    assert call("finetune", **going_on) == "`lit_llama.finetune(..., resume='auto', train={'epochs': 2})`"
    word_as(Commands())
    merged = call("merge", **given)
    assert shlex.split(merged) == [
        *("python", "finetune/merge.py", "--adapter_dir", "out/lora/it's", "--destination_path", "a b")
    ]
    assert call("finetune", **going_on) == (
        "python finetune/dpo.py --config out/run.yaml --resume auto --train.epochs 2"
    )
    assert call("finetune", method="full") == "finetune/full.py" and call("finetune") == "finetune/lora.py"
    assert call("load", folder="x", raw=True) == "python generate/base.py --checkpoint_dir x"
    assert call("load", folder="x", raw=False) == "python generate/chat.py --checkpoint_dir x"
    assert call("prepare", source="a.txt", documents="file") == "python prepare/text.py --source a.txt"
    call_as_command()
    assert call("merge", **given) == merged.replace("python finetune/merge.py", "lit-llama finetune merge")
    assert call("merge") == "lit-llama finetune merge"
    text = "python prepare/records.py --x; finetune/merge.py; /a/prepare/text.py, my-finetune/lora.py, prepare/x"
    assert spoken().typed(text) == (
        "lit-llama prepare records --x; lit-llama finetune merge; /a/prepare/text.py, my-finetune/lora.py, prepare/x"
    )


def test_an_error_carries_what_it_says(python_names: None) -> None:
    """A program that has to read the text, or an error that loses its parts on the way out of another process."""
    with pytest.raises(UserError) as found:
        check_seed(-1)
    error = found.value
    assert str(error) == f"`seed` is -1, expected 0 to {2**64 - 1}"
    assert (error.parameter, error.value, error.expected, error.remedy) == ("seed", -1, f"0 to {2**64 - 1}", None)
    full = DataError("is a file", parameter="out_dir", value="x", remedy="name another")
    assert str(full) == "`out_dir='x'` is a file; name another"
    again = pickle.loads(pickle.dumps(full))
    assert type(again) is DataError and str(again) == str(full) and vars(again) == vars(full)
    plain = CheckpointError("nothing there")
    assert str(plain) == "nothing there" and plain.parameter is plain.value is plain.expected is plain.remedy is None
    assert len(str(UserError(parameter="prompt", value="x" * 10**6, expected="less"))) < 300
    assert Interrupted(2, "stopped").exit_status == 130
    with pytest.raises(UserError) as found:
        lit_llama.LoRAConfig(dropout=1)
    assert (found.value.parameter, found.value.value) == ("lora.dropout", 1)
    assert str(found.value) == "`lora.dropout` is 1, expected 0 <= dropout < 1"


HOSTILE = "`seed` `lora.dropout=0` `lit_llama.merge(adapter_dir='x')` --seed python finetune/merge.py"


@pytest.mark.parametrize("installed", [False, True])
def test_what_others_wrote_is_told_as_it_is(
    installed: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row, or a path, that is taken for our own names: its backticks become flags, its scripts commands."""
    monkeypatch.setattr(sys, "argv", ["x"])
    before = word_as(Commands(installed))
    try:
        rows = tmp_path / "`seed`.jsonl"
        rows.write_text(json.dumps({HOSTILE: "a", "another": "b"}) + "\n")
        flags = ["--destination_path", tmp_path / "data", "--tokenizer_path", tiny_folder]
        done = run_here("prepare/records.py", "--source", rows, *flags)
        assert done.returncode == 3 and HOSTILE in done.stderr and f"{rows}:" in done.stderr
        place = tmp_path / "`merge` --seed python prepare" / "records.py"
        done = run_here("generate/instruct.py", "--checkpoint_dir", place)
        assert done.returncode == 4 and f"there is no folder {place} " in done.stderr
        made = "lit-llama prepare checkpoint" if installed else "prepare/checkpoint.py"
        assert f"make one with {made.replace('checkpoint', 'download')} or {made}" in done.stderr
    finally:
        word_as(before)


def test_a_door_leaves_the_process_as_it_was(python_names: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook that reads flags since it has called a door."""
    assert (
        run_here("prepare/show.py", "--data_dir", "nowhere").stderr.count("make it with prepare/records.py --dest") == 1
    )
    assert type(wording()) is Wording
    with pytest.raises(DataError) as found:
        lit_llama.show_rows("nowhere")
    assert "`lit_llama.prepare(destination_path='nowhere')`" in str(found.value) and "--" not in str(found.value)
