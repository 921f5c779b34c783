"""Every script as a user runs it: help, wrong values, wrong paths, and what stdout and stderr hold."""

import importlib.util
import inspect
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, run_door, run_here, write_adapter

from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import load

DOORS = sorted(
    str(path.relative_to(ROOT)) for room in ("prepare", "finetune", "generate") for path in ROOT.glob(f"{room}/*.py")
)
REQUIRED = {
    "prepare/alpaca.py": [],
    "prepare/checkpoint.py": ["--source", "absent.gguf", "--destination_path", "made"],
    "prepare/delta.py": ["apply", "--base_dir", "absent", "--delta_dir", "absent", "--destination_path", "made"],
    "prepare/download.py": ["--repo_id", "owner/absent"],
    "prepare/records.py": ["--source", "absent.jsonl", "--destination_path", "made", "--tokenizer_path", "absent"],
    "prepare/show.py": ["--data_dir", "absent"],
    "prepare/text.py": ["--source", "absent.txt", "--destination_path", "made", "--tokenizer_path", "absent"],
    "finetune/lora.py": ["--checkpoint_dir", "absent", "--data_dir", "absent", "--out_dir", "made"],
    "finetune/dpo.py": ["--checkpoint_dir", "absent", "--data_dir", "absent", "--out_dir", "made"],
    "finetune/full.py": ["--checkpoint_dir", "absent", "--data_dir", "absent", "--out_dir", "made"],
    "finetune/merge.py": ["--adapter_dir", "absent", "--destination_path", "made"],
    "generate/base.py": ["--checkpoint_dir", "absent"],
    "generate/instruct.py": ["--checkpoint_dir", "absent"],
    "generate/chat.py": ["--checkpoint_dir", "absent"],
    "generate/evaluate.py": ["--checkpoint_dir", "absent", "--tasks", "regression"],
    "generate/serve.py": ["--checkpoint_dir", "absent"],
    "generate/rows.py": ["--recipe", "magpie", "--checkpoint_dir", "absent"],
}


COMMANDS = {"prepare/delta.py": ["apply", "make", "verify"]}  # the other scripts are one function, main


def commands(door: str) -> list[tuple[list[str], Callable[..., None]]]:
    """The words that choose a function of a script, and that function."""
    module = load_door(door)
    return [([name], getattr(module, name)) for name in COMMANDS.get(door, [])] or [([], module.main)]


def load_door(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_refused(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line that names the cause, the right status, and nothing on stdout."""
    assert result.returncode == status, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_every_door_is_tested() -> None:
    """A new script without tests."""
    assert set(REQUIRED) == set(DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_help_is_quick_and_names_every_parameter(door: str) -> None:
    """An import of torch at the top of a module, or a parameter that is not a flag."""
    command = [sys.executable, "-X", "importtime", str(ROOT / door), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    said = result.stderr.splitlines()
    assert result.returncode == 0 and all(line.startswith("import time:") for line in said), result.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said}
    assert "lit_llama" in imported and not imported & {"torch", "datasets", "pyarrow", "transformers"}
    assert len(said) < 400, "modules, which are what the time goes into; torch alone has a thousand"
    for words, function in commands(door):
        text = run_here(door, *words, "--help").stdout if words else result.stdout
        for name in inspect.signature(function).parameters:
            assert f"--{name}" in text, name


@pytest.mark.parametrize("door", DOORS)
def test_every_parameter_has_its_line_of_help(door: str) -> None:
    """A parameter that the docstring forgot."""
    for _, function in commands(door):
        documented = inspect.getdoc(function) or ""
        for name, parameter in inspect.signature(function).parameters.items():
            assert f"    {name}: " in documented, name
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.annotation is not inspect.Parameter.empty


def test_help_offers_no_rate_that_a_run_refuses() -> None:
    """Catches `auto` offered where there is no rule; see tests/train/test_rate.py for the refusal."""
    said = " ".join(run_here("finetune/dpo.py", "--help").stdout.split())
    assert "auto, which preference training has not, is a published rule" in said


@pytest.mark.parametrize("door", DOORS)
def test_an_unknown_flag_is_refused_before_anything_happens(door: str, tmp_path: Path) -> None:
    """A misspelled flag that is ignored."""
    assert_refused(run_here(door, *REQUIRED[door], "--no_such_flag", 1, cwd=tmp_path), 2, "--no_such_flag")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("door", "flag", "value"),
    [
        ("prepare/alpaca.py", "--test_split_size", "many"),
        ("prepare/alpaca.py", "--mask_inputs", "perhaps"),
        ("prepare/alpaca.py", "--overflow", "shrink"),
        ("prepare/checkpoint.py", "--dtype", "int8"),
        ("prepare/records.py", "--split", "random"),
        ("prepare/records.py", "--fields", "question"),
        ("prepare/records.py", "--weights", "[much]"),
        ("prepare/show.py", "--split", "dev"),
        ("prepare/text.py", "--documents", "chapter"),
        ("finetune/lora.py", "--lora.r", "0"),
        ("finetune/lora.py", "--lora.dropout", "1.5"),
        ("finetune/lora.py", "--train.schedule", "square"),
        ("finetune/lora.py", "--train.learning_rate", "20000"),
        ("finetune/dpo.py", "--dpo.loss", "ppo"),
        ("finetune/dpo.py", "--dpo.beta", "-1"),
        ("finetune/merge.py", "--dtype", "int8"),
        ("generate/base.py", "--max_new_tokens", "1.5"),
        ("generate/base.py", "--precision", "8-bit"),
        ("generate/instruct.py", "--prompt_style", "shouting"),
        ("generate/chat.py", "--top_k", "few"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag(door: str, flag: str, value: str, tmp_path: Path) -> None:
    """A bad type or choice that is found hours later, or not at all."""
    assert_refused(run_here(door, *REQUIRED[door], flag, value, cwd=tmp_path), 2, flag.removeprefix("--"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("door", "arguments", "named"),
    [
        ("prepare/download.py", ["--file", "model.bin"], "--file is 'model.bin'"),
        ("prepare/show.py", ["--rows", "first"], "--rows is 'first'"),
        ("generate/chat.py", ["--temperature", "-1"], "--temperature is -1.0"),
        ("generate/instruct.py", ["--limit", "-1"], "--limit is -1"),
    ],
)
def test_a_value_out_of_range_is_refused_before_the_model_is_loaded(
    door: str, arguments: list[str], named: str, tmp_path: Path
) -> None:
    """Minutes of loading before a typing error is found: here there is not even a model."""
    assert_refused(run_here(door, *REQUIRED[door], *arguments, cwd=tmp_path), 2, named)


@pytest.mark.parametrize(
    ("door", "status", "named"),
    [
        ("prepare/alpaca.py", 4, "checkpoints/lit-llama/tokenizer.model does not exist"),
        ("prepare/checkpoint.py", 4, "absent.gguf does not exist"),
        ("prepare/download.py", 5, "HF_HUB_OFFLINE"),
        ("prepare/records.py", 3, "absent.jsonl does not exist"),
        ("prepare/show.py", 3, "prepare/alpaca.py"),
        ("prepare/text.py", 3, "absent.txt does not exist"),
        ("finetune/lora.py", 3, "prepare/alpaca.py"),
        ("finetune/full.py", 3, "prepare/alpaca.py"),
        ("finetune/merge.py", 4, "finetune/lora.py"),
        ("generate/base.py", 4, "there is no folder absent"),
        ("generate/instruct.py", 4, "there is no folder absent"),
        ("generate/chat.py", 4, "there is no folder absent"),
    ],
)
def test_a_missing_path_is_one_line_with_the_way_out(
    door: str, status: int, named: str, tmp_path: Path, tiny_folder: Path
) -> None:
    """A traceback, or a folder made for nothing."""
    run = run_door if door in ("prepare/alpaca.py", "generate/base.py") else run_here  # all cost half a minute
    found = (
        ["--checkpoint_dir", tiny_folder] if door in ("finetune/lora.py", "finetune/full.py") else []
    )  # so that only the data is absent
    assert_refused(run(door, *REQUIRED[door], *found, cwd=tmp_path), status, named)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_file_is_status_3(tmp_path: Path, llama_tokenizer: Path) -> None:
    """A download of something else in place of a file of the user's own."""
    flags = ["--tokenizer_path", llama_tokenizer, "--data_file_name", "mine.json", "--destination_path", "d"]
    assert_refused(run_here("prepare/alpaca.py", *flags, cwd=tmp_path), 3, "d/mine.json", "--data_file_name")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_written_is_status_5(
    llama_tokenizer: Path, alpaca_rows: Callable[[list[dict[str, str]]], Path]
) -> None:
    """A traceback out of the file system, or a folder that looks whole although a part is missing."""
    folder = alpaca_rows([{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(9)])
    (folder / "train").write_text("a file where a folder must go")
    flags = ["--tokenizer_path", llama_tokenizer, "--data_file_name", "rows.json", "--test_split_size", 2]
    assert_refused(run_here("prepare/alpaca.py", *flags, "--destination_path", folder), 5, "train")
    assert not (folder / "meta.json").exists() and [path.name for path in folder.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("door", ["finetune/merge.py", "generate/instruct.py"])
def test_a_missing_or_other_base_is_one_line(door: str, tiny_folder: Path, tmp_path: Path) -> None:
    """An adapter without its base that ends in a traceback, or answers on the wrong one."""
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    write_adapter(tmp_path / "adapter", base)
    if door == "finetune/merge.py":
        base.rename(tmp_path / "gone")
        flags, status, named = ["--adapter_dir", "adapter", "--destination_path", "made"], 4, "names the base model"
    else:
        data = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(data[:-4] + b"\x00\x00\x00\x40")
        flags, status, named = ["--checkpoint_dir", "adapter"], 6, "not the base"
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_refused(run_here(door, *flags, cwd=tmp_path), status, named)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_alpaca_has_the_parameters_and_defaults_of_lit_llama() -> None:
    """A command written for lit-llama that means something else here."""
    parameters = inspect.signature(load_door("prepare/alpaca.py").main).parameters
    theirs = {
        "destination_path": Path("data/alpaca"),
        "tokenizer_path": Path("checkpoints/lit-llama/tokenizer.model"),
        "test_split_size": None,  # 2000, or a tenth of fewer than 20,000 rows
        "max_seq_length": 256,
        "seed": 42,
        "mask_inputs": False,
        "data_file_name": "alpaca_data_cleaned_archive.json",
    }
    assert {name: parameters[name].default for name in theirs} == theirs


def test_the_command_of_lit_llama_works_verbatim(tmp_path: Path, alpaca_file: Path, llama_tokenizer: Path) -> None:
    """A flag renamed, or a layout that lit-llama's users do not have."""
    import datasets

    command = (
        "python prepare/alpaca.py --destination_path data/alpaca "
        "--tokenizer_path checkpoints/lit-llama/tokenizer.model --test_split_size 2000 --max_seq_length 256 --seed 42 "
        "--mask_inputs False --data_file_name alpaca_data_cleaned_archive.json"
    )
    (tmp_path / "data" / "alpaca").mkdir(parents=True)
    (tmp_path / "checkpoints" / "lit-llama").mkdir(parents=True)
    (tmp_path / "prepare").symlink_to(ROOT / "prepare")
    shutil.copy(llama_tokenizer, tmp_path / "checkpoints" / "lit-llama" / "tokenizer.model")
    given = json.loads(alpaca_file.read_text("utf-8"))
    rows = [row | {"instruction": f"{number}. {row['instruction']}"} for number, row in enumerate(given * 3)][:2200]
    (tmp_path / "data" / "alpaca" / "alpaca_data_cleaned_archive.json").write_text(json.dumps(rows), "utf-8")
    python, *arguments = shlex.split(command)
    assert python == "python"
    result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "2200 rows = " in result.stderr
    made = datasets.load_from_disk(str(tmp_path / "data" / "alpaca"))
    assert set(made) == {"train", "test"} and made["train"].column_names == ["input_ids", "labels"]
    meta = json.loads((tmp_path / "data" / "alpaca" / "meta.json").read_text())
    dropped = sum(tally["rows"] for tally in meta["dropped"].values())
    assert len(made["train"]) + len(made["test"]) + dropped == 2200
    assert len(made["train"]) <= 200 < len(made["test"]) <= 2000
    assert all(row["input_ids"] == row["labels"] and len(row["labels"]) <= 256 for row in made["train"])


def test_a_configuration_file_runs_a_door(tmp_path: Path, tiny_folder: Path) -> None:
    """A door that reads the flags only, or a nested key that is lost."""
    (tmp_path / "run.yaml").write_text(f"checkpoint_dir: {tiny_folder}\nprompt: Say hi\nmax_new_tokens: 3\n")
    by_file = run_here("generate/base.py", "--config", "run.yaml", cwd=tmp_path)
    llm = load(tiny_folder)
    wanted = "".join(text for _, text in llm.stream(llm.tokenizer.encode("Say hi"), Sampling(max_new_tokens=3)))
    assert by_file.returncode == 0 and by_file.stdout == wanted + "\n"
    assert "3 tokens in" in by_file.stderr and "tokens/s" in by_file.stderr
    (tmp_path / "run.yaml").write_text("checkpoint_dir: absent\nlora:\n  rank: 8\n")
    assert_refused(run_here("finetune/lora.py", "--config", "run.yaml", cwd=tmp_path), 2, "rank")


def test_chat_talks_through_a_pipe(tiny_folder: Path) -> None:
    """Answers and talk mixed, or the end of input that is an error."""
    flags = ["--checkpoint_dir", tiny_folder, "--max_new_tokens", 5, "--temperature", 0]
    result = run_door("generate/chat.py", *flags, stdin="Say hi\n\n/system Be brief\nx\n/what\n")
    assert result.returncode == 2 and "Traceback" not in result.stderr  # of the command that there is not
    assert result.stderr.count("tokens/s") == 2 and "unknown command /what" in result.stderr
    assert "/quit" not in result.stdout and result.stdout.count("\n") >= 2


@pytest.mark.parametrize(
    ("door", "flags", "status", "named"),
    [
        ("generate/chat.py", [], 4, "could carry --prompt_style alpaca, chatml, vicuna, llama-2, mistral, plain)"),
        ("generate/instruct.py", [], 4, "--prompt_style alpaca"),
        ("generate/chat.py", ["--prompt_style", "llama-3"], 4, "<|start_header_id|>"),
        ("generate/instruct.py", ["--prompt_style", "llama-3"], 4, "<|start_header_id|>"),
        ("generate/chat.py", ["--prompt_style", "alpaca", "--system", "Be brief"], 2, "no system message"),
        ("generate/instruct.py", ["--prompt_style", "alpaca", "--num_samples", "2"], 2, "--num_samples is 2"),
        ("generate/base.py", ["--num_samples", "2"], 2, "--num_samples is 2"),
        ("generate/instruct.py", ["--prompt_style", "alpaca", "--prompt", "hi", "--data_dir", "x"], 2, "--prompt and"),
        ("generate/instruct.py", ["--prompt_style", "alpaca", "--prompt", ""], 2, "--prompt is empty"),
        ("generate/instruct.py", ["--prompt_style", "alpaca", "--input_file", "absent.json"], 3, "absent.json"),
    ],
)
def test_what_cannot_be_asked_is_told_before_the_weights_are_loaded(
    door: str, flags: list[str], status: int, named: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Minutes of loading before it turns out that no question can be put, or one error for every message: here the
    weights are missing, which is found later."""
    folder = Path(
        shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    )
    assert_refused(run_here(door, "--checkpoint_dir", folder, *flags, cwd=tmp_path), status, named)


def test_instruct_samples_as_it_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """Flags, or the folder's words, that do not reach the model; tiny temperatures and an empty nucleus that are no
    greedy answer."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    flags = ["--checkpoint_dir", folder, "--prompt", "Say hi", "--max_new_tokens", 12]
    greedy = run_here("generate/instruct.py", *flags).stdout
    for more in (["--temperature", "1e-38"], ["--temperature", 1, "--top_p", 0], ["--temperature", 3, "--top_k", 1]):
        assert run_here("generate/instruct.py", *flags, *more).stdout == greedy
    drawn = run_here("generate/instruct.py", *flags, "--temperature", 1, "--num_samples", 3)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.0}')
    by_folder = run_here("generate/instruct.py", *flags)
    assert by_folder.stdout != greedy and drawn.stdout.startswith(by_folder.stdout), "the first of several is the one"
    assert "generation_config.json decides: temperature 1; flags come first" in by_folder.stderr
    assert run_here("generate/instruct.py", *flags, "--temperature", 0).stdout == greedy
    cut = run_here("generate/instruct.py", *flags, "--temperature", 0, "--stop", greedy[3:5])
    assert cut.stdout == greedy.partition(greedy[3:5])[0] + "\n"
    assert "cut off at --max_new_tokens 12" in by_folder.stderr and "cut off" not in cut.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare/delta.py", "prepare/delta.py: expected apply, make or verify as the first word"),
        ("prepare/delta.py aply --base_dir x", "as the first word, found aply; did you mean apply?"),
        ("prepare/delta.py apply --base_dir x", "--delta_dir, --destination_path are missing; --help lists all flags"),
        ("prepare/records.py --source x --destination_path y", "--tokenizer_path is missing; --help lists all flags"),
        ("finetune/lora.py --config nope.yaml", "nope.yaml does not exist (working folder: "),
        (
            "finetune/merge.py --adapter_dir rows.txt --destination_path m",
            "rows.txt is a file: give a folder with adapter",
        ),
        (
            "finetune/merge.py --adapter_dir a.gguf --destination_path m",
            "is a GGUF file: if it holds an adapter, convert",
        ),
        (
            "finetune/merge.py --adapter_dir adapter --destination_path m.gguf",
            "a folder is to be made; add --format gguf",
        ),
        ("prepare/checkpoint.py --source model --destination_path m.gguf", "a folder is to be made; add --format gguf"),
        (
            "prepare/show.py --data_dir model",
            "model is a model, expected a data folder, such as prepare/records.py makes",
        ),
        ("generate/instruct.py --checkpoint_dir model --input_file data", "give it as --data_dir data"),
        ("generate/evaluate.py --checkpoint_dir model --tasks regresion", "did you mean regression?"),
        ("finetune/lora.py --precision BF16-True", "; did you mean bf16-true?"),
        ("finetune/lora.py --quantize NF4", "expected 'nf4', 'nf4-dq', 'int8', 'fp8'; did you mean nf4?"),
        ("prepare/records.py --source x --prompt_style chatlm", "; did you mean chatml?"),
    ],
)
def test_what_was_meant_is_said(tmp_path: Path, command: str, message: str) -> None:
    """Catches the parser's own words ("argument subcommand", "apply.delta_dir"), an error of the system, and a folder
    that is called m.gguf."""
    for name in ("rows.txt", "a.gguf", "adapter/adapter_config.json", "model/config.json", "data/dataset_dict.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "data" / "meta.json").write_text("{}")
    done = run_here(*command.split(), cwd=tmp_path)
    assert done.returncode in (2, 3, 4) and message in done.stderr and done.stderr.count("\n") == 1, done
    assert not list(tmp_path.glob("m*.gguf"))
