"""Test loss after LoRA runs at the default learning rate, at `auto`, and at the one that short runs find.

python benchmarks/learning_rate.py --out learning_rate

Each data set is cut to the rows that the steps need; the runs differ in nothing but the rate.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from lit_llama.cli import CLI
from lit_llama.errors import UserError

ROOT = Path(__file__).parent.parent
SETS = {"alpaca": "alpaca_en_demo.json", "gsm8k": "gsm8k_train.json", "demo": ""}
"""Files in ../shared/data; the rows of the demo are generated."""
FIXED = 3e-4
WAYS = ("fixed", "auto", "found")


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    only: list[str] | None = None,
    steps: int = 100,
    batch_size: int = 2,
    test_rows: int = 48,
    max_seq_length: int = 160,
    seed: int = 1337,
    work_dir: Path = Path("build/benchmark-learning-rate"),
    out: Path | None = None,
) -> None:
    """Train on three data sets at three learning rates each, and print the test losses.

    Args:
        checkpoint_dir: Base model.
        only: Names of data sets: alpaca, gsm8k, demo.
        steps: Optimizer steps of each run.
        batch_size: Samples per optimizer step.
        test_rows: Rows held out of each data set.
        max_seq_length: Longer rows are left out.
        seed: Of split, order and adapter.
        work_dir: Folder to make for data and runs.
        out: Writes OUT.json.
    """
    if unknown := set(only or ()) - set(SETS):
        raise UserError(f"--only names {', '.join(sorted(unknown))}, expected {', '.join(SETS)}")
    work_dir.mkdir(parents=True, exist_ok=False)
    rows, train = steps * batch_size, {"max_steps": steps, "batch_size": batch_size, "eval_interval": steps}
    results: dict[str, Any] = {}
    for name in only or SETS:
        folder = work_dir / name
        data = _prepared(name, folder, checkpoint_dir, rows, test_rows, max_seq_length)
        results[name] = _compared(checkpoint_dir, data, folder, train | {"sample_prompts": 0, "epochs": 1}, seed)
        print("\n".join(lines(name, results[name])), flush=True)
    if out:
        settings = {"steps": steps, "batch_size": batch_size, "test_rows": test_rows, "seed": seed}
        found = {"settings": settings, "results": results}
        out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _prepared(name: str, folder: Path, checkpoint_dir: Path, rows: int, test_rows: int, max_seq_length: int) -> Path:
    """A data folder of so many rows to train on, and others to test on."""
    import lit_llama

    folder.mkdir()
    if SETS[name]:
        found = json.loads((ROOT.parent / "shared" / "data" / SETS[name]).read_text("utf-8"))
    else:
        found = runpy.run_path(str(ROOT / "demo" / "rows.py"))["generate_rows"](4000, 42)
    # Some are left out for their length, or as they ask what another does.
    taken = found[: 2 * (rows + test_rows)]
    (folder / "rows.json").write_text(json.dumps(taken), "utf-8")
    lit_llama.prepare(
        folder / "rows.json",
        folder / "data",
        checkpoint_dir,
        prompt_style="chatml",
        max_seq_length=max_seq_length,
        split="shuffle",
        test_split_size=test_rows,
        mask_inputs=True,
    )
    return folder / "data"


def _compared(
    checkpoint_dir: Path, data: Path, folder: Path, train: Mapping[str, Any], seed: int
) -> dict[str, dict[str, Any]]:
    """Rate, test losses and CPU seconds of each way to choose the rate."""
    import lit_llama
    from lit_llama.train.config import RunConfig, TrainConfig
    from lit_llama.train.methods.method import LoRA
    from lit_llama.train.rate_search import find_learning_rate

    config = RunConfig(
        checkpoint_dir=checkpoint_dir, data_dir=data, out_dir=folder / "found", train=TrainConfig(**train), seed=seed
    )
    results: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        began, trials = time.process_time(), []
        rate: float | str = FIXED if way == "fixed" else "auto"
        if way == "found":
            search = find_learning_rate(LoRA(config.lora), config)
            rate = search.chosen.rate
            trials = [[trial.rate, trial.loss, trial.test_loss] for trial in search.trials]
        searched = time.process_time() - began
        run = lit_llama.finetune(
            checkpoint_dir, data, folder / way, train=dict(train) | {"learning_rate": rate}, seed=seed
        )
        losses = list(run.test_losses.values())
        results[way] = {
            "rate": _rate(folder / way),
            "before": losses[0],
            "after": losses[-1],
            "trials": trials,
            "search_seconds": searched,
            "seconds": time.process_time() - began - searched,
        }
        print(f"{os.path.basename(folder)} {way}: {results[way]}", file=sys.stderr, flush=True)
    return results


def _rate(folder: Path) -> float:
    """The learning rate that a run had, as run.yaml says."""
    import yaml

    rate: float = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))["train"]["learning_rate"]
    return rate


def lines(name: str, results: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Return the table of a data set: rate, test losses, and how far each lies from that of the fixed rate."""
    fixed = results["fixed"]["after"]
    head = f"{name:10}{'rate':>9}{'before':>9}{'after':>9}{'to fixed':>10}{'CPU s':>8}{'search':>8}"
    return [head] + [
        f"{way:10}{run['rate']:9.1e}{run['before']:9.4f}{run['after']:9.4f}{run['after'] / fixed - 1:10.1%}"
        f"{run['seconds']:8.0f}{run['search_seconds']:8.0f}"
        for way, run in results.items()
    ]


if __name__ == "__main__":
    CLI(main)
