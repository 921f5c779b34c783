"""Speed of generation on the processor, side by side with transformers and llama.cpp.

python benchmarks/generate.py --out generate

Every contender is a process of its own; in each round all of them do a task before the next one begins.
"""

import json
import platform
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.generation.contest import Contender, bandwidth, contenders
from benchmarks.training.process import check_idle
from lit_llama.cli import CLI

CONTENDERS = [
    "ours bf16",
    "ours int8",
    "ours int4",
    "transformers bf16",
    "llama.cpp bf16",
    "llama.cpp q8_0",
    "llama.cpp q4_0",
]
PAIRS = [  # ours, the other, task, what it is called
    ("ours bf16", "llama.cpp bf16", "single", "bf16 single stream against llama.cpp bf16"),
    ("ours int8", "llama.cpp q8_0", "single", "int8 single stream against Q8_0"),
    ("ours int4", "llama.cpp q4_0", "single", "4-bit single stream against Q4_0"),
    ("ours bf16", "transformers bf16", "batch 16", "batch of 16 against transformers"),
    ("ours bf16", "llama.cpp bf16", "prefill", "prefill against llama.cpp"),
    ("ours bf16", "transformers bf16", "single", "bf16 single stream against transformers"),
    ("ours bf16", "llama.cpp bf16", "batch 16", "batch of 16 against llama.cpp"),
]


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    contestants: list[str] | None = None,
    rounds: int = 3,
    tokens: int = 128,
    prefill: int = 1500,
    arrivals: int = 64,
    rate: float = 20.0,
    seed: int = 1,
    work_dir: Path = Path("build/benchmark-generate"),
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
) -> None:
    """Compare, and print tokens a second, shares of the bandwidth, and ratios.

    Args:
        checkpoint_dir: The model.
        contestants: Of ours bf16, ours int8, ours int4, transformers bf16, llama.cpp KIND, where KIND is what
            prepare/checkpoint.py writes into GGUF.
        rounds: Times that each does each task; medians count.
        tokens: Of each answer.
        prefill: Tokens of the long prompt.
        arrivals: Requests that come over time.
        rate: Of them a second.
        seed: Of prompts.
        work_dir: Folder for logs and the files of llama.cpp.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json.
    """
    load = check_idle(warn=when_busy == "warn")
    work_dir.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint_dir / "config.json").read_text("utf-8"))
    draw = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(100, config["vocab_size"] - 100) for _ in range(length)]

    single, long = prompt(64), prompt(prefill)
    batches = {size: [prompt(draw.randint(20, 200)) for _ in range(size)] for size in (4, 16, 32)}
    coming = [prompt(draw.randint(20, 200)) for _ in range(arrivals)]
    running = contenders(checkpoint_dir, work_dir, contestants or CONTENDERS)
    size = sum(path.stat().st_size for path in checkpoint_dir.glob("*.safetensors"))
    read = bandwidth(size, work_dir)
    try:
        for one in running:
            one.start(work_dir / f"{one.name.replace(' ', '-')}.log")
        for number in range(rounds + 1):  # the first one warms up
            tell(f"round {number} of {rounds}")
            for one in running:
                one.do("answer", "single", ids=single, tokens=tokens)
            for one in running:
                one.do("prefill", "prefill", ids=long)
            for count, prompts in batches.items():
                for one in running:
                    one.do("batch", f"batch {count}", prompts=prompts, tokens=tokens // 2)
            for one in running:
                if "known" in one.tasks:
                    one.do("known", "known", ids=long, more=single[:20])
            if not number:
                for one in running:
                    one.results.clear()
        for one in running:
            if "arrivals" in one.tasks and one.name == "ours bf16":
                for together in (True, False):
                    key = "arrivals" if together else "one after another"
                    one.do("arrivals", key, prompts=coming, tokens=tokens // 2, rate=rate, together=together)
    finally:
        for one in running:
            one.stop()
    show(running, read, size, load, out)


def show(running: Sequence[Contender], read: float, size: int, load: float, out: Path | None) -> None:
    """Print what was found, and write it."""
    keys = ("single", "batch 4", "batch 16", "batch 32", "prefill")
    say(f"read-only pass over {size / 1e9:.3f} GB: {read / 1e9:.1f} GB/s, {read / size:.0f} a second; load {load:.2f}")
    say(f"{'tokens/s':20}" + "".join(f"{key:>10}" for key in keys) + f"{'start, s':>10}{'peak, GB':>10}")
    for one in running:
        speeds = "".join(f"{speed:10.1f}" if (speed := one.speed(key)) else f"{'-':>10}" for key in keys)
        say(f"{one.name:20}{speeds}{one.started:10.1f}{one.peak / 1e9:10.2f}")
    named = {one.name: one for one in running}
    found: dict[str, Any] = {}
    for ours, other, key, what in PAIRS:
        if ours in named and other in named:
            left, right = named[ours].speed(key), named[other].speed(key)
            if left and right:
                found[what] = left / right
                say(f"{what}: {left / right:.2f}")
    if own := named.get("ours bf16"):
        speed = own.speed("single")
        found["share of the read-only pass"] = speed / (read / size) if speed else 0
        say(f"share of the read-only pass: {found['share of the read-only pass']:.0%}")
        if "arrivals" in own.results:
            together, alone = own.seconds("arrivals"), own.seconds("one after another")
            waits, firsts = (sorted(own.results["arrivals"][0][key]) for key in ("waits", "firsts"))
            assert together and alone
            found["arrivals, against one after another"] = alone / together
            say(f"arrivals, against one after another: {alone / together:.2f}")
            for what, times in (("a further token", waits), ("the first token", firsts)):
                middle, late = times[len(times) // 2], times[int(len(times) * 0.99)]
                say(f"time of {what}: median {1000 * middle:.1f} ms, 99th percentile {1000 * late:.1f} ms")
        cold, known = own.seconds("prefill"), own.seconds("known")
        if cold and known:
            say(f"first token of the long prompt: {cold:.2f} s, with its beginning known {known:.3f} s")
    if out is not None:
        results = {one.name: {"started": one.started, "peak": one.peak, "results": one.results} for one in running}
        whole = {"machine": platform.processor(), "read": read, "size": size, "ratios": found, "contenders": results}
        out.with_suffix(".json").write_text(json.dumps(whole), "utf-8")


def say(text: str) -> None:
    """A result."""
    print(text)


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    CLI(main)
