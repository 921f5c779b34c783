"""Contenders as processes that wait for their turn, and rounds in which each does every task."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.training.environments import python_of
from lit_llama.errors import ResourceError, UserError

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent


@dataclass
class Contender:
    """A process of worker.py.

    Attributes:
        name: In tables.
        command: That starts it.
        started: Seconds until it was ready.
        results: What each task gave, round by round.
        peak: Most memory that it held.
    """

    name: str
    command: Sequence[str | Path]
    started: float = 0.0
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    peak: int = 0
    process: subprocess.Popen[str] | None = None
    tasks: Sequence[str] = ()

    def start(self, log: Path) -> None:
        """Start it and wait until its model is loaded.

        Raises:
            ResourceError: It ended.
        """
        threads = str(len(os.sched_getaffinity(0)))
        given = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [str(word) for word in self.command],
            cwd=ROOT,
            env=given,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.tasks = self._read()["ready"]
        self.started = time.perf_counter() - start

    def do(self, task: str, key: str, **arguments: Any) -> dict[str, Any]:
        """Do a task, and keep what it gave under a key.

        Raises:
            ResourceError: It failed.
        """
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self.process.stdin.flush()
        made = self._read()
        if "error" in made:
            raise ResourceError(f"{self.name}: {task}: {made['error']}")
        self.peak = max(self.peak, made["peak"])
        self.results.setdefault(key, []).append(made)
        return made

    def again(self, task: str, key: str, limit: float, **arguments: Any) -> None:
        """Do a task unless it is none of this contender's, or what is kept under its key took `limit` seconds."""
        if task in self.tasks and sum(made.get("seconds", 0.0) for made in self.results.get(key, ())) < limit:
            self.do(task, key, **arguments)

    def speed(self, key: str) -> float | None:
        """Median of tokens a second over the rounds; None if it does not do the task."""
        made = self.results.get(key)
        return median(one["tokens"] / one["seconds"] for one in made) if made else None

    def seconds(self, key: str) -> float | None:
        """Median of seconds over the rounds."""
        made = self.results.get(key)
        return median(one["seconds"] for one in made) if made else None

    def stop(self) -> None:
        """Let it end."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ResourceError(f"{self.name} ended with status {self.process.wait()}; see its log")
        return dict(json.loads(line))


def bandwidth(size: int, work_dir: Path) -> float:
    """Bytes a second of a pass over `size` bytes that only reads, on all cores; the best of some."""
    library = work_dir / "bandwidth.so"
    command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", HERE / "bandwidth.cpp", "-o", library]
    subprocess.run([str(word) for word in command], check=True)
    memory = np.ones(size, np.uint8)
    passed = ctypes.CDLL(str(library.resolve())).read_all
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        passed(ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(size), len(os.sched_getaffinity(0)))
        best = max(best, size / (time.perf_counter() - start))
    return best


def contenders(checkpoint_dir: Path, work_dir: Path, names: Sequence[str]) -> list[Contender]:
    """The processes of some contenders; those of llama.cpp read files that are made here, once."""
    found = []
    for name in names:
        program, _, kind = name.rpartition(" ")
        python: Path | str = sys.executable
        if program == "ours":
            words: list[str | Path] = ["ours", checkpoint_dir, {"bf16": "stored"}.get(kind, kind)]
        elif program == "transformers":
            words = ["peer_transformers", checkpoint_dir]
        elif program == "litgpt":
            python, words = python_of("litgpt", work_dir), ["peer_litgpt", checkpoint_dir, work_dir]
        elif program == "llama.cpp":
            python = python_of("llama-cpp-python", work_dir)
            words = ["peer_llama_cpp", _gguf(checkpoint_dir, kind, work_dir)]
        elif program == "llama.cpp wheel":
            words = ["peer_llama_wheel", _gguf(checkpoint_dir, kind, work_dir)]
        else:
            raise UserError(f"there is no contestant {name!r}, see --help")
        module, *arguments = words
        found.append(Contender(name, [python, "-m", f"benchmarks.generation.{module}", *arguments]))
    return found


def extractor(checkpoint_dir: Path, rows_file: Path) -> Contender | None:
    """The process that answers in JSON; None where its model or its rows are missing."""
    if not checkpoint_dir.is_dir() or not rows_file.is_file():
        print(f"{checkpoint_dir} or {rows_file} is missing: no extraction; `make demo` makes them", file=sys.stderr)
        return None
    return Contender(
        "extraction", [sys.executable, "-m", "benchmarks.generation.extraction", checkpoint_dir, rows_file]
    )


def start_up(checkpoint_dir: Path, rounds: int) -> dict[str, float]:
    """Seconds of a process that imports torch, and of one that prints the first token of an answer; medians."""
    script = ROOT / "generate" / "base.py"
    commands: dict[str, list[str]] = {
        "import torch": ["-c", "import torch"],
        "first token": [str(script), "--checkpoint_dir", str(checkpoint_dir), "--max_new_tokens", "1"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, words in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
            taken[name].append(time.perf_counter() - start)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def _gguf(checkpoint_dir: Path, kind: str, work_dir: Path) -> Path:
    file = work_dir / f"{checkpoint_dir.name}-{kind}.gguf"
    if not file.exists():
        script = ROOT / "prepare" / "checkpoint.py"
        dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}.get(kind, kind)
        words = ["--source", checkpoint_dir, "--destination_path", file, "--format", "gguf", "--dtype", dtype]
        if subprocess.run([sys.executable, str(script), *map(str, words)], cwd=ROOT).returncode:
            raise ResourceError(f"{file} cannot be made, see above")
    return file
