"""What a contender is told to do and what it reports: two JSON files between processes. Needs nothing but Python."""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

JOB_FILE, RESULT_FILE = "job.json", "result.json"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way of fine-tuning that all contenders share beyond plain LoRA.

    Attributes:
        flags: Of ours.
        lora: Arguments of PEFT's LoraConfig; None for all weights, without an adapter.
        arguments: Of TRL's configuration.
        mixed: Float32 weights with products in bfloat16, where the processor is fast at it.
        drawn: Whether each step draws numbers, so that losses of two programs differ by chance.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    drawn: bool = False


OptionName = Literal["", "dropout", "dora", "rslora", "neftune", "bf16-mixed", "full"]
OPTIONS: dict[OptionName, Option] = {
    "": Option(),
    "dropout": Option(flags={"lora.dropout": 0.05}, lora={"lora_dropout": 0.05}, drawn=True),
    "dora": Option(flags={"lora.use_dora": True}, lora={"use_dora": True}),
    "rslora": Option(flags={"lora.use_rslora": True}, lora={"use_rslora": True}),
    "neftune": Option(flags={"train.neftune_noise_alpha": 5}, arguments={"neftune_noise_alpha": 5.0}, drawn=True),
    "bf16-mixed": Option(flags={"precision": "bf16-mixed"}, mixed=True),
    "full": Option(lora=None, mixed=True),
}
"""What benchmarks/train.py --option names."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run in a process of its own.

    Args:
        checkpoint_dir: Base model in Hugging Face layout.
        data_dir: Ours reads this data folder, which holds the rows of `rows_file`.
        rows_file: Ids, labels and the rows of every step, as rows.py dumps them.
        start_file: PEFT adapter file with the lora_A that all begin with; empty for the run that makes it.
        out_dir: Folder for the adapter in PEFT's layout.
        steps: Optimizer steps.
        batch_size: Samples per optimizer step.
        micro_batch: Samples per forward pass of the peers; ours has its own default.
        learning_rate: Constant over the run.
        r: Rank of the adapter on all linear layers.
        alpha: The update is scaled by alpha / r.
        seed: Of our order and our lora_A, which the peers are given.
        precision: Of ours, as its flag; empty for that of the option, or else the default.
        quantize: The same; empty for a base as it is stored.
        tuned: The peers' best settings instead of their defaults.
        preference: The rows are pairs of answers, for the loss of DPO.
        option: Name in OPTIONS.
        bfloat16: The processor multiplies bfloat16 fast, so that tuned peers use it.
    """

    checkpoint_dir: str
    data_dir: str
    rows_file: str
    start_file: str
    out_dir: str
    steps: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    r: int
    alpha: int
    seed: int
    precision: Literal["", "bf16-true", "32-true"] = ""
    quantize: str = ""
    tuned: bool = False
    preference: bool = False
    option: OptionName = ""
    bfloat16: bool = True

    def write(self, folder: Path) -> Path:
        """Save as job.json."""
        path = folder / JOB_FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        return path

    @classmethod
    def read(cls) -> "Job":
        """The job that this process was started with: `python -m MODULE job.json`."""
        return cls(**json.loads(Path(sys.argv[1]).read_text("utf-8")))


@dataclass(kw_only=True)
class Course:
    """Filled in while a contender trains.

    Attributes:
        losses: Sum over the trained tokens of each step, divided by their number.
        seconds: Of each whole step: data, forward, backward, optimizer, logging.
        first_step: When the first one was over, in seconds of `time.monotonic`, which all processes share.
        trained_tokens: Of each step, where the contender counts them itself.
        reference: Seconds before the first step in which a preference run computes what the base says to its answers.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_step: float = 0.0
    trained_tokens: list[int] = field(default_factory=list)
    reference: float = 0.0
    _before: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The next step begins now."""
        self._before = time.monotonic()

    def step(self, loss: float, seconds: float | None = None, trained_tokens: int | None = None) -> None:
        """A step is over. Its time is taken since the last call, if the contender does not give it."""
        now = time.monotonic()
        self.first_step = self.first_step or now
        self.losses.append(loss)
        self.seconds.append(now - self._before if seconds is None else seconds)
        if trained_tokens is not None:
            self.trained_tokens.append(trained_tokens)
        self.begin()

    def write(self, job: Job) -> None:
        """Save beside the adapter's folder, where the benchmark looks for it."""
        known: dict[str, Any] = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        (Path(job.out_dir).parent / RESULT_FILE).write_text(json.dumps(known) + "\n", "utf-8")
