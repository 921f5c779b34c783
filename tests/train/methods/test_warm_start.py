"""Runs that begin with an adapter: its values, shape and base, and what does not fit is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import run_here, tiny_model, write_adapter
from safetensors.torch import load_file, save_file
from small_runs import LORA, TWELVE, Killed, outcome, run, stop_after
from small_runs import twenty_rows as twenty_rows  # a fixture
from tiny_families import MODELS, SHAPE, write_model

from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.manifest import MANIFEST
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, META_FILE, WEIGHTS_FILE, read_adapter_config
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.train.methods.method import LoRA
from lit_llama.train.methods.warm_start import read_start
from lit_llama.train.run import RUN_FILE
from lit_llama.train.state import STATES_DIR

FOUR = replace(TWELVE, max_steps=4, save_interval=2)


@pytest.fixture(scope="module")
def first(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of four steps. Do not change it."""
    lora = replace(LORA, r=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    return run(tiny_folder, data, tmp_path_factory.mktemp("first") / "first", lora, FOUR)


def flags(data: Path, out: Path, **changes: Any) -> list[object]:
    """The command line of a run of FOUR."""
    given: list[object] = ["--data_dir", data, "--out_dir", out, "--seed", 0, "--precision", "32-true"]
    for name, value in replace(FOUR, **changes).__dict__.items():
        given += [] if value is None else [f"--train.{name}", value]
    return given


def test_it_begins_where_the_adapter_ended(first: Path, data: Path, tmp_path: Path) -> None:
    """Catches a random start, a shape of the flags' defaults, and a base that has to be typed again."""
    out = tmp_path / "second"
    done = run_here("finetune/lora.py", "--adapter_dir", first, *flags(data, out))
    assert done.returncode == 0, done.stderr
    before = load_file(first / WEIGHTS_FILE)
    begun = load_file(out / STATES_DIR / "step-000002" / WEIGHTS_FILE)
    assert begun.keys() == before.keys()
    lines = (first / "metrics.csv").read_text().splitlines(), (out / "metrics.csv").read_text().splitlines()
    ended, starts = lines[0][-1].split(","), lines[1][1].split(",")
    assert starts[4] == ended[4], "the test loss of its step 0 is that of the adapter's last"
    assert read_adapter_config(out) == read_adapter_config(first)
    settings = yaml.safe_load((out / RUN_FILE).read_text())
    assert settings["adapter_dir"] == str(first) and settings["lora"]["r"] == 3
    assert f"as {first} left them" in done.stderr.replace("\n", " ")


def test_a_stopped_run_goes_on_with_the_same_bytes(
    first: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a state whose values the adapter writes over, and a command that no longer knows where it began."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_here("finetune/lora.py", "--adapter_dir", first, *flags(data, whole)).returncode == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            run_here("finetune/lora.py", "--adapter_dir", first, *flags(data, out))
    again = run_here("finetune/lora.py", "--config", out / RUN_FILE, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert outcome(out) == outcome(whole)


def test_another_adapter_under_the_same_name_is_refused(first: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that goes on as another one."""
    start, out = Path(shutil.copytree(first, tmp_path / "start")), tmp_path / "out"
    assert run_here("finetune/lora.py", "--adapter_dir", start, *flags(data, out)).returncode == 0
    (out / CONFIG_FILE).unlink()
    (start / MANIFEST).unlink()
    save_file({name: value * 2 for name, value in load_file(start / WEIGHTS_FILE).items()}, start / WEIGHTS_FILE)
    again = run_here("finetune/lora.py", "--config", out / RUN_FILE, "--resume", "auto")
    assert again.returncode == 2 and "the adapter (fingerprint) was" in again.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}},
        {"target_modules": r".*\.1\..*[vo]_proj", "use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
)
def test_an_adapter_of_peft_is_taken_with_its_values(
    settings: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches names that only our own files have; PEFT's logits, computed by PEFT, are those at the start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    twin = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **settings)).eval()
    twin.save_pretrained(tmp_path)
    config, start = read_start(tmp_path, tiny_folder, LoRAConfig(dropout=0.1))
    assert (config.r, config.alpha, config.dropout) == (3, 5, 0.1)
    model = load_model(tiny_folder, "cpu", torch.float32)
    method = LoRA(config, start)
    method.apply(model)
    method.begin(model)
    ids = torch.arange(5, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), twin(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_the_modules_of_the_files_decide(first: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches modules that the settings name and the files lack, which would begin at random, or not at all."""
    start = Path(shutil.copytree(first, tmp_path / "start"))
    kept = {name: value for name, value in load_file(start / WEIGHTS_FILE).items() if ".layers.1." in name}
    save_file(kept, start / WEIGHTS_FILE)
    config, begun = read_start(start, tiny_folder, LoRAConfig())
    assert sorted(config.targets) == ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert len(begun.values) == 4 and config.shape_of("model.layers.1.mlp.up_proj")[0] == 2


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (["--lora.r", 16], 2, "--lora.r is 16, but the adapter of"),
        (["--lora.target_modules", "q_proj"], 2, "--lora.target_modules is ['q_proj'], but the adapter of"),
        (["--checkpoint_dir", "other"], 6, "other is not the base that first was trained on"),
        (["--checkpoint_dir", "first"], 2, "make it part of its base first, with python finetune/merge.py"),
    ],
)
def test_what_does_not_fit_is_refused(
    given: list[object], status: int, message: str, first: Path, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches settings that are ignored, an adapter on another base than its own, and one in place of a base."""
    shutil.copytree(first, tmp_path / "first")
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    save_file(tiny_model(seed=9).state_dict(), other / "model.safetensors", {"format": "pt"})
    done = run_here("finetune/lora.py", "--adapter_dir", "first", *flags(data, Path("out")), *given, cwd=tmp_path)
    assert done.returncode == status and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("door", "given", "message"),
    [
        ("lora", ["--checkpoint_dir", "first"], "is an adapter and no model: give it as --adapter_dir first to go on"),
        ("full", ["--checkpoint_dir", "first"], "is an adapter and no model: make it part of its base first, with"),
        ("lora", [], "--checkpoint_dir is missing"),
    ],
)
def test_a_base_is_needed(door: str, given: list[object], message: str, first: Path, tmp_path: Path) -> None:
    """Catches a message about a file, where there is a way to do what was meant."""
    shutil.copytree(first, tmp_path / "first")
    done = run_here(f"finetune/{door}.py", *given, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_base_that_was_quantised_is_quantised_again(first: Path, data: Path, tmp_path: Path) -> None:
    """Catches an adapter that goes on on another base than it has learned to work with, and nothing said."""
    start = Path(shutil.copytree(first, tmp_path / "start"))
    (start / MANIFEST).unlink()
    meta = json.loads((start / META_FILE).read_text())
    meta["base"]["quantize"] = "int8"
    (start / META_FILE).write_text(json.dumps(meta))
    planned = run_here("finetune/lora.py", "--adapter_dir", start, *flags(data, tmp_path / "out"), "--plan")
    assert planned.returncode == 0 and "frozen, int8" in planned.stdout, planned
    assert "was trained on a base in int8, and goes on so" in planned.stderr


def test_another_prompt_style_is_remarked(first: Path, data: Path, tmp_path: Path) -> None:
    """Catches a result that is asked in another way than its first half was trained, without a word."""
    start = Path(shutil.copytree(first, tmp_path / "start"))
    (start / MANIFEST).unlink()
    (start / "chat_template.jinja").write_text("{{ messages }}")
    planned = run_here("finetune/lora.py", "--adapter_dir", start, *flags(data, tmp_path / "out"), "--plan")
    assert "has another prompt style than" in planned.stderr.replace("\n", " ")


def test_the_flags_may_repeat_what_the_adapter_has(first: Path, tiny_folder: Path) -> None:
    """Catches a run file that its own door refuses."""
    config, _ = read_start(first, tiny_folder, LoRAConfig())
    assert read_start(first, tiny_folder, config)[0] == config
    with pytest.raises(UserError, match=r"--lora\.alpha is 5"):
        read_start(first, tiny_folder, replace(config, alpha=5))


def test_all_linear_layers_are_those_of_linear_attention_too(tmp_path: Path) -> None:
    """Catches flags that leave linear attention out, taken for an adapter that has it."""
    base = tmp_path / "base"
    write_model(base, SHAPE | MODELS["qwen3_5"][0])
    every = read_start(write_adapter(tmp_path / "every", base), base, LoRAConfig())[0]
    names = [name for name in every.targets if not name.startswith("in_proj")]
    with pytest.raises(UserError, match="leave it out"):
        read_start(tmp_path / "every", base, LoRAConfig(target_modules=names))
    read_start(tmp_path / "every", base, LoRAConfig(target_modules=every.targets))


def test_what_cannot_go_on_training_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches rows that stay as they are without a word, and an update that is scaled by 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for settings, message in (
        ({"lora_alpha": 4, "trainable_token_indices": {"embed_tokens": [5, 6]}}, "which cannot go on training here"),
        ({"lora_alpha": 0}, r"cannot go on training: --lora\.alpha is 0"),
    ):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
        get_peft_model(base, config).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            read_start(tmp_path, tiny_folder, LoRAConfig())
