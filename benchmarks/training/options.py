"""Options of fine-tuning against plain LoRA: tokens per second and memory of whole training steps.

python -m benchmarks.training.options OPTION measures one, in a process of its own; --options of train.py runs them all.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.training.environments import fast_bfloat16
from benchmarks.training.process import run

TOKENS = 1024
"""Of a micro-batch."""
MICRO_BATCHES = 4
"""Of an optimizer step."""
PLAIN, MIXED = "LoRA", "bf16-mixed"


@dataclass(frozen=True, kw_only=True)
class Option:
    """Attributes:
    lora: Settings of the adapters; None trains all weights.
    config: Fields of the model's configuration that differ.
    precision: As its flag; auto is bfloat16 where the processor is fast at it, else float32.
    noise: NEFTune's alpha.
    """

    lora: dict[str, Any] | None
    config: dict[str, Any] | None = None
    precision: str = "auto"
    noise: float = 0.0


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    PLAIN: Option(lora={}),
    "dropout": Option(lora={"dropout": 0.05}),
    "norms of queries and keys": Option(lora={}, config={"model_type": "qwen3", "use_qk_norm": True}),
    "biases": Option(lora={}, config={"attention_bias": True}),
    "DoRA": Option(lora={"use_dora": True}),
    "rsLoRA": Option(lora={"use_rslora": True}),
    "embeddings and head": Option(lora={"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "NEFTune": Option(lora={}, noise=5.0),
    MIXED: Option(lora={}, precision="bf16-mixed"),
    "all weights": Option(lora=None),
}


def measure(checkpoint_dir: Path, work_dir: Path, *, warmup: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Run every option in turn, each in a process, as many times as there are rounds.

    Returns:
        A line for each option: the median of its runs, and how it compares with plain LoRA. Products in bfloat16 that
        a processor would emulate are left out.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    fast = fast_bfloat16()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIONS if fast or name != MIXED}
    for number in range(rounds):
        for name, found in runs.items():
            log = work_dir / f"option-{list(OPTIONS).index(name)}-{number}.log"
            words = [sys.executable, "-m", "benchmarks.training.options", name, str(checkpoint_dir), warmup, steps]
            done = run([str(word) for word in words], log)
            found.append(json.loads(done.stdout.splitlines()[-1]) | {"peak_rss": done.peak_rss})
            print(f"{name}, round {number + 1}: {found[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    return summary(runs)


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Sum up the runs of each option; ratios are those of runs of the same round."""
    lines = []
    for name, found in runs.items():
        pairs = list(zip(found, runs[PLAIN], strict=True))
        ratios = {
            f"{key}_ratio": statistics.median(ours[key] / plain[key] for ours, plain in pairs)
            for key in ("tokens_per_second", "cpu_seconds", "peak_rss")
        }
        lines.append(
            {
                "option": name,
                "tokens_per_second": statistics.median(each["tokens_per_second"] for each in found),
                "peak_rss": max(each["peak_rss"] for each in found),
                **ratios,
                "numbers": found[0]["numbers"],
                "layers": found[0]["layers"],
                "runs": found,
            }
        )
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Aligned text, a line for each option."""
    rows = [f"{'':28}{'tokens/s':>9}{'of LoRA':>9}{'CPU time':>10}{'peak GB':>9}  {'numbers':22}layers"]
    for line in lines:
        speed = f"{line['tokens_per_second']:9.0f}{line['tokens_per_second_ratio']:9.2f}"
        used = f"{line['cpu_seconds_ratio']:9.2f}x{line['peak_rss'] / 1e9:9.2f}"
        layers = line["layers"].removeprefix("layers: ")
        rows.append(f"{line['option']:28}{speed}{used}  {line['numbers']:22}{layers}")
    return "\n".join(rows)


def train(option: Option, config: Any, *, warmup: int, steps: int) -> dict[str, Any]:
    """Take steps of several micro-batches on random weights, as a run does; those after the warm-up are timed.

    Args:
        option: What is trained, and how.
        config: Shape of the model, a LLaMAConfig.
        warmup: Steps that are not timed.
        steps: Steps that are.
    """
    import torch

    from benchmarks.training.synthetic import packed
    from lit_llama.device import keep_freed_memory, numerics, seed_everything
    from lit_llama.model.assemble import assemble
    from lit_llama.model.config import LoRAConfig
    from lit_llama.train.memory.footprint import Build
    from lit_llama.train.methods.method import Full, LoRA, Method

    method: Method = Full() if option.lora is None else LoRA(LoRAConfig(**option.lora))
    numbers = numerics(option.precision, torch.device("cpu"), whole=method.whole)  # type: ignore[arg-type]
    config = replace(config, **option.config or {})
    build = Build(config=config, method=method, numerics=numbers, checkpointing="none", noise=option.noise)
    seed_everything(0)
    assembled = assemble(lambda: _model(config, numbers), build.assembly())
    keep_freed_memory()
    loss_of = method.loss_of(assembled.model, numbers).train()
    optimizer = torch.optim.AdamW(method.groups(assembled.model, 0.0), lr=1e-4, fused=True)
    batches = list(packed((warmup + steps) * MICRO_BATCHES, TOKENS, config.vocab_size, None))
    losses, start, cpu = [], 0.0, 0.0
    for number in range(warmup + steps):
        if number == warmup:
            start, cpu = time.perf_counter(), time.process_time()
        for batch in batches[number * MICRO_BATCHES :][:MICRO_BATCHES]:
            loss = loss_of.of_batch(batch) / len(batch.targets)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    tokens = steps * MICRO_BATCHES * TOKENS
    return {
        "tokens_per_second": tokens / seconds,
        "cpu_seconds": used,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "numbers": str(numbers),
        "layers": assembled.describe(),
    }


def _model(config: Any, numbers: Any) -> Any:
    """Random weights in the dtypes in which a run stores them; a tied head is the embedding."""
    import torch
    from torch import nn

    from benchmarks.training.synthetic import random_model
    from lit_llama.model.files.checkpoint import linear_weights

    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    names = linear_weights(model)
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        dtype = numbers.linear if name in names else numbers.rest
        setattr(model.get_submodule(module), leaf, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def main() -> None:
    """Measure the option of the command line; its last line is JSON."""
    from lit_llama.device import keep_few_products
    from lit_llama.model.config import LLaMAConfig

    keep_few_products()
    name, folder, warmup, steps = sys.argv[1:]
    print(json.dumps(train(OPTIONS[name], LLaMAConfig.from_folder(Path(folder)), warmup=int(warmup), steps=int(steps))))


if __name__ == "__main__":
    main()
