"""Flags of other programs, and the answers to them: every flag that an answer names is there."""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_here

from lit_llama.cli import _names
from lit_llama.habits import answer, entries, explain, nearest, page, plain, programs, words

DOORS = [
    str(path.relative_to(ROOT)) for place in ("prepare", "finetune", "generate") for path in ROOT.glob(f"{place}/*.py")
]


def names_of(door: str) -> set[str]:
    """The parameters of a script."""
    module = importlib.import_module(door.removesuffix(".py").replace("/", "."))
    mains = [module.main] if hasattr(module, "main") else [module.apply, module.make, module.verify]
    return {name for main in mains for name in _names(main)}


NAMES = {door: names_of(door) for door in DOORS}


def named(text: str, door: str) -> Iterator[tuple[str, str]]:
    """Each flag in an answer with the script that it belongs to: the one before it, to the end of the clause."""
    place = door
    for part in re.split(r"((?:prepare|finetune|generate)/\w+\.py|;|, and then|\()", text):
        if part in DOORS:
            place = part
        elif part in (";", "("):
            place = door if part == ";" else place
        for flag in re.findall(r"--([a-z]\w*(?:\.\w+)*)", part):
            yield place, flag


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry['doors'][0]} {next(words(entry))}")
def test_every_flag_of_an_answer_is_there(entry: dict[str, list[str]]) -> None:
    """Catches advice that was true once."""
    for door in entry["doors"]:
        for place, flag in named(str(entry["here"]), door):
            assert flag in NAMES[place], f"{door}: {entry['here']}: {place} has no --{flag}"


def test_no_word_of_others_is_a_flag_here() -> None:
    """Catches an answer that nobody can get, because the word has come to mean something here."""
    for entry in entries():
        for door in entry["doors"]:
            for word in words(entry):
                assert plain(word) == word and word not in NAMES[door], f"{door} has --{word}"


def test_each_word_has_one_answer_at_a_door() -> None:
    """Catches two answers, of which the second is never given."""
    seen: dict[tuple[str, str], str] = {}
    for entry in entries():
        for door in entry["doors"]:
            for word in words(entry):
                assert seen.setdefault((door, word), str(entry["here"])) == entry["here"], f"{door}: {word}"
    assert all(set(entry) - {"doors", "here", "also"} <= set(programs()) for entry in entries())


def test_the_words_of_peft_and_transformers_are_theirs() -> None:
    """Catches a word that was never one of theirs, against the classes themselves."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    ours = {word for entry in entries() for word in entry.get("PEFT", ())}
    assert ours - lora <= {"load_in_4bit", "load_in_8bit"} and hasattr(BitsAndBytesConfig(), "load_in_4bit")
    assert len(lora & ours) > 15
    training = {field.name for field in dataclasses.fields(TrainingArguments)}
    theirs = {word for entry in entries() for word in entry.get("TRL", ())}
    assert len(training & theirs) > 35
    missing = {"per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs"}
    assert missing <= theirs


@pytest.mark.parametrize(
    ("door", "typed", "said"),
    [
        ("finetune/lora.py", "--lr", "here --train.learning_rate"),
        ("finetune/lora.py", "--train.lr", "here --train.learning_rate"),
        ("finetune/lora.py", "--learning-rate", "here --train.learning_rate"),
        ("finetune/lora.py", "--lora_r", "here --lora.r"),
        ("finetune/lora.py", "--num_epochs", "here --train.epochs"),
        (
            "finetune/full.py",
            "--micro_batch_size",
            "here --train.micro_batch_tokens, tokens per forward pass; the batch is --train.batch_size",
        ),
        ("finetune/full.py", "--gradient_accumulation_steps", "not needed: --train.batch_size is the whole batch"),
        ("finetune/full.py", "--lora_r", "an adapter comes from finetune/lora.py --lora.r 8"),
        ("finetune/lora.py", "--train.max_seq_length", "prepare/records.py --max_seq_length"),
        ("finetune/lora.py", "eval.interval", "here --train.eval_interval"),
        ("prepare/records.py", "--cutoff_len", "here --max_seq_length"),
        ("prepare/alpaca.py", "--data_file_url", "here --data_file_name, a file in --destination_path"),
        ("prepare/delta.py", "--base-model-path", "here --base_dir"),
        ("generate/chat.py", "--max_tokens", "here --max_new_tokens"),
        ("finetune/merge.py", "--export_dir", "here --destination_path"),
    ],
)
def test_answers(door: str, typed: str, said: str) -> None:
    """Catches a habit that is met with the nearest flag by its letters."""
    found = answer(door, typed)
    assert found is not None and said in found
    assert explain(door, [typed], NAMES[door]) == f"{typed}: {found}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--train.epoch", "train.epochs"),
        ("--trian.patience", "train.patience"),
        ("--learning_rte", "train.learning_rate"),
        ("--ot_dir", "out_dir"),
        ("--lor", None),
        ("--x", None),
        ("--keeps", "train.keep"),
    ],
)
def test_the_nearest_is_near(typed: str, meant: str | None) -> None:
    """Catches a guess by the group's letters (--train.seed: train.keep), or by two letters (--lr: lora)."""
    assert nearest(typed, NAMES["finetune/lora.py"]) == meant


def test_a_name_of_ours_in_the_wrong_place() -> None:
    """Catches a flag that is there, and is not named."""
    known = NAMES["finetune/lora.py"]
    assert explain("finetune/lora.py", ["--train.seed", "--data-dir", "--patience"], known) == (
        "--train.seed: here --seed. --data-dir: here --data_dir. --patience: here --train.patience"
    )


def test_a_configuration_of_another_program_is_answered_at_once(tmp_path: Path) -> None:
    """Catches an answer for each run, key by key, and keys in groups that are passed over. Through the door."""
    (tmp_path / "theirs.yaml").write_text(
        "base_model: x\nmicro_batch_size: 2\nfsdp_config:\n  offload_params: true\neval:\n  interval: 3\n"
        "train:\n  global_batch_size: 3\nlora:\n  rank_pattern:\n    q_proj: 3\nmade_up: 3\n"
    )
    done = run_here("finetune/lora.py", "--config", "theirs.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for said in (
        "base_model in theirs.yaml: here --checkpoint_dir, a folder;",
        "micro_batch_size in theirs.yaml: here --train.micro_batch_tokens",
        "fsdp_config in theirs.yaml: here --strategy ddp or fsdp",
        "eval.interval in theirs.yaml: here --train.eval_interval",
        "train.global_batch_size in theirs.yaml: here --train.batch_size",
        "made_up in theirs.yaml is nothing that finetune/lora.py knows; --help lists what there is",
    ):
        assert said in done.stderr
    assert "q_proj" not in done.stderr
    done = run_here("finetune/lora.py", "--bf16", "--lr=1")
    assert done.stderr == (
        "error: --bf16: here --precision: bf16-true, bf16-mixed, 16-mixed or 32-true; auto is what the hardware is "
        "fast at. --lr: here --train.learning_rate\n"
    )


@pytest.mark.parametrize(
    ("door", "flag", "said"),
    [
        ("generate/chat.py", "--temp", "here --temperature; 0 takes"),
        ("generate/base.py", "--sys-prompt", "generate/chat.py --system"),
        ("prepare/delta.py", "--delta-path", "here --delta_dir"),
        ("finetune/merge.py", "--base_model", "--base_dir names it"),
    ],
)
def test_every_kind_of_door_knows_which_it_is(door: str, flag: str, said: str) -> None:
    """Catches a script whose function is made by another file, or is one of several."""
    done = run_here(door, *(["apply"] if "delta" in door else []), f"{flag}=x")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {flag}: ") and said in done.stderr, done.stderr


@pytest.mark.parametrize(("text", "found"), [("train: 3\n", "3"), ("train:\n", "None"), ("lora: [1]\n", "[1]")])
def test_a_value_in_place_of_a_group(tmp_path: Path, text: str, found: str) -> None:
    """Catches a traceback of the parser."""
    (tmp_path / "c.yaml").write_text(text)
    done = run_here("finetune/lora.py", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2 and f"in c.yaml is {found}, expected settings of its own, such as" in done.stderr


def test_the_page_is_made_of_the_table() -> None:
    """Catches a page that says something else than the scripts."""
    written = (ROOT / "docs" / "coming-from.md").read_text("utf-8")
    assert written == page(), "make it again: python docs/coming_from.py > docs/coming-from.md"
    for program in programs():
        assert f"## Coming from {program}\n" in written


@pytest.mark.parametrize("text", ["lora:\n  alpha: null\n", "train: {epochs: null}\n", "seed: null\n"])
def test_null_in_place_of_a_value(text: str, tmp_path: Path) -> None:
    """Catches a comparison with nothing, deep in a configuration."""
    (tmp_path / "c.yaml").write_text(text)
    done = run_here("finetune/lora.py", "--config", "c.yaml", "--checkpoint_dir", "x", cwd=tmp_path)
    name = {"l": "lora.alpha", "t": "train.epochs", "s": "seed"}[text[0]]
    assert (done.returncode, done.stderr) == (2, f"error: {name} in c.yaml is null, expected a value\n")
