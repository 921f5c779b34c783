"""The whole way through the scripts, as a user goes it: relative paths in a folder of one's own."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import run_here
from forked_groups import in_forks

ROWS = [
    {"instruction": f"Say the word for {i}", "input": "in French" if i % 3 else "", "output": f"mot {i % 7} é"}
    for i in range(40)
]
BASE, DATA, RUN, MERGED = "checkpoints/tiny", "data/words", "out/lora/words", "checkpoints/words"
TRAIN = ["--checkpoint_dir", BASE, "--data_dir", DATA, "--lora.r", 4, "--train.learning_rate", 0.02]
TRAIN += ["--train.batch_size", 8, "--precision", "32-true"]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = run_here(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A working folder after prepare, finetune and merge."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder, home / BASE)
    (home / DATA).mkdir(parents=True)
    (home / DATA / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")
    prepare = ["--destination_path", DATA, "--tokenizer_path", BASE, "--data_file_name", "rows.json"]
    run("prepare/alpaca.py", *prepare, "--test_split_size", 6, "--mask_inputs", True, cwd=home)
    run("finetune/lora.py", *TRAIN, "--out_dir", RUN, "--train.max_steps", 6, cwd=home)
    run("finetune/merge.py", "--adapter_dir", RUN, "--destination_path", MERGED, "--precision", "32-true", cwd=home)
    return home


def test_the_data_folder_opens_in_datasets(home: Path) -> None:
    """Splits, columns or masks that only our own reader understands."""
    import datasets
    from tokenizers import Tokenizer

    made = datasets.load_from_disk(str(home / DATA))
    assert {name: len(split) for name, split in made.items()} == {"train": 34, "test": 6}
    tokenizer = Tokenizer.from_file(str(home / BASE / "tokenizer.json"))
    answers = {row["output"] for row in ROWS}
    for row in made["train"]:
        trained = [label for label in row["labels"] if label != -100]
        assert trained[-1] == 2 and tokenizer.decode(trained) in answers
        assert row["input_ids"][-len(trained) :] == trained
    meta = json.loads((home / DATA / "meta.json").read_text())
    assert meta["source"]["rows"] == 40 and meta["splits"]["test"]["rows"] == 6
    assert len((home / DATA / "test.jsonl").read_text("utf-8").splitlines()) == 6
    assert (home / DATA / "rows.json").is_file(), "the raw file was to stay"


def test_the_run_folder_describes_the_run(home: Path) -> None:
    """A run that nobody can repeat or judge."""
    names = {path.name for path in (home / RUN).iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "meta.json", "run.yaml", "metrics.csv"}
    assert not list((home / "out" / "lora").glob(".*"))
    lines = (home / RUN / "metrics.csv").read_text().splitlines()
    assert len(lines) >= 7 and "loss" in lines[0]


def test_adapter_and_merged_model_open_elsewhere_and_agree(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that PEFT reads otherwise, or a merged model that is another one to transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(home)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    messages = [{"role": "user", "content": "Say the word for 3"}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, RUN).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (plain - adapted).abs().mean() > 0.01


def test_adapter_and_merged_model_give_the_same_answers(home: Path) -> None:
    """A style, a stop token or a scale that is lost between the two."""
    flags = ["--data_dir", DATA, "--max_new_tokens", 24, "--precision", "32-true"]
    made = {
        RUN: run("generate/instruct.py", "--checkpoint_dir", RUN, *flags, cwd=home),
        MERGED: run("generate/instruct.py", "--checkpoint_dir", MERGED, *flags, cwd=home),
    }
    assert made[RUN].stdout == made[MERGED].stdout
    rows = [json.loads(line) for line in made[RUN].stdout.splitlines()]
    wanted = [json.loads(line) for line in (home / DATA / "test.jsonl").read_text("utf-8").splitlines()]
    for row, reference in zip(rows, wanted, strict=True):
        assert (row["instruction"], row["output"]) == (reference["instruction"], reference["output"])
    assert "exact_match" in made[RUN].stderr and "rows 6" in made[RUN].stderr


def test_a_run_is_repeated_from_its_own_file(home: Path) -> None:
    """A setting that run.yaml forgets, or an adapter lost to a command typed twice."""
    refused = run_here("finetune/lora.py", "--config", f"{RUN}/run.yaml", cwd=home)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "already holds" in refused.stderr
    again = run_here("finetune/lora.py", "--config", f"{RUN}/run.yaml", "--out_dir", "out/again", cwd=home)
    assert again.returncode == 0, again.stderr
    one, other = ((home / folder / "adapter_model.safetensors").read_bytes() for folder in (RUN, "out/again"))
    assert one == other


def test_ctrl_c_in_a_run_leaves_no_adapter(home: Path) -> None:
    """An interrupted run that looks like a finished one."""
    blow = (0, 3, "SIGINT", "itself")  # ahead of the fourth step
    flags = [*TRAIN, "--out_dir", "out/stopped", "--train.epochs", 100000]
    done = in_forks("tests/struck_processes.py", *blow, "finetune/lora.py", *flags, cwd=home)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "Stopped after step 4" in done.stderr and done.stderr.rstrip().endswith("--resume auto")
    assert not list((home / "out").glob("*stopped*/adapter_*")) and not list((home / "out").glob(".*"))
