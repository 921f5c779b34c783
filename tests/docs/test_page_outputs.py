"""Outputs that the README and docs/ show: what follows from data and seed alone is made again and compared."""

import math
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_here
from markdown_pages import commands

BASE = "checkpoints/smollm2-135m-instruct"


@pytest.mark.real
@pytest.mark.skipif(not (ROOT / BASE / "config.json").is_file(), reason=f"needs {BASE}: make demo")
@pytest.mark.parametrize("page", ["README.md", "docs/prepare.md"])
def test_preparing_the_demos_data_prints_what_pages_show(page: str, tmp_path: Path) -> None:
    """Catches counts of another data set, a line that was added or left out, and words that have changed since."""
    (shown,) = [
        command for command in commands(ROOT / page) if command.output and command.words[1] == "prepare/alpaca.py"
    ]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / BASE).symlink_to(ROOT / BASE)
    made = run_here("demo/rows.py", "--destination_path", "data/demo/demo.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    done = run_here(*shown.words[1:], cwd=tmp_path)
    assert (done.returncode, (done.stdout + done.stderr).strip()) == (0, shown.output.strip())


@pytest.mark.parametrize("page", ["README.md", "docs/finetune.md"])
def test_the_run_that_pages_show_is_the_demos(page: str) -> None:
    """Catches a number of steps, a batch or a learning rate that is not that of demo/lora.yaml."""
    (shown,) = [
        command for command in commands(ROOT / page) if command.output and command.words[1] == "finetune/lora.py"
    ]
    train = yaml.safe_load((ROOT / shown.words[3]).read_text("utf-8"))["train"]
    steps, rate = train["max_steps"], train["learning_rate"]
    warm = round(steps * train["warmup_ratio"])
    assert f"{steps} steps of {train['batch_size']}" in shown.output
    lines = re.findall(r"^step (\d+)/(\d+)  loss \S+  rate (\S+)", shown.output, flags=re.MULTILINE)
    assert len(lines) >= 3
    for step, of, said in lines:
        done = int(step) - 1
        cosine = (1 + math.cos(math.pi * (done - warm) / (steps - warm))) / 2
        wanted = rate * ((done + 1) / warm if done < warm else cosine)
        assert (int(of), float(said)) == (steps, float(f"{wanted:.2e}")), step
