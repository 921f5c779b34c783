"""Speed, memory and loss of LoRA fine-tuning, side by side with TRL + PEFT and litgpt on the same rows.

python benchmarks/train.py --out train
python benchmarks/train.py --task preference --out preference
python benchmarks/train.py --option dora --out dora

Every run is a process of its own, the peers' in environments of their own; rounds are interleaved.
"""

import json
import os
import platform
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.training.compare import Speed, agreement, speed, summary
from benchmarks.training.contest import FILES, OURS, Contest, Run, Settings
from benchmarks.training.environments import PEERS, fast_bfloat16
from benchmarks.training.job import OptionName
from benchmarks.training.process import check_idle
from benchmarks.training.show import plot, table
from lit_llama.cli import CLI
from lit_llama.errors import ResourceError, UserError


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    files: list[Path] | None = None,
    rows: int = 512,
    held_out: int = 64,
    max_seq_length: int = 1024,
    warmup: int = 2,
    steps: int = 8,
    rounds: int = 3,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    micro_batches: list[int] | None = None,
    contenders: list[str] | None = None,
    seed: int = 1337,
    environments: Path = Path("build/benchmark-environments"),
    work_dir: Path = Path("build/benchmark-train"),
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
    synthetic: Literal["llama-2-7b", "llama-3-8b", "llama-13b"] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    sample_tokens: int | None = None,
    quantize: Literal["nf4", "nf4-dq", "int8", "fp8"] | None = None,
    task: Literal["supervised", "preference"] = "supervised",
    option: OptionName = "",
    options: bool = False,
) -> None:
    """Compare on the processor; or with --synthetic measure ours alone on a large model, on a GPU; or with --options
    ours alone with every option of fine-tuning.

    Args:
        checkpoint_dir: Base model; litgpt has to know a model of the folder's name.
        files: Rows as JSON arrays or JSON lines; those of ../shared/data if left out.
        rows: To train on, from each file; what the steps do not reach only takes part in the order.
        held_out: Rows behind them, of all files together, for the loss after training.
        max_seq_length: Longer rows are left out.
        warmup: Steps at the beginning of a run that are not timed.
        steps: Steps that are.
        rounds: Runs of each contender; those with stock settings run in the first round only.
        batch_size: Samples per optimizer step.
        learning_rate: Constant.
        micro_batches: Samples per forward pass among which the tuned peers get their fastest; [1,2,4,8] if left out.
        contenders: Only these, by their names in the table.
        seed: Of split, order and adapter.
        environments: Folder of the peers' environments, made when missing.
        work_dir: Folder for rows, logs, adapters and the float32 reference.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json and OUT.png.
        synthetic: Random weights in the shape of this model.
        device: For --synthetic.
        sample_tokens: For --synthetic: tokens of every sample instead of lengths like Alpaca's.
        quantize: For --synthetic: the base in 4 or 8 bits, as finetune/lora.py has it.
        task: Preference trains with the loss of DPO on pairs: the answer of a row is chosen, that of the next rejected.
        option: Way of fine-tuning for all contenders in place of plain LoRA, without litgpt; with dropout and NEFTune,
            which draw numbers, the losses of steps may be 0.1 from the reference, 0.03 on average, 2 % held out.
        options: One line for each option, on random weights in the shape of the base; takes at most 2 steps and
            2 rounds, 1 step before them.
    """
    load = check_idle(warn=when_busy == "warn")
    if synthetic:
        from benchmarks.training.synthetic import measure

        result = measure(synthetic, device, steps=steps, warmup=warmup, sample_tokens=sample_tokens, quantize=quantize)
        print("\n".join(f"{name:24}{value}" for name, value in result.items()))
        if out:
            out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        return
    if options:
        from benchmarks.training import options as each

        found = each.measure(
            checkpoint_dir, work_dir, warmup=min(warmup, 1), steps=min(steps, 2), rounds=min(rounds, 2)
        )
        print(each.table(found))
        if out:
            out.with_suffix(".json").write_text(json.dumps({"load": load, "results": found}, indent=2) + "\n", "utf-8")
        return
    sizes = micro_batches or [1, 2, 4, 8]
    if bad := [size for size in sizes if size < 1 or batch_size % size]:
        raise UserError(f"--micro_batches has {bad[0]}, which does not divide --batch_size {batch_size}")
    if option and task == "preference":
        raise UserError(f"--option {option} is for --task supervised")
    if option == "bf16-mixed" and not fast_bfloat16():
        raise ResourceError("--option bf16-mixed: this processor has no products in bfloat16, and no one would use it")
    settings = Settings(
        checkpoint_dir=checkpoint_dir,
        files=files or FILES,
        rows=rows,
        held_out=held_out,
        max_seq_length=max_seq_length,
        steps=warmup + steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        preference=task == "preference",
        option=option,
    )
    contest = Contest(settings, environments, work_dir)
    chosen = _chosen(contest.contenders, contenders)
    reference = contest.reference()
    best = {name: contest.best_micro_batch(name, sizes) for name in chosen}
    runs = _rounds(contest, chosen, best, rounds)
    lines = _lines(contest, runs, reference, warmup)
    print(table(lines))
    if out:
        machine = {
            "cpus": os.cpu_count(),
            "cpu": _processor(),
            "load": load,
            "python": platform.python_version(),
        }
        known = {"machine": machine, "settings": asdict(settings), "peers": {n: asdict(p) for n, p in PEERS.items()}}
        result = {**known, "reference": reference, "results": lines, "runs": runs}
        out.with_suffix(".json").write_text(json.dumps(result, indent=2, default=str) + "\n", "utf-8")
        method = "DPO" if settings.preference else "LoRA"
        plot(lines, out.with_suffix(".png"), f"{method} on {checkpoint_dir.name}, {settings.batch_size} samples a step")


def _chosen(known: Collection[str], contenders: Sequence[str] | None) -> list[str]:
    unknown = [name for name in contenders or () if name not in known]
    if unknown:
        raise UserError(f"--contenders has {unknown[0]!r}, expected some of {', '.join(map(repr, known))}")
    return [name for name in known if contenders is None or name in contenders]


def _rounds(contest: Contest, chosen: Sequence[str], micro_batch: dict[str, int], rounds: int) -> list[Run]:
    runs = []
    for number in range(rounds):
        for name in chosen:
            if number and name.endswith("stock"):
                continue
            try:
                found = contest.train(name, number, micro_batch[name])
            except ResourceError as error:  # hours of the others' runs are not lost with it
                print(f"{name}, round {number + 1}: {error}", file=sys.stderr)
                continue
            seconds = ", ".join(f"{value:.1f}" for value in found["seconds"])
            print(f"{name}, round {number + 1}: {seconds} s; first loss {found['losses'][0]:.4f}", file=sys.stderr)
            runs.append(found)
    return runs


def _lines(contest: Contest, runs: Sequence[Run], reference: Run, warmup: int) -> list[dict[str, Any]]:
    """The table. Losses are those of the first round: a run repeats them."""
    names = list(dict.fromkeys(run["contender"] for run in runs))
    of = {name: [run for run in runs if run["contender"] == name] for name in names}
    base, *losses = contest.held_out([Path(of[name][0]["adapter"]) for name in names])
    print(f"held-out loss of the base {base:.4f}, of our float32 run {reference['held_out']:.4f}", file=sys.stderr)
    rows, all_steps = contest.rows, range(len(reference["losses"]))
    counted = {
        "samples": sum(len(rows.steps[step]) for step in all_steps[warmup:]),
        "trained_tokens": sum(rows.trained_tokens(step) for step in all_steps[warmup:]),
        "tokens": sum(rows.tokens(step) for step in all_steps[warmup:]),
    }
    trained = len(rows.train)
    speeds: dict[str, Speed] = {name: speed(of[name], warmup=warmup, rows=trained, **counted) for name in names}
    lines = []
    for name, held in zip(names, losses, strict=True):
        first = of[name][0]
        agrees = agreement(first["losses"], held, reference["losses"], reference["held_out"], contest.limits)
        details = {"held_out": held, "losses": first["losses"], "micro_batch": first["micro_batch"]}
        lines.append(summary(name, speeds[name], agrees, speeds.get(OURS), details))
    return lines


def _processor() -> str:
    """Its name, where the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    CLI(main)
