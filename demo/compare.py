"""The demo's result: the same test rows answered before and after fine-tuning.

python demo/compare.py --run_dir out/lora/demo
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from lit_llama.cli import CLI


def main(*, run_dir: Path = Path("out/lora/demo"), samples: int = 3) -> None:
    """Print exact match of the parsed JSON, test loss and the share of answers that stop, and some answers.

    Args:
        run_dir: Run folder with metrics.csv, before.jsonl and after.jsonl.
        samples: Rows to show side by side.
    """
    from rich import box
    from rich.table import Table

    from lit_llama.console import harmless
    from lit_llama.generate.answer import Answer, measure
    from lit_llama.progress import stdout
    from lit_llama.text.formats import Example
    from lit_llama.train.metrics import read_metrics

    answers = {name: _read(run_dir / f"{name}.jsonl") for name in ("before", "after")}
    measures = {
        name: measure(
            [Example(row["instruction"], row["input"], row["output"]) for row in rows],
            [Answer(row["answer"], row["stopped"], 0) for row in rows],
        )
        for name, rows in answers.items()
    }
    losses = [value for _, value in read_metrics(run_dir)["test_loss"]]
    console = stdout(width=112)

    table = Table("", "before", "after", title=f"{measures['after']['rows']} test rows", box=box.SIMPLE_HEAD)
    for label, key in (
        ("exact match of the parsed JSON", "json_match"),
        ("answers that stop by themselves", "stopped"),
    ):
        table.add_row(label, *(f"{measures[name][key]:.1%}" for name in ("before", "after")))
    table.add_row("test loss per trained token", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    console.print(table, soft_wrap=False)

    shown = Table(
        "sentence", "wanted", "before", "after", title="the same question", box=box.SIMPLE_HEAD, show_lines=True
    )
    for before, after in list(zip(answers["before"], answers["after"], strict=True))[:samples]:
        texts = (before["input"], after["output"], textwrap.shorten(before["answer"], 150), after["answer"])
        shown.add_row(*map(harmless, texts))
    console.print(shown, soft_wrap=False)
    console.print(f"loss curve: {run_dir / 'loss.png'}")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


if __name__ == "__main__":
    CLI(main)
