"""Loss, speed and memory of bases in fewer bits: the same LoRA run of ours on each, and each as generation holds it.

python benchmarks/bases.py --out bases

Held-out losses are computed in float32 on the base that was trained on.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.training.compare import agreement, speed
from benchmarks.training.contest import FILES, Contest, Run, Settings
from benchmarks.training.process import check_idle
from benchmarks.training.rows import IGNORE_INDEX, Rows
from lit_llama.cli import CLI

BASES = {"float32": "", "bfloat16": "", "int8": "int8", "fp8": "fp8", "nf4": "nf4", "nf4-dq": "nf4-dq"}
"""How each is named in --quantize."""
EXACT = "float32"


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    files: list[Path] | None = None,
    rows: int = 512,
    held_out: int = 64,
    max_seq_length: int = 1024,
    steps: int = 50,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    seed: int = 1337,
    work_dir: Path = Path("build/benchmark-train"),
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
) -> None:
    """Train on a base in float32, in bfloat16, and on each that --quantize makes of it, computing in bfloat16.

    Args:
        checkpoint_dir: Base model.
        files: Rows as JSON arrays or JSON lines; those of ../shared/data if left out.
        rows: To train on, from each file; what the steps do not reach only takes part in the order.
        held_out: Rows behind them, of all files together, for the loss before and after training.
        max_seq_length: Longer rows are left out.
        steps: Optimizer steps of each run.
        batch_size: Samples per optimizer step.
        learning_rate: Constant.
        seed: Of split, order and adapter.
        work_dir: Folder for rows, logs and adapters.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json and OUT.png.
    """
    check_idle(warn=when_busy == "warn")
    settings = Settings(
        checkpoint_dir=checkpoint_dir,
        files=files or FILES,
        rows=rows,
        held_out=held_out,
        max_seq_length=max_seq_length,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    contest = Contest(settings, Path(), work_dir)
    runs: dict[str, Run] = {}
    for name, quantize in BASES.items():
        print(f"training on {name}", file=sys.stderr)
        runs[name] = contest.train_on(quantize, "32-true" if name == EXACT else "bf16-true")
    lines = _lines(contest.rows, checkpoint_dir, runs)
    print(_table(lines))
    generating = _generating(contest.rows, checkpoint_dir)
    if out:
        result = {"settings": asdict(settings), "results": lines, "generation": generating, "runs": runs}
        out.with_suffix(".json").write_text(json.dumps(result, indent=2, default=str) + "\n", "utf-8")
        _plot(lines, out.with_suffix(".png"), f"LoRA on {checkpoint_dir.name}, {batch_size} samples a step")


def _generating(rows: Rows, checkpoint_dir: Path) -> list[dict[str, Any]]:
    """Loss of the base as generation holds its weights, printed."""
    from benchmarks.generation.losses import held_out_losses, table

    found = held_out_losses(checkpoint_dir, ((ids, labels) for ids, labels in rows.held_out), IGNORE_INDEX)
    print(f"\n{table(found)}")
    return found


def _lines(rows: Rows, checkpoint_dir: Path, runs: dict[str, Run]) -> list[dict[str, Any]]:
    steps = range(len(rows.steps))
    counted = {
        "samples": sum(len(rows.steps[step]) for step in steps[2:]),
        "trained_tokens": sum(rows.trained_tokens(step) for step in steps[2:]),
        "tokens": sum(rows.tokens(step) for step in steps[2:]),
    }
    held = {name: _held_out(checkpoint_dir, Path(run["adapter"]), BASES[name], rows) for name, run in runs.items()}
    exact = runs[EXACT]["losses"]
    return [
        {
            "base": name,
            "before": held[name][0],
            "after": held[name][1],
            "losses": run["losses"],
            **asdict(agreement(run["losses"], held[name][1], exact, held[EXACT][1])),
            **asdict(speed([run], warmup=2, **counted)),
        }
        for name, run in runs.items()
    ]


def _held_out(checkpoint_dir: Path, adapter: Path, quantize: str, rows: Rows) -> tuple[float, float]:
    """Loss of the base and with the adapter on it, on the rows that are held out."""
    import torch  # here: what this process holds would count towards the peak of those it starts

    from lit_llama.model.adapters.peft_folder import load_adapter
    from lit_llama.model.files.checkpoint import load_model
    from lit_llama.train.loss import TokenLoss

    model = load_model(checkpoint_dir, dtype=torch.float32, quantize=quantize or None)  # type: ignore[arg-type]
    losses = []
    for _ in range(2):
        loss_of, total, count = TokenLoss(model).eval(), 0.0, 0
        with torch.no_grad():
            for ids, labels in rows.held_out:
                select = torch.from_numpy((labels[1:] != IGNORE_INDEX).nonzero()[0])
                inputs, targets = (torch.from_numpy(x).long() for x in (ids[:-1], labels[1:]))
                total += loss_of(inputs, [len(inputs)], select, targets[select]).item()
                count += len(select)
        losses.append(total / count)
        if len(losses) == 1:
            load_adapter(model, adapter)
    return losses[0], losses[1]


def _table(lines: list[dict[str, Any]]) -> str:
    head = f"{'base':10}{'loss before':>12}{'after':>9}{'off':>8}{'max d loss':>12}{'mean d':>9}"
    rows = [head + f"{'samples/s':>11}{'peak GB':>9}"]
    rows += [
        f"{line['base']:10}{line['before']:12.4f}{line['after']:9.4f}{line['held_out']:8.2%}{line['largest']:12.1e}"
        f"{line['mean']:9.1e}{line['samples']:11.2f}{line['peak_rss'] / 1e9:9.2f}"
        for line in lines
    ]
    rows.append("before, after: held out; off, d loss: from the run on float32, held out and at the steps")
    return "\n".join(rows)


def _plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """The distance of every step's loss from that of the exact run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    exact = next(line["losses"] for line in lines if line["base"] == EXACT)
    for line in lines:
        if line["base"] != EXACT:
            distances = [loss - other for loss, other in zip(line["losses"], exact, strict=True)]
            axes.plot(range(1, len(exact) + 1), distances, label=line["base"])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss above the run on {EXACT}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    axes.set_title(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    CLI(main)
