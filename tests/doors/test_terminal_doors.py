"""Words of others at every door: in names of files and flags, rows, keys, weights and answers."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_adapter
from pseudo_terminals import EVIL, ROOT, acts, on_terminal
from small_runs import ROWS, flags_of

from lit_llama.console import harmless

DOORS = sorted(
    str(path.relative_to(ROOT)) for room in ("prepare", "finetune", "generate") for path in (ROOT / room).glob("*.py")
)
NAME = EVIL  # a name that a file can have: nothing in it is a slash


def check(said: str, *, shown: bool = True) -> None:
    """Nothing acts, the hostile text is there spelled, and nothing is a defect."""
    assert acts(said) == []
    assert "Traceback" not in said, said
    assert not shown or harmless("\u202e") in said or "\\u202e" in said, said


def subcommand(door: str) -> list[str]:
    return ["apply"] if door == "prepare/delta.py" else []


@pytest.mark.parametrize("door", DOORS)
def test_a_command_line_and_a_config_do_not_act(door: str, tmp_path: Path) -> None:
    """Catches errors of argparse, of jsonargparse and our own that quote flags, values, keys and names of files."""
    config = tmp_path / f"config{NAME}.yaml"
    config.write_text(json.dumps({f"key{EVIL}": EVIL}))
    for flags in (
        [f"--{EVIL}", EVIL],
        ["--seed", EVIL],
        [f"--train.{EVIL}", "1"],
        [EVIL],
        ["--config", config],
        ["--config", f"{config}-not-there"],
        ["--precision", EVIL],
    ):
        status, said = on_terminal(door, [*subcommand(door), *flags])
        assert status == 2, said
        check(said, shown=False)


PLACES: dict[str, list[tuple[str, ...]]] = {
    "prepare/records.py": [("--source", "--destination_path", "--tokenizer_path")],
    "prepare/text.py": [("--source", "--destination_path", "--tokenizer_path")],
    "prepare/alpaca.py": [("--destination_path", "--tokenizer_path", "--data_file_name")],
    "prepare/checkpoint.py": [("--source", "--destination_path")],
    "prepare/delta.py": [("--base_dir", "--delta_dir", "--destination_path")],
    "prepare/show.py": [("--data_dir",)],
    "prepare/download.py": [("--repo_id", "--destination_path")],
    "finetune/lora.py": [("--checkpoint_dir", "--data_dir", "--out_dir")],
    "finetune/full.py": [("--checkpoint_dir", "--data_dir", "--out_dir")],
    "finetune/dpo.py": [("--checkpoint_dir", "--data_dir", "--out_dir")],
    "finetune/merge.py": [("--adapter_dir", "--destination_path")],
    "generate/base.py": [("--checkpoint_dir",)],
    "generate/chat.py": [("--checkpoint_dir",)],
    "generate/evaluate.py": [("--checkpoint_dir", "--data_dir", "--out_dir")],
    "generate/instruct.py": [("--checkpoint_dir", "--input_file")],
    "generate/rows.py": [("--recipe", "--checkpoint_dir", "--out_dir")],
    "generate/serve.py": [("--checkpoint_dir",)],
}


@pytest.mark.parametrize("door", DOORS)
def test_places_that_are_not_there_do_not_act(door: str, tmp_path: Path) -> None:
    """Catches the errors of each door about its files."""
    for names in PLACES[door]:
        flags = [word for name in names for word in (name, tmp_path / f"{NAME}{name}")]
        status, said = on_terminal(door, [*subcommand(door), *flags])
        assert 2 <= status <= 6, said
        check(said)


@pytest.fixture(scope="module")
def hostile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a checkpoint and rows have hostile names."""
    home = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_folder, home / f"base{NAME}")
    rows = [{**row, "instruction": f"{row['instruction']}{EVIL}", "output": f"{row['output']}{EVIL}"} for row in ROWS]
    (home / f"rows{NAME}.json").write_text(json.dumps(rows))
    return home


def data(home: Path) -> Path:
    """Prepare, where no test has before."""
    made = home / f"data{NAME}"
    if not made.exists():
        status, said = on_terminal(
            "prepare/records.py",
            [
                "--source",
                home / f"rows{NAME}.json",
                "--destination_path",
                made,
                "--tokenizer_path",
                home / f"base{NAME}",
                "--prompt_style",
                "alpaca",
                "--test_split_size",
                0.2,
            ],
        )
        assert status == 0, said
        check(said)
    return made


def test_what_data_and_rows_hold_does_not_act(hostile: Path) -> None:
    """Catches rows, refused or shown, that reach the terminal as they are."""
    for split in ("train", "test"):
        status, said = on_terminal("prepare/show.py", ["--data_dir", data(hostile), "--split", split, "--rows", "0-1"])
        assert status == 0, said
        check(said)
    place = ["--destination_path", hostile / f"none{NAME}", "--tokenizer_path", hostile / f"base{NAME}"]
    bad = [
        [{f"a{EVIL}": EVIL}],
        [{"instruction": EVIL, "output": {EVIL: 1}}],
        [{"messages": [{"role": EVIL, "content": EVIL}]}],
        [{"instruction": "a", "output": "b", EVIL: EVIL}],
        [{"messages": [{"role": "user", "content": EVIL, f"tool{EVIL}": 1}]}],
    ]
    for number, rows in enumerate(bad):
        source = hostile / f"{number}{NAME}.json"
        source.write_text(json.dumps(rows))
        status, said = on_terminal("prepare/records.py", ["--source", source, *place])
        assert status in (2, 3), said
        check(said)
    for name, text in (("x.csv", f"{EVIL},{EVIL}\n1,2,3\n"), ("x.jsonl", f'{{"{EVIL}'), ("x.parquet", EVIL)):
        source = hostile / f"{NAME}{name}"
        source.write_text(text)
        status, said = on_terminal("prepare/records.py", ["--source", source, *place])
        assert status in (2, 3), said
        check(said)


def test_what_training_and_merging_say_does_not_act(hostile: Path) -> None:
    """Catches bars, plans, warnings and sample answers."""
    base, out = hostile / f"base{NAME}", hostile / f"out{NAME}"
    flags = flags_of(base, data(hostile), out)
    status, said = on_terminal("finetune/lora.py", [*flags, "--train.max_steps", 2, "--train.sample_prompts", 2])
    assert status == 0, said
    check(said)
    for more in (["--plan", "true"], ["--resume", "auto"], []):
        status, said = on_terminal("finetune/lora.py", [*flags, "--train.max_steps", 2, *more])
        check(said, shown=more != ["--plan", "true"])
    for number, form in enumerate(("hf", "gguf")):
        made = hostile / f"merged{number}{NAME}{'.gguf' if form == 'gguf' else ''}"
        status, said = on_terminal(
            "finetune/merge.py", ["--adapter_dir", out, "--destination_path", made, "--format", form]
        )
        assert status == 0, said
        check(said)


def test_what_a_damaged_checkpoint_holds_does_not_act(hostile: Path, tmp_path: Path) -> None:
    """Catches keys of config.json, names of tensors and of tokens."""
    source = hostile / f"base{NAME}"
    for name, change in (
        ("config.json", {"model_type": EVIL}),
        ("config.json", {"rope_scaling": {"rope_type": EVIL}}),
        ("config.json", {"hidden_size": EVIL}),
        ("generation_config.json", {EVIL: EVIL, "temperature": EVIL}),
        ("tokenizer_config.json", {"chat_template": "{{ raise_exception('" + EVIL + "') }}", "eos_token": EVIL}),
    ):
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}{NAME}"
        shutil.copytree(source, folder)
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | change))
        for door, more in (
            ("generate/instruct.py", ["--prompt", "a", "--max_new_tokens", 2]),
            ("generate/serve.py", []),
        ):
            if door == "generate/serve.py" and name in ("generation_config.json", "tokenizer_config.json"):
                continue  # which would serve
            _, said = on_terminal(door, ["--checkpoint_dir", folder, *more])
            check(said, shown=False)
        _, said = on_terminal(
            "prepare/checkpoint.py", ["--source", folder, "--destination_path", tmp_path / f"made{NAME}"]
        )
        check(said, shown=False)
        shutil.rmtree(tmp_path / f"made{NAME}", ignore_errors=True)


def test_answers_do_not_act(hostile: Path) -> None:
    """Catches an answer, streamed or whole, of a model that writes any bytes, as this one of random weights does."""
    base = hostile / f"base{NAME}"
    drawn = ["--checkpoint_dir", base, "--temperature", 3, "--max_new_tokens", 120, "--seed", 3]
    styled = ["--prompt_style", "alpaca"]
    for flags in (
        ("generate/base.py", ["--prompt", EVIL, *drawn]),
        ("generate/instruct.py", ["--prompt", EVIL, "--stop", EVIL, "--num_samples", 2, *styled, *drawn]),
        ("generate/instruct.py", ["--data_dir", data(hostile), "--limit", 3, *styled, *drawn]),
    ):
        status, said = on_terminal(*flags)
        assert status == 0, said
        assert acts(said) == [] and "⟨U+00" in said
    typed = f"{EVIL.replace(chr(13), '').replace(chr(8), '').replace(chr(127), '')}\n/history\n/list\n/nothing\n/quit\n"
    typed = typed.replace("\x1b", "").replace("\x07", "").replace("\x9b", "")  # keys that edit the line
    status, said = on_terminal("generate/chat.py", [*styled, *drawn, "--conversations", hostile / "talks"], typed)
    said = said.partition("loaded in")[2]  # until then it is the terminal that echoes what is typed
    assert not set("\u202e\u200b\u2066\x07\x9b") & set(said) and "Traceback" not in said, said
    assert harmless("\u202e") in said and "unknown command" in said


def test_tables_of_an_evaluation_do_not_act(hostile: Path) -> None:
    """Catches names of tasks and models, answers side by side, and titles."""
    base, rows = hostile / f"base{NAME}", data(hostile)
    adapter = hostile / f"adapter{NAME}"
    if not adapter.exists():
        write_adapter(adapter, base)
    flags = ["--data_dir", rows, "--out_dir", hostile / f"scores{NAME}", "--max_new_tokens", 30, "--temperature", 3]
    status, said = on_terminal("generate/evaluate.py", ["--checkpoint_dir", base, adapter, *flags, "--show", 3])
    assert status == 0, said
    check(said)


def test_warnings_logs_and_tracebacks_do_not_act(tmp_path: Path) -> None:
    """Catches a defect, a library's warning or a log that quotes what it was given."""
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys, warnings\n"
        "from lit_llama.cli import CLI\n"
        "from lit_llama.progress import track\n"
        f"EVIL = {EVIL!r}\n"
        "def main() -> None:\n"
        "    warnings.warn(EVIL)\n"
        "    logging.getLogger('x').warning(EVIL)\n"
        "    for _ in track([1, 2], EVIL):\n"
        "        warnings.warn(EVIL + 'x')\n"
        "        print(EVIL)\n"
        "        print(EVIL, file=sys.stderr)\n"
        "        for c in EVIL: print(c, end='', flush=True)\n"
        "    sys.stdout.writelines([EVIL, EVIL])\n"
        "    raise KeyError(EVIL)\n"
        "CLI(main)\n"
    )
    status, said = on_terminal(str(script), [])
    assert status == 1 and "KeyError" in said
    assert acts(said) == [] and said.count(harmless("\u202e")) >= 9
