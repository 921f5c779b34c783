"""Training on a quantised base through the scripts, with what is made of the adapter afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_here
from safetensors.torch import load_file

from lit_llama.generate.llm import load
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.quantize import through

pytest.importorskip("bitsandbytes")
ROWS = [{"instruction": f"Say the word for {i}", "input": "", "output": f"mot {i % 7}"} for i in range(24)]
IDS = torch.arange(3, 40)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A working folder after prepare and three steps on nf4."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder, home / "base")
    (home / "data").mkdir()
    (home / "data" / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    flags = ["--destination_path", "data", "--tokenizer_path", "base", "--data_file_name", "rows.json"]
    made = run_here("prepare/alpaca.py", *flags, "--test_split_size", 4, cwd=home)
    assert made.returncode == 0, made.stderr
    train(home, "run", "--quantize", "nf4", "--train.neftune_noise_alpha", 5, "--lora.loraplus_lr_ratio", 4)
    return home


def train(home: Path, out: str, *flags: object) -> str:
    common = ["--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", out, "--precision", "32-true"]
    common += ["--lora.r", 4, "--train.max_steps", 3, "--train.batch_size", 4, "--train.learning_rate", 0.05]
    made = run_here("finetune/lora.py", *map(str, [*common, *flags]), cwd=home)
    assert made.returncode == 0, made.stderr
    return made.stderr


def merge(home: Path, out: str, destination: str, *flags: str) -> str:
    common = ["--adapter_dir", out, "--destination_path", destination, "--precision", "32-true"]
    made = run_here("finetune/merge.py", *common, *flags, cwd=home)
    assert made.returncode == 0, made.stderr
    return made.stderr


def test_the_run_records_how_its_base_was_held(home: Path) -> None:
    """Catches an adapter that nobody can put back on what it was trained on."""
    assert json.loads((home / "run" / "meta.json").read_text())["base"]["quantize"] == "nf4"
    settings = yaml.safe_load((home / "run" / "run.yaml").read_text())
    assert settings["quantize"] == "nf4" and settings["lora"]["loraplus_lr_ratio"] == 4
    assert settings["train"]["neftune_noise_alpha"] == 5


def test_a_merge_is_by_default_onto_what_was_trained_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the update added to the stored weights: litgpt's loss of 0.5 in training and 2.5 after."""
    said = merge(home, "run", "merged")
    assert "nf4 moves the logits of the base" in said and "--onto" not in said
    monkeypatch.chdir(home)
    base, adapter = load_file("base/model.safetensors"), load_file("run/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    wanted = through(base[f"{name}.weight"], "nf4") + 16 / 4 * b @ a
    torch.testing.assert_close(load_file("merged/model.safetensors")[f"{name}.weight"], wanted, atol=1e-6, rtol=1e-6)
    spoken = load(Path("run"), precision="32-true", packed=False).model(IDS)
    torch.testing.assert_close(load_model(Path("merged"))(IDS), spoken, atol=1e-3, rtol=1e-3)
    assert json.loads((home / "merged" / "meta.json").read_text())["onto"] == "nf4"


def test_another_choice_is_made_and_told(home: Path) -> None:
    """Catches a choice that is not heard, and one whose price is not said."""
    said = merge(home, "run", "stored", "--onto", "stored")
    assert "trained on the base quantised to nf4; merged onto it as it is stored" in said
    assert json.loads((home / "stored" / "meta.json").read_text())["onto"] == "stored"


@pytest.mark.parametrize("method", ["nf4-dq", "int8"])
def test_the_other_ways_train_too(home: Path, method: str) -> None:
    """Catches a method that the flag offers and no run survives, also with DoRA and a whole head."""
    said = train(
        home, f"run-{method}", "--quantize", method, "--lora.use_dora", "true", "--lora.modules_to_save", "lm_head"
    )
    assert f"base in {method} on cpu" in said
    merge(home, f"run-{method}", f"merged-{method}")


@pytest.mark.parametrize("flags", [[], ["--quantize", "stored"], ["--quantize", "int8"]])
def test_the_adapter_answers(home: Path, flags: list[str]) -> None:
    """Catches a base that is loaded otherwise than asked for."""
    ask = ["--checkpoint_dir", "run", "--prompt", "Say the word for 3", "--max_new_tokens", "4"]
    said = run_here("generate/instruct.py", *ask, "--precision", "32-true", *flags, cwd=home)
    assert said.returncode == 0, said.stderr
    how = {"stored": "float32 on cpu", "int8": "int8 and float32 on cpu"}.get(flags[-1] if flags else "")
    assert (how or "nf4 and float32 on cpu") in said.stderr


def test_a_copy_of_a_quantised_layer_is_refused(home: Path) -> None:
    """Catches a layer trained in four bits, which cannot take small steps."""
    flags = ["--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", "no", "--quantize", "nf4"]
    flags += ["--lora.target_modules", "q_proj", "--lora.modules_to_save", "up_proj"]
    refused = run_here("finetune/lora.py", *flags, cwd=home)
    assert refused.returncode == 2 and "in full precision" in refused.stderr and not (home / "no").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora.r", "0"], "--lora.r is 0"),
        (["--lora.target_modules", "q_porj"], "did you mean q_proj"),
        (["--lora.rank_pattern", '{"v_porj": 4}'], "did you mean v_proj"),
        (["--lora.modules_to_save", "lm_haed"], "did you mean lm_head"),
        (["--lora.use_dora", "true", "--lora.target_modules", "embed_tokens"], "--lora.use_dora"),
        (["--train.neftune_noise_alpha", "-1"], "--train.neftune_noise_alpha"),
        (["--quantize", "nf5"], "nf5"),
    ],
)
def test_settings_that_cannot_be_are_one_line(home: Path, flags: list[str], named: str) -> None:
    """Catches a traceback, or a run with other settings than asked for."""
    common = ["--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", "no"]
    refused = run_here("finetune/lora.py", *common, *flags, cwd=home)
    assert refused.returncode == 2 and named in refused.stderr, refused.stderr
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1 and not (home / "no").exists()
