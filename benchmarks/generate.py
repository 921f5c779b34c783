"""Speed of generation on the processor, side by side with transformers, litgpt and llama.cpp.

python benchmarks/generate.py --out generate

Every contender is a process of its own; in each round all of them do a task before the next one begins. The first round
warms up with a few tokens. A contender to which a task has cost `--limit` seconds does it no more.
"""

import json
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.generation.contest import Contender, bandwidth, contenders, extractor, start_up
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
    "llama.cpp q4_k_m",
    "litgpt bf16",
]
WARM_UP = 8
"""Tokens of an answer in the first round."""
EXACT = "ours f32"
"""Whose greedy answers the others are compared with."""
KEYS = ("single", "batch 4", "batch 16", "batch 32", "prefill")
PAIRS = [  # ours, the other, task, what it is called
    ("ours bf16", "llama.cpp bf16", "single", "bf16 single stream against llama.cpp bf16"),
    ("ours int8", "llama.cpp q8_0", "single", "int8 single stream against Q8_0"),
    ("ours int4", "llama.cpp q4_0", "single", "4-bit single stream against Q4_0"),
    ("ours int4", "llama.cpp q4_k_m", "single", "4-bit single stream against Q4_K_M"),
    ("ours bf16", "transformers bf16", "batch 16", "batch of 16 against transformers"),
    ("ours bf16", "llama.cpp bf16", "prefill", "prefill against llama.cpp"),
    ("ours bf16", "transformers bf16", "single", "bf16 single stream against transformers"),
    ("ours bf16", "transformers bf16", "prefill", "prefill against transformers"),
    ("ours bf16", "litgpt bf16", "single", "bf16 single stream against litgpt"),
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
    limit: float = 12.0,
    seed: int = 1,
    extraction_dir: Path = Path("checkpoints/demo-merged"),
    extraction_rows: Path = Path("data/demo/test.jsonl"),
    work_dir: Path = Path("build/benchmark-generate"),
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
) -> None:
    """Compare, and print tokens a second, shares of the bandwidth, and ratios.

    Args:
        checkpoint_dir: The model.
        contestants: Of ours bf16, ours int8, ours int4, transformers bf16, litgpt bf16, llama.cpp KIND and llama.cpp
            wheel KIND, where KIND is what prepare/checkpoint.py writes into GGUF. llama.cpp is compiled for this
            processor, which takes a quarter of an hour once; the wheel of xllamacpp is compiled for AVX2.
        rounds: Times that each does each task; medians count.
        tokens: Of each answer.
        prefill: Tokens of the long prompt.
        arrivals: Requests that come over time.
        rate: Of them a second.
        limit: Seconds of a task after which a contender is not asked to do it again.
        seed: Of prompts.
        extraction_dir: A model tuned to answer in JSON, as `make demo` leaves it; left out where it is missing.
        extraction_rows: The rows that it is asked.
        work_dir: Folder for logs and the files of llama.cpp.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json and OUT.png.
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
    exact = contenders(checkpoint_dir, work_dir, [EXACT])[0]
    extraction = extractor(extraction_dir, extraction_rows)
    size = sum(path.stat().st_size for path in checkpoint_dir.glob("*.safetensors"))
    read = bandwidth(size, work_dir)
    try:
        for one in running:
            one.start(work_dir / f"{one.name.replace(' ', '-')}.log")
        for number in range(rounds + 1):
            made = tokens if number else WARM_UP
            tell(f"round {number} of {rounds}")
            for one in 3 * running if number else running:  # it takes little time and varies most
                one.again("answer", "single", limit, ids=single, tokens=made)
            for one in running:
                one.again("prefill", "prefill", limit, ids=long)
            for count, prompts in batches.items():
                for one in running:
                    one.again("batch", f"batch {count}", limit, prompts=prompts, tokens=made // 2)
            for one in running:
                one.again("known", "known", limit, ids=long, more=single[:20])
            if not number:
                for one in running:
                    one.results.clear()
        tell("requests that come over time")
        for one in running[:1]:
            for key in ("arrivals", "one after another"):
                together = key == "arrivals"
                one.again("arrivals", key, limit, prompts=coming, tokens=tokens // 2, rate=rate, together=together)
        for one in running:
            for task in ("sizes", "built"):
                one.again(task, task, limit)
        tell("an answer in float32, JSON, start-up")
        exact.start(work_dir / "exact.log")
        exact.do("answer", "single", ids=single, tokens=tokens)
        if extraction is not None:
            extract(extraction, rounds, work_dir)
    finally:
        for one in (*running, exact, *([extraction] if extraction else [])):
            one.stop()
    show(running, exact, extraction, start_up(checkpoint_dir, rounds), read, size, load, out)


def extract(one: Contender, rounds: int, work_dir: Path) -> None:
    """Answers in JSON, alone and eight at a time, with and without guesses and a schema."""
    one.start(work_dir / "extraction.log")
    for number in range(rounds + 1):
        for together in (1, 8):
            for schema in (False, True):
                for guess in (False, True):
                    key, rows = extraction_key(together, schema, guess), 32 if number else 2
                    one.do("extract", key, rows=rows, together=together, guess=guess, schema=schema)
        if not number:
            one.results.clear()


def extraction_key(together: int, schema: bool, guess: bool) -> str:
    """A name of what was done."""
    kinds = ["schema"] * schema + ["lookup"] * guess
    return f"JSON, {together} at a time{''.join(f', {kind}' for kind in kinds)}"


def show(
    running: Sequence[Contender],
    exact: Contender,
    extraction: Contender | None,
    starting: Mapping[str, float],
    read: float,
    size: int,
    load: float,
    out: Path | None,
) -> None:
    """Print what was found, and write it."""
    say(f"read-only pass over {size / 1e9:.3f} GB: {read / 1e9:.1f} GB/s, {read / size:.0f} a second; load {load:.2f}")
    say(f"{'tokens/s':24}" + "".join(f"{key:>10}" for key in KEYS) + f"{'start, s':>10}{'peak, GB':>10}{'as f32':>8}")
    for one in running:
        speeds = "".join(f"{speed:10.1f}" if (speed := one.speed(key)) else f"{'-':>10}" for key in KEYS)
        say(f"{one.name:24}{speeds}{one.started:10.1f}{one.peak / 1e9:10.2f}{agreement(one, exact):>8}")
    found = ratios(running, read / size)
    for what, value in found.items():
        say(f"{what}: {value:.2f}")
    if own := next((one for one in running if one.name == "ours bf16"), None):
        details(own)
    if extraction is not None:
        for key in extraction.results:
            made = extraction.results[key][-1]
            share = made["right"] / len(made["texts"])
            say(f"{key}: {extraction.speed(key):.1f} tokens/s, {share:.0%} right")
        for together in (1, 8):
            for schema in (False, True):
                on, off = (extraction.speed(extraction_key(together, schema, guess)) for guess in (True, False))
                assert on and off
                what = f"prompt lookup on against off, {extraction_key(together, schema, False)}"
                found[what] = on / off
                say(f"{what}: {on / off:.2f}")
    beyond = starting["first token"] - starting["import torch"]
    say(f"start: {starting['first token']:.2f} s to a first token, {beyond:.2f} s beyond import torch")
    for one in running:
        if "built" in one.results:
            say(f"{one.name}: {one.results['built'][0]['system']}")
    if out is not None:
        everybody = (*running, exact, *([extraction] if extraction else []))
        results = {one.name: {"started": one.started, "peak": one.peak, "results": one.results} for one in everybody}
        whole = {"machine": platform.processor(), "read": read, "size": size, "ratios": found, "start": starting}
        out.with_suffix(".json").write_text(json.dumps(whole | {"contenders": results}), "utf-8")
        plot(running, read / size, out.with_suffix(".png"))


def agreement(one: Contender, exact: Contender) -> str:
    """How many tokens of a greedy answer are those of float32 before the first other one."""
    ids, wanted = (x.results.get("single", [{}])[0].get("ids") for x in (one, exact))
    if not ids or not wanted:
        return "-"
    return str(next((i for i, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]), len(wanted)))


def ratios(running: Sequence[Contender], passes: float) -> dict[str, float]:
    """Ours against the others, and against reading alone."""
    named = {one.name: one for one in running}
    found: dict[str, float] = {}
    for ours, other, key, what in PAIRS:
        if ours in named and other in named:
            left, right = named[ours].speed(key), named[other].speed(key)
            if left and right:
                found[what] = left / right
    if (own := named.get("ours bf16")) and (speed := own.speed("single")):
        found["share of the read-only pass"] = speed / passes
        together, alone = own.seconds("arrivals"), own.seconds("one after another")
        if together and alone:
            found["arrivals, against one after another"] = alone / together
    return found


def details(own: Contender) -> None:
    """Times of tokens, and memory beyond weights and cache."""
    if "arrivals" in own.results:
        waits, firsts = (sorted(own.results["arrivals"][0][key]) for key in ("waits", "firsts"))
        for what, times in (("a further token", waits), ("the first token", firsts)):
            middle, late = times[len(times) // 2], times[int(len(times) * 0.99)]
            say(f"time of {what}: median {1000 * middle:.1f} ms, 99th percentile {1000 * late:.1f} ms")
    cold, known = own.seconds("prefill"), own.seconds("known")
    if cold and known:
        say(f"first token of the long prompt: {cold:.2f} s, with its beginning known {known:.3f} s")
    if "sizes" in own.results:
        sizes = own.results["sizes"][0]
        beyond = own.peak - sizes["weights"] - sizes["touched"]
        say(f"peak memory beyond weights and cache: {beyond / 1e9:.2f} GB")


def plot(running: Sequence[Contender], passes: float, path: Path) -> None:
    """Bars of tokens a second, a panel for each task; the bound of a single stream in bfloat16 is a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(KEYS), figsize=(3 * len(KEYS) + 2, 0.35 * len(running) + 1.4), sharey=True)
    for axes, key in zip(panels, KEYS, strict=True):
        speeds = [one.speed(key) or 0 for one in running]
        colors = ["#1f4e8c" if one.name.startswith("ours") else "#9db8d9" for one in running]
        axes.barh([one.name for one in running], speeds, color=colors)
        axes.set_title(key, fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for place, speed in enumerate(speeds):
            axes.text(speed, place, f" {speed:.0f}" if speed else " -", va="center", fontsize=8)
    panels[0].axvline(passes, color="black", linewidth=0.8)
    panels[0].invert_yaxis()
    figure.supxlabel("tokens a second (line: bf16 weights read once a token, and nothing else)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def say(text: str) -> None:
    """A result."""
    print(text)


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    CLI(main)
