"""How time and memory of a training step grow with sequence length, micro-batch, LoRA rank and number of rows.

python benchmarks/scaling.py --out scaling

Every point is a process of its own. The model is small and random, so that all of it ends in minutes.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.training.process import ROOT, check_idle
from lit_llama.cli import CLI

Axis = Literal["sequence_length", "micro_batch_tokens", "rank", "rows"]
POINTS: dict[Axis, Sequence[int]] = {
    "sequence_length": (128, 256, 512, 1024, 2048, 4096, 8192),
    "micro_batch_tokens": (512, 1024, 2048, 4096, 8192),
    "rank": (4, 8, 16, 32, 64, 128),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
TOKENS = 8192
"""Of an optimizer step."""
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
Point = dict[str, Any]


def main(
    *,
    axes: list[Axis] | None = None,
    repeats: int = 3,
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
    measure: Axis | None = None,
    value: int = 0,
) -> None:
    """Measure all points, print a table and draw it.

    Args:
        axes: Only these.
        repeats: Steps timed at each point, of which the fastest counts; one before them is not timed.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json and OUT.png.
        measure: For the processes that this starts: the axis.
        value: For them: the place on it.
    """
    if measure:
        print(json.dumps(_rows(value) if measure == "rows" else _step(measure, value, repeats)))
        return
    check_idle(warn=when_busy == "warn")
    points = []
    for axis in axes or get_args(Axis):
        for place in POINTS[axis]:
            points.append(_run(axis, place, repeats))
            print(f"{axis} {place}: {points[-1]['seconds']:.3f} s", file=sys.stderr)
    print(table(points))
    if out:
        out.with_suffix(".json").write_text(json.dumps({"model": MODEL, "points": points}, indent=2) + "\n", "utf-8")
        plot(points, out.with_suffix(".png"))


def _run(axis: Axis, value: int, repeats: int) -> Point:
    words = ["--measure", axis, "--value", str(value), "--repeats", str(repeats)]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=given, check=True)
    return {"axis": axis, "value": value, **json.loads(done.stdout.splitlines()[-1])}


def _step(axis: Axis, value: int, repeats: int) -> Point:
    """Seconds of one optimizer step on 8192 tokens, and the memory that it takes beyond model and optimizer."""
    import torch

    from lit_llama.device import cores, keep_few_products, keep_freed_memory
    from lit_llama.model.adapters.lora import apply_lora, lora_parameters
    from lit_llama.model.config import LLaMAConfig, LoRAConfig
    from lit_llama.model.fused.layer import fuse
    from lit_llama.model.llama import LLaMA
    from lit_llama.text.dataset.batches import collate
    from lit_llama.train.loss import TokenLoss

    keep_freed_memory()
    keep_few_products()
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    length = value if axis == "sequence_length" else 256
    budget = max(value, length) if axis == "micro_batch_tokens" else TOKENS
    config: Any = MODEL
    model = LLaMA(LLaMAConfig(**config))
    apply_lora(model, LoRAConfig(r=value if axis == "rank" else 8))
    fuse(model)
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    loss_of = TokenLoss(model).train()
    ids = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (TOKENS // length, length + 1), dtype=np.int32)
    size = max(1, budget // length)
    batches = [collate([(row, row) for row in ids[at : at + size]]) for at in range(0, len(ids), size)]

    def step() -> None:
        for batch in batches:
            (loss_of.of_batch(batch) / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()

    before = _peak_rss()
    times = [_seconds(step) for _ in range(1 + repeats)][1:]
    return {"seconds": min(times), "memory": _peak_rss() - before, "tokens": TOKENS}


def _rows(count: int) -> Point:
    """Seconds from a data folder of so many rows to the first batch, and the memory of it."""
    import datasets

    from lit_llama.text.dataset.batches import epoch_order, micro_batches
    from lit_llama.text.dataset.folder import Split

    with tempfile.TemporaryDirectory(prefix="scaling-") as home:
        lengths = np.full(count, 32)
        values = np.zeros(32 * count, np.int32)
        folder = Path(home)
        _write(datasets, folder / "train", values, lengths)
        del values
        before = _peak_rss()

        def start() -> None:
            split = Split(folder, "train")
            split.trained_tokens()
            order = epoch_order(len(split), 0, 0)[:16].tolist()
            next(iter(micro_batches(split, order, 2048)))

        return {"seconds": _seconds(start), "memory": _peak_rss() - before, "tokens": 0}


def _write(datasets: Any, folder: Path, values: Any, lengths: Any) -> None:
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.array(values))
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table({"input_ids": column, "labels": column})).save_to_disk(str(folder))


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(points: Sequence[Point], key: str) -> float:
    """Exponent of the growth over the upper half of an axis: 0 is constant, 1 linear, 2 quadratic."""
    upper = points[len(points) // 2 :] if len(points) > 2 else points
    low, high = upper[0], upper[-1]
    if min(low[key], high[key]) <= 0 or low is high:
        return float("nan")
    return float(np.log(high[key] / low[key]) / np.log(high["value"] / low["value"]))


def table(points: Sequence[Point]) -> str:
    """A line for each point, and the growth of each axis."""
    lines = [f"{'':20}{'':>10}{'seconds':>10}{'us/token':>10}{'MB':>9}"]
    for axis in dict.fromkeys(point["axis"] for point in points):
        own = [point for point in points if point["axis"] == axis]
        for point in own:
            each = f"{point['seconds'] / point['tokens'] * 1e6:10.1f}" if point["tokens"] else f"{'':10}"
            lines.append(f"{axis:20}{point['value']:10}{point['seconds']:10.3f}{each}{point['memory'] / 1e6:9.0f}")
        time_grows, memory_grows = growth(own, "seconds"), growth(own, "memory")
        lines.append(f"{'':20}grows as value^{time_grows:.2f} in time, value^{memory_grows:.2f} in memory")
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """Time and memory over each axis, with logarithmic scales."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure, places = pyplot.subplots(1, len(axes), figsize=(4 * len(axes), 3.2), layout="constrained", squeeze=False)
    for place, axis in zip(places[0], axes, strict=True):
        own = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in own]
        place.plot(values, [point["seconds"] for point in own], "o-", color="#1f4e8c", label="seconds")
        place.plot(values, [point["memory"] / 1e9 for point in own], "s:", color="#d1495b", label="GB")
        place.set(xscale="log", yscale="log", xlabel=axis)
        place.minorticks_off()
        place.set_xticks(values, [f"{value // 1000}k" if value >= 1000 else str(value) for value in values])
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    places[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    CLI(main)
