"""The same rows for everybody, one process a run, and a float32 run of ours to compare the losses with."""

import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from benchmarks.training.compare import DRAWN_LIMITS, LIMITS
from benchmarks.training.environments import fast_bfloat16, python_of
from benchmarks.training.job import OPTIONS, RESULT_FILE, Job, OptionName
from benchmarks.training.process import KEEP_FREED_MEMORY, ROOT, Done, run
from benchmarks.training.rows import Rows, load_rows
from lit_llama.errors import DataError, IntegrityError
from lit_llama.folder.manifest import sha256_file

Run = dict[str, Any]
R, ALPHA = 8, 16
TEST_ROWS = 2
"""Rows that nobody uses; a data folder needs some."""
FILES = [ROOT.parent / "shared" / "data" / name for name in ("alpaca_en_demo.json", "gsm8k_train.json")]
"""Rows that are trained on where none are named."""


@dataclass(frozen=True)
class Contender:
    """Attributes:
    module: Program in this folder.
    peer: Whose environment it needs; ours runs where the benchmark runs.
    tuned: With the best settings of the peer, and a memory allocator that keeps what is freed.
    """

    module: str
    peer: str | None = None
    tuned: bool = False


OURS = "ours"
CONTENDERS = {
    OURS: Contender("ours"),
    "TRL + PEFT, tuned": Contender("peer_trl", "trl", tuned=True),
    "litgpt, tuned": Contender("peer_litgpt", "litgpt", tuned=True),
    "TRL + PEFT, stock": Contender("peer_trl", "trl"),
    "litgpt, stock": Contender("peer_litgpt", "litgpt"),
}
PREFERENCE_CONTENDERS = {
    OURS: Contender("ours"),
    "TRL + PEFT, tuned": Contender("peer_trl_dpo", "trl", tuned=True),
    "TRL + PEFT, stock": Contender("peer_trl_dpo", "trl"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the losses depend on; see benchmarks/train.py."""

    checkpoint_dir: Path
    files: Sequence[Path]
    rows: int
    held_out: int
    max_seq_length: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    preference: bool = False
    option: OptionName = ""

    def key(self) -> str:
        """Names the folder of everything made of these settings, files and weights."""
        made_of = [*self.files, *sorted(self.checkpoint_dir.glob("*.safetensors"))]
        text = json.dumps([asdict(self), R, ALPHA, [sha256_file(path) for path in made_of]], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Contest:
    """Prepares, runs and compares.

    Args:
        settings: Of all runs.
        environments: Folder of the peers' environments.
        work_dir: Folder for rows, adapters and logs; rows and reference are kept for the next time.
    """

    def __init__(self, settings: Settings, environments: Path, work_dir: Path) -> None:
        self._settings, self._environments = settings, environments
        self.contenders = PREFERENCE_CONTENDERS if settings.preference else CONTENDERS
        if settings.option:  # litgpt has few of them
            self.contenders = {name: each for name, each in CONTENDERS.items() if each.peer != "litgpt"}
        self.limits = DRAWN_LIMITS if OPTIONS[settings.option].drawn else LIMITS
        self.folder = work_dir.resolve() / settings.key()
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def rows(self) -> Rows:
        """The rows, prepared by prepare/records.py and dumped once."""
        path, wanted = self.folder / "rows.npz", self._settings
        if not path.exists():
            sources = _write_sources(self.folder, wanted)
            for name, source in sources.items():
                shutil.rmtree(self.folder / name, ignore_errors=True)
                flags = {
                    "source": source,
                    "destination_path": self.folder / name,
                    "tokenizer_path": wanted.checkpoint_dir.resolve(),
                    "max_seq_length": wanted.max_seq_length,
                    "split": "shuffle",
                    "test_split_size": TEST_ROWS,
                    "seed": wanted.seed,
                }
                if wanted.preference:
                    flags["as"] = "preference"
                words = [f"--{flag}={value}" for flag, value in flags.items()]
                run([sys.executable, "prepare/records.py", *words], self.folder / f"{name}.log")
            numbers = map(str, (wanted.steps, wanted.batch_size, wanted.seed))
            staged = self.folder / "staged.npz"
            words = [*(str(self.folder / name) for name in sources), str(staged), *numbers]
            run([sys.executable, "-m", "benchmarks.training.rows", *words], self.folder / "rows.log")
            staged.rename(path)
        return load_rows(path)

    @cached_property
    def start_file(self) -> Path:
        """An adapter with the lora_A that a run of ours begins with.

        In the first step lora_B is zero, so lora_A has no gradient: after one step it is as it began.
        """
        folder = self.folder / "start"
        path = folder / "adapter" / "adapter_model.safetensors"
        if not path.exists():
            job = replace(self._job(folder, steps=1, start_file=""), option="")
            self._train(self.contenders[OURS], folder, job)
        return path

    def reference(self) -> Run:
        """Losses of ours in float32, kept as JSON."""
        path = self.folder / "reference.json"
        if not path.exists():
            print("training the float32 reference, once", file=sys.stderr)
            folder = self.folder / "reference"
            found = self._train(self.contenders[OURS], folder, replace(self._job(folder), precision="32-true"))
            base, held_out = self.held_out([folder / "adapter"])
            path.write_text(json.dumps({"losses": found["losses"], "held_out": held_out, "base_held_out": base}))
        reference: Run = json.loads(path.read_text())
        return reference

    def train(self, name: str, number: int, micro_batch: int) -> Run:
        """One run of a contender; its adapter stays in the folder named by `adapter`."""
        contender = self.contenders[name]
        folder = self.folder / f"{contender.module}-{'tuned' * contender.tuned or 'stock'}-{number}"
        job = replace(self._job(folder), micro_batch=micro_batch, tuned=contender.tuned)
        return {"contender": name, "round": number, **self._train(contender, folder, job)}

    def train_on(self, quantize: str, precision: Literal["bf16-true", "32-true"]) -> Run:
        """One run of ours on a base that is held otherwise; its adapter stays in the folder named by `adapter`."""
        folder = self.folder / f"base-{quantize or precision}"
        job = replace(self._job(folder), precision=precision, quantize=quantize)
        return self._train(self.contenders[OURS], folder, job)

    def best_micro_batch(self, name: str, choices: Sequence[int]) -> int:
        """The fastest of some micro-batches of a tuned peer, by its second and third step."""
        contender = self.contenders[name]
        if not contender.tuned or len(choices) == 1:
            return choices[0]
        times = {}
        for choice in choices:
            folder = self.folder / f"{contender.module}-micro-batch-{choice}"
            steps = min(3, self._settings.steps)
            job = replace(self._job(folder, steps=steps), micro_batch=choice, tuned=True)
            times[choice] = statistics.fmean(self._train(contender, folder, job)["seconds"][-2:])
            print(f"{name}, micro-batches of {choice}: {times[choice]:.1f} s a step", file=sys.stderr)
        return min(times, key=lambda choice: times[choice])

    def held_out(self, adapters: Sequence[Path]) -> list[float]:
        """The base's loss on the held-out rows, then that of each adapter."""
        words = map(str, (self._settings.checkpoint_dir.resolve(), self.folder / "rows.npz", *adapters))
        python = str(python_of("trl", self._environments))
        done = run([python, "-m", "benchmarks.training.held_out", *words], self.folder / "held_out.log")
        losses: list[float] = json.loads(done.stdout.splitlines()[-1])
        return losses

    def _job(self, folder: Path, *, steps: int | None = None, start_file: str | None = None) -> Job:
        wanted = self._settings
        return Job(
            checkpoint_dir=str(wanted.checkpoint_dir.resolve()),
            data_dir=str(self.folder / "data"),
            rows_file=str(self.folder / "rows.npz"),
            start_file=str(self.start_file) if start_file is None else start_file,
            out_dir=str(folder / "adapter"),
            steps=steps or wanted.steps,
            batch_size=wanted.batch_size,
            micro_batch=1,
            learning_rate=wanted.learning_rate,
            r=R,
            alpha=ALPHA,
            seed=wanted.seed,
            preference=wanted.preference,
            option=wanted.option,
            bfloat16=fast_bfloat16(),
        )

    def _train(self, contender: Contender, folder: Path, job: Job) -> Run:
        rows = self.rows
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        python = python_of(contender.peer, self._environments) if contender.peer else Path(sys.executable)
        command: list[str | Path] = [python, "-m", f"benchmarks.training.{contender.module}", job.write(folder)]
        done = run(command, folder / "log", KEEP_FREED_MEMORY if contender.tuned else {})
        return _result(folder, job, rows, done)


def _result(folder: Path, job: Job, rows: Rows, done: Done) -> Run:
    """What a run wrote, checked."""
    result: Run = json.loads((folder / RESULT_FILE).read_text("utf-8"))
    if len(result["losses"]) != job.steps:
        raise IntegrityError(f"{folder}: {len(result['losses'])} losses, expected {job.steps}")
    counted = result.pop("trained_tokens")
    if counted and counted != (expected := [rows.trained_tokens(step) for step in range(job.steps)]):
        raise IntegrityError(f"{folder}: trained on {counted} tokens, expected {expected}: these are other rows")
    return result | {
        "first_step": result["first_step"] - done.started,
        "wall": done.seconds,
        "peak_rss": done.peak_rss,
        "busy_before": done.busy_before,
        "micro_batch": job.micro_batch if job.tuned else None,
        "adapter": job.out_dir,
    }


def _write_sources(folder: Path, wanted: Settings) -> dict[str, Path]:
    """The first rows of each file to train on, and the ones behind them to hold out, as JSON lines."""
    train: list[Any] = []
    held: list[Any] = []
    for number, path in enumerate(wanted.files):
        rows, count = _read(path), wanted.rows
        if wanted.preference:
            # No more than are trained on, as the reference of all is computed.
            rows = _pairs(rows, path)
            whole, rest = divmod(wanted.steps * wanted.batch_size + TEST_ROWS, len(wanted.files))
            count = min(count, whole + (number < rest))
        train += rows[:count]
        held += rows[wanted.rows :][: -(-wanted.held_out // len(wanted.files))]
    if len(held) < 3 or len(train) < wanted.steps * wanted.batch_size:
        files = ", ".join(map(str, wanted.files))
        needed = f"{wanted.steps} steps of {wanted.batch_size} and {wanted.held_out} more to hold out"
        raise DataError(f"{files}: {len(train)} rows and {len(held)} behind them, expected {needed}")
    paths = {"data": folder / "data.jsonl", "held_out": folder / "held_out.jsonl"}
    for path, rows in zip(paths.values(), (train, held), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return paths


def _pairs(rows: Sequence[Any], path: Path) -> list[Any]:
    """Preferences: the answer of a row is chosen, that of the next row rejected."""
    try:
        found = [
            (
                "\n\n".join(filter(None, (row.get("instruction"), row.get("input"), row.get("question")))),
                row.get("output") or row["answer"],
            )
            for row in rows
        ]
    except (AttributeError, KeyError) as error:
        raise DataError(f"{path}: rows without instruction and output, or question and answer") from error
    return [
        {"prompt": prompt, "chosen": answer, "rejected": other}
        for (prompt, answer), (_, other) in pairwise(found)
        if prompt and answer.strip() and other.strip() and answer.strip() != other.strip()
    ]


def _read(path: Path) -> list[Any]:
    """The rows of a JSON array or of JSON lines."""
    try:
        text = path.read_text("utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows")
    return rows
