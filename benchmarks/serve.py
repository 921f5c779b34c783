"""Speed of serving under load, side by side with llama-cpp-python's server; and a soak of random clients.

python benchmarks/serve.py --out serve
python benchmarks/serve.py --soak 600
"""

import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

import httpx2

from benchmarks.serving.contenders import Server, command, free_port, running
from benchmarks.serving.engine import drive_engine
from benchmarks.serving.load import Seen, drive, prompts
from benchmarks.serving.soak import Counts, Soak
from benchmarks.training.process import check_idle
from lit_llama.cli import CLI
from lit_llama.errors import IntegrityError
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import open_folder

T = TypeVar("T")
_PARTS = 10
"""Of a soak, after each of which memory is looked at."""
_WARM = 30.0
"""Seconds, or a third of a soak, until threads, arenas and the code of matrix products are all there."""
_MOST_GROWTH = 24e6
"""Bytes that may come to what a program holds after it is warm; a soak of ten minutes has some 3,000 requests."""


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    gguf: Path | None = None,
    contestants: list[str] | None = None,
    clients: list[int] | None = None,
    requests: int = 4,
    tokens: int = 48,
    shared: Literal["both", "yes", "no"] = "both",
    llama_python: str = sys.executable,
    soak: float | None = None,
    seed: int = 1,
    work_dir: Path = Path("build/benchmark-serve"),
    when_busy: Literal["refuse", "warn"] = "refuse",
    out: Path | None = None,
) -> None:
    """Compare, and print requests and tokens a second, times to a token, and memory; or soak our server.

    Args:
        checkpoint_dir: The model.
        gguf: It for llama.cpp, as prepare/checkpoint.py --format gguf writes it.
        contestants: Of ours, engine (ours without HTTP), llama-cpp-python; the first two if left out, and the third
            where there is a GGUF file.
        clients: That ask at the same time; 1, 8 and 32 if left out.
        requests: Of each client.
        tokens: Of an answer, as a mean.
        shared: Whether prompts begin alike.
        llama_python: The Python that has llama_cpp.server.
        soak: Seconds to soak for, instead.
        seed: Of prompts and clients.
        work_dir: Folder for logs.
        when_busy: What to do when others use the machine.
        out: Writes OUT.json.
    """
    load = check_idle(warn=when_busy == "warn")
    work_dir.mkdir(parents=True, exist_ok=True)
    if soak is not None:
        print(json.dumps(soaked(checkpoint_dir, soak, seed, work_dir)))
        return
    names = contestants or ["engine", "ours", *(["llama-cpp-python"] if gguf else [])]
    rows: list[dict[str, Any]] = []
    for name in names:
        for count in clients or [1, 8, 32]:
            for same in {"both": [False, True], "yes": [True], "no": [False]}[shared]:
                texts = prompts(count * requests, same, seed)
                if name == "engine":
                    seen, peak = drive_engine(checkpoint_dir, texts, tokens, count)
                else:
                    port = free_port()
                    words = command(name, checkpoint_dir, gguf, llama_python, port, 32)
                    with running(words, port, work_dir / f"{name}.log") as server:
                        seen, peak = _measured(server, texts, tokens, count)
                rows.append({"server": name, "clients": count, "shared": same, **seen.row(), "peak MB": peak / 1e6})
                print(_line(rows[-1]), flush=True)
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps({"load": load, "rows": rows}, indent=1) + "\n")


def _measured(server: Server, texts: list[str], tokens: int, clients: int) -> tuple[Seen, int]:
    _run(drive(server.url, ["Once upon a time"], 8, 1))  # whatever is made with the first request
    seen = _run(drive(server.url, texts, tokens, clients))
    return seen, server.memory("VmHWM")


async def _sampled(server: Server, soak: Soak, seconds: float, known: int) -> tuple[Counts, list[int]]:
    """What became of a soak, and the bytes beside those that are known, after each part of it."""
    beside: list[int] = []

    async def sample() -> None:
        for _ in range(_PARTS):
            await asyncio.sleep(seconds / _PARTS)
            beside.append(server.memory("RssAnon") - known)

    counts, _ = await asyncio.gather(soak.run(seconds, 24), sample())
    return counts, beside


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; a signal cancels it, as an exception amid a loop could leave that spinning."""

    async def whole() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(whole())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)


def _line(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {value:8.2f}" for name, value in row.items() if isinstance(value, float))
    return f"{row['server']:16} {row['clients']:3} clients {'shared' if row['shared'] else 'unlike':6}  {figures}"


def soaked(checkpoint_dir: Path, seconds: float, seed: int, work_dir: Path) -> dict[str, Any]:
    """Soak our server.

    Raises:
        IntegrityError: An answer was wrong, or memory, blocks or answers were left behind.
    """
    port, slots = free_port(), 8
    words = [*command("ours", checkpoint_dir, None, "", port, slots), "--max_waiting", "16"]
    plan = open_folder(checkpoint_dir, Loading(batch_size=slots)).plan()
    with running(words, port, work_dir / "soak.log") as server:
        # Memory of the cache is taken as it is used: all of it before anything is looked at.
        long = {"prompt": ([5, *range(100, 150)] * 200)[: plan.config.context_length - 1], "max_tokens": 1}
        httpx2.post(f"{server.url}/v1/completions", json=long, timeout=300).raise_for_status()
        counts, beside = _run(_sampled(server, Soak(server.url, seed), seconds, plan.weights + plan.cache))
        time.sleep(2)
        metrics = httpx2.get(f"{server.url}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        found = {name: float(values[f"lit_llama_{name}"]) for name in ("answers_running", "answers_waiting")}
        blocks = float(values["lit_llama_cache_blocks"]) - float(values["lit_llama_cache_blocks_free"])
        told: dict[str, Any] = {**found, "blocks held": blocks, "full": counts.full}
    if any(found.values()) or blocks:
        raise IntegrityError(f"something is left behind: {told}")
    told |= {"MB beside weights and cache": [round(size / 1e6) for size in beside]}
    warm = math.ceil(max(_WARM / seconds, 1 / 3) * _PARTS)  # all of a short one
    if (grown := beside[-1] - max(beside[:warm])) > _MOST_GROWTH:
        raise IntegrityError(f"memory grew by {grown / 1e6:.0f} MB after part {warm} of {_PARTS}: {told}")
    return told | {"requests": counts.kinds, "seconds": seconds}


if __name__ == "__main__":
    CLI(main)
