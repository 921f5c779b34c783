"""The learning rate `auto`: the rule against numbers worked out by hand, and what becomes of it in a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_here, tiny_config
from small_runs import LORA, SHORT, Killed, outcome, run, stop_after
from small_runs import twenty_rows as twenty_rows  # a fixture

import lit_llama
from lit_llama.errors import UserError
from lit_llama.model.config import LoRAConfig
from lit_llama.train.config import RUN_FILE, PreferenceConfig, RunConfig, TrainConfig
from lit_llama.train.methods.method import Full, LoRA, Preference
from lit_llama.train.rate import BOUNDS, check_auto, rule
from lit_llama.train.run import finetune
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

pytestmark = pytest.mark.usefixtures("one_core")

AUTO = replace(SHORT, learning_rate="auto")
THEIRS = LoRAConfig(r=16, alpha=32)
"""The scale with which the rule was found."""


@pytest.mark.parametrize(
    ("family", "width", "steps", "lora", "expected"),
    [
        # 5e-4 (2000 / 2048)^0.781 = 5e-4 * 0.98165, and so on: powers from a table of logarithms.
        ("llama", 2048, 500, THEIRS, 4.9e-4),
        ("llama", 4096, 500, THEIRS, 2.9e-4),
        ("llama", 8192, 500, THEIRS, 1.7e-4),
        ("llama", 576, 500, THEIRS, 1.3e-3),
        ("qwen3", 4096, 500, THEIRS, 4.7e-4),
        ("qwen2", 5120, 500, THEIRS, 4.6e-4),
        # Fifteen in place of ten before the hundredth step.
        ("llama", 2000, 99, THEIRS, 7.5e-4),
        ("llama", 2000, 100, THEIRS, 5.0e-4),
        # A tenth for all weights, however long the run.
        ("llama", 2000, 99, None, 5.0e-5),
        ("llama", 4096, 500, None, 2.9e-5),
        # alpha x rate stays, and the rank does not matter unless the update is scaled by its root: 16 * sqrt(16) = 64.
        ("llama", 2000, 500, LoRAConfig(r=8, alpha=16), 1.0e-3),
        ("llama", 2000, 500, LoRAConfig(r=64, alpha=16), 1.0e-3),
        ("llama", 2000, 500, LoRAConfig(r=16, alpha=16, use_rslora=True), 2.5e-4),
        ("llama", 2000, 500, LoRAConfig(r=16, alpha=32, loraplus_lr_ratio=4), 1.3e-4),
        # Of a family that nobody has measured, the lower of both rates: narrow 5e-4 * 2^0.0775, wide 5e-4 * 0.25^0.781.
        ("granite", 1000, 500, THEIRS, 5.3e-4),
        ("granite", 8000, 500, THEIRS, 1.7e-4),
        # Never outside what is met in practice.
        ("llama", 64, 500, LoRAConfig(r=8, alpha=1), BOUNDS["lora"][1]),
        ("llama", 8192, 500, LoRAConfig(r=8, alpha=2048), BOUNDS["lora"][0]),
        ("llama", 32, 500, None, BOUNDS["full"][1]),
    ],
)
def test_the_rule_is_the_published_one(
    family: str, width: int, steps: int, lora: LoRAConfig | None, expected: float
) -> None:
    """Catches an exponent of another family, a factor the wrong way round, and alpha taken for the rank."""
    config = replace(tiny_config(), model_type=family, hidden_size=width)
    assert rule(config, steps, lora)[0] == pytest.approx(expected, rel=1e-9)


def test_a_run_keeps_the_number(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches `auto` in run.yaml, of which a run that goes on would make another number, and one that is not trained
    with. Ten rows of four a step make runs of a few steps; 64 wide, alpha 4: far above the bound."""
    out = run(tiny_folder, data, tmp_path / "out", train=AUTO)
    written = yaml.safe_load((out / RUN_FILE).read_text())
    assert written["train"]["learning_rate"] == BOUNDS["lora"][1]
    state = json.loads((find_states(out / STATES_DIR)[-1] / STATE_FILE).read_text())
    assert state["identity"]["--train.learning_rate"] == BOUNDS["lora"][1]
    named = run(tiny_folder, data, tmp_path / "named", train=replace(SHORT, learning_rate=BOUNDS["lora"][1]))
    assert outcome(out)["result"] == outcome(named)["result"]


def test_a_run_goes_on_with_the_rate_that_it_began_with(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a rate that is worked out anew: a run that is made longer has another factor, and would be refused, or
    jump. By `auto` again and by run.yaml, the result is that of a run that was never stopped."""
    alpha = LoRAConfig(r=2, alpha=512)
    short, long = replace(AUTO, save_interval=1, schedule="constant"), replace(AUTO, schedule="constant", epochs=21)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        run(tiny_folder, data, out, alpha, short)
    run(tiny_folder, data, out, alpha, short, resume="auto")
    whole = run(tiny_folder, data, tmp_path / "whole", alpha, short)
    assert outcome(out)["result"] == outcome(whole)["result"]
    rate = yaml.safe_load((out / RUN_FILE).read_text())["train"]["learning_rate"]
    config = tiny_config()
    assert rate == rule(config, 5, alpha)[0] != rule(config, 105, alpha)[0], "the rates differ by the length"
    capsys.readouterr()
    run(tiny_folder, data, out, alpha, replace(long, max_steps=6), resume="auto")
    assert f"learning rate {rate:.1e}: auto, as the run began" in capsys.readouterr().err
    assert yaml.safe_load((out / RUN_FILE).read_text())["train"]["learning_rate"] == rate


def test_all_weights_have_a_rate_of_their_own(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches the rate of adapters, ten times too high, for all weights."""
    train = replace(AUTO, max_steps=1)
    config = RunConfig(
        checkpoint_dir=tiny_folder, data_dir=data, out_dir=tmp_path / "out", train=train, precision="32-true"
    )
    finetune(Full(), config)
    written = yaml.safe_load((tmp_path / "out" / RUN_FILE).read_text())
    assert written["train"]["learning_rate"] == rule(tiny_config(), 1, None)[0]


def test_a_plan_shows_the_rate(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a plan that stumbles over `auto`, or keeps the number to itself."""
    flags: list[object] = ["--data_dir", data, "--out_dir", tmp_path / "out", "--plan", "--train.learning_rate", "auto"]
    made = run_here("finetune/lora.py", "--checkpoint_dir", tiny_folder, *flags, "--lora.alpha", 512)
    assert made.returncode == 0, made.stderr
    assert f"learning rate {rule(tiny_config(), 6, LoRAConfig(alpha=512))[0]:.1e}: auto, " in made.stderr
    without = run_here("finetune/lora.py", *flags)
    assert without.returncode == 2 and "--checkpoint_dir is missing" in without.stderr


@pytest.mark.parametrize(
    ("method", "train", "named"),
    [
        (Preference(LORA, preference=PreferenceConfig()), {}, "preference training"),
        (LoRA(replace(LORA, modules_to_save=["norm"])), {}, "modules_to_save"),
        (LoRA(LORA), {"optimizer": "sgd"}, "Adam"),
    ],
)
def test_where_the_rule_does_not_hold_auto_is_refused(method: Any, train: dict[str, Any], named: str) -> None:
    """Catches a rate for what it was not measured with: ten and more times too high, or of another kind."""
    with pytest.raises(UserError, match=named):
        check_auto(method, TrainConfig(learning_rate="auto", **train))
    check_auto(method, TrainConfig(**train))


def test_dpo_refuses_auto_before_it_reads_anything(tmp_path: Path) -> None:
    """Catches a refusal in the middle of the work, and one only in a command."""
    with pytest.raises(UserError, match="no published rule for preference training"):
        lit_llama.finetune(
            tmp_path / "none", tmp_path / "none", tmp_path / "out", method="dpo", train={"learning_rate": "auto"}
        )


def test_a_word_that_is_no_rate_is_refused() -> None:
    """Catches a second word that passes for `auto`."""
    with pytest.raises(UserError, match="learning_rate is fast, expected a number or 'auto'"):
        lit_llama.finetune("none", "none", "none", train={"learning_rate": "fast"})
