"""Settings of a training run. Imports no torch, so that `--help` stays quick."""

from dataclasses import dataclass
from typing import Literal

from lit_llama.errors import UserError

RUN_FILE = "run.yaml"
LoggerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how fast.

    Args:
        epochs: Passes over the training split.
        max_steps: Stop after this many optimizer steps, if that comes first.
        batch_size: Samples per optimizer step.
        micro_batch_tokens: Most tokens per forward pass; less needs less memory and gives the same gradients.
        learning_rate: Highest learning rate.
        schedule: Course of the learning rate after the warm-up.
        warmup_ratio: Share of the steps over which the learning rate rises.
        weight_decay: Decay of the adapter's weights (AdamW).
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them as they are.
        eval_interval: Optimizer steps between evaluations on the test split; it is also evaluated before and after.
        sample_prompts: Rows of the test split that are answered at every evaluation; 0 for none.
        neftune_noise_alpha: Size of the noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914), 5
            to 15 in the paper; 0 for none.
        save_interval: Optimizer steps between states that the run can be continued from; one is also saved at the end
            and when a signal stops the run.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_tokens: int = 2048
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_interval: int = 100
    sample_prompts: int = 4
    neftune_noise_alpha: float = 0.0
    save_interval: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_tokens", "eval_interval", "save_interval"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _expect(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        _expect(0 < self.learning_rate <= 1, "learning_rate", self.learning_rate, "more than 0 and at most 1")
        _expect(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "0 <= warmup_ratio < 1")
        _expect(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _expect(self.sample_prompts >= 0, "sample_prompts", self.sample_prompts, "0 or more")
        _expect(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "0 or more")
        _expect(0 <= self.neftune_noise_alpha < 1e3, "neftune_noise_alpha", self.neftune_noise_alpha, "0 to 1000")

    def steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` samples; the last step of an epoch takes what is left."""
        steps = self.epochs * -(-rows // self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"--train.{name} is {value}, expected {expected}")
