"""Settings of a training run. Imports no torch, so that help stays quick."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from lit_llama.device import TrainingPrecision
from lit_llama.errors import UserError, check_seed
from lit_llama.model.config import Checkpointing, LoRAConfig, Quantization
from lit_llama.wording import param

RUN_FILE = "run.yaml"
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"]
Strategy = Literal["auto", "ddp", "fsdp"]
StoredDtype = Literal["bfloat16", "float16", "float32"]
Resume = Literal["never", "auto"] | Path
Devices = int | Literal["auto"]

CPU_TOKENS, GPU_TOKENS = 1536, 8192
"""Per forward pass: from there on more of them hardly gain speed, and take memory."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Course of the training: how long, how large, how fast.

    Args:
        epochs: Passes over the training split; 0.5 is half of one.
        max_steps: Stop after this many optimizer steps, if that comes first.
        batch_size: Samples per optimizer step.
        micro_batch_tokens: Most tokens per forward pass; less needs less memory and gives the same gradients. auto is
            1536 on a CPU, 8192 on a GPU, or less where the memory asks for it.
        learning_rate: Highest learning rate. auto, which preference training has not, is a published rule by the width
            of the model and the alpha of the adapter, in docs/finetune.md; run.yaml has the number.
        schedule: Course of the learning rate after the warm-up; wsd stays at the top and falls at the end.
        min_lr_ratio: Where cosine, linear and wsd end, as a share of the highest learning rate.
        warmup_ratio: Share of the steps over which the learning rate rises; 0.03 if warmup_steps is not given either.
        warmup_steps: The same as a number of optimizer steps.
        decay_ratio: Share of the steps over which wsd falls at the end; 0.1 if it is not given.
        optimizer: The 8-bit ones keep their two moments in a byte each; paged lets them leave the GPU when it is full.
        beta1: How much of the mean of the gradients is kept from step to step; the momentum of sgd.
        beta2: How much of the mean of their squares is kept.
        eps: Added to the root of that mean before dividing by it.
        weight_decay: Share of a weight, times the learning rate, that each step takes away (not from norms and biases).
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them as they are.
        activation_checkpointing: What is computed again in the backward pass instead of being kept: selective the
            inside of the MLP, full every layer. Less memory, more time, the same gradients.
        eval_interval: Optimizer steps between evaluations on the test split; it is also evaluated before and after.
        sample_prompts: Rows of the test split that are answered at every evaluation; 0 for none.
        neftune_noise_alpha: Size of the noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914), 5
            to 15 in the paper; 0 for none.
        save_interval: Optimizer steps between states that the run can be continued from; one is also saved at the end
            and when a signal stops the run.
        patience: Stop after this many evaluations in a row without a lower test loss; none trains to the end.
        min_delta: How much lower the test loss must be to count as better.
        keep: Which weights the run leaves: those with the lowest test loss, or the last.
    """

    epochs: float = 3
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_tokens: int | Literal["auto"] = "auto"
    learning_rate: float | Literal["auto"] = 3e-4
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: float = 0.0
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    decay_ratio: float | None = None
    optimizer: Optimizer = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    activation_checkpointing: Checkpointing = "none"
    eval_interval: int = 100
    sample_prompts: int = 4
    neftune_noise_alpha: float = 0.0
    save_interval: int = 100
    patience: int | None = None
    min_delta: float = 0.0
    keep: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        _expect(0 < self.epochs <= 1e6, "epochs", self.epochs, "more than 0 and at most 1000000")
        for name in ("batch_size", "eval_interval", "save_interval"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        tokens = self.micro_batch_tokens
        _expect(tokens == "auto" or tokens >= 1, "micro_batch_tokens", tokens, "1 or more, or auto")
        _expect(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        rate = self.learning_rate
        _expect(rate == "auto" or 0 < rate <= 1, "learning_rate", rate, "more than 0 and at most 1, or auto")
        _expect(self.sample_prompts >= 0, "sample_prompts", self.sample_prompts, "0 or more")
        _expect(0 <= self.neftune_noise_alpha < 1e3, "neftune_noise_alpha", self.neftune_noise_alpha, "0 to 1000")
        self._check_schedule()
        for name in ("beta1", "beta2"):
            _expect(0 <= getattr(self, name) < 1, name, getattr(self, name), f"0 <= {name} < 1")
        _expect(0 < self.eps < 1, "eps", self.eps, "more than 0 and less than 1")
        for name in ("weight_decay", "max_grad_norm", "min_delta"):
            _expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        _expect(self.patience is None or self.patience >= 1, "patience", self.patience, "1 or more")
        if self.min_delta and self.patience is None and self.keep == "last":
            raise UserError(
                f"{param('train.min_delta')} is {self.min_delta}, which nothing reads; it goes with "
                f"{param('train.patience')} or "
                f"{param('train.keep', 'best')}"
            )

    def _check_schedule(self) -> None:
        _expect(0 <= self.min_lr_ratio < 1, "min_lr_ratio", self.min_lr_ratio, "0 <= min_lr_ratio < 1")
        if self.min_lr_ratio and self.schedule == "constant":
            raise UserError(
                f"{param('train.min_lr_ratio')} is {self.min_lr_ratio}, but {param('train.schedule', 'constant')} "
                "never falls; "
                "choose cosine, linear or wsd"
            )
        ratio, steps, decay = self.warmup_ratio, self.warmup_steps, self.decay_ratio
        if ratio is not None and steps is not None:
            raise UserError(
                f"{param('train.warmup_ratio', ratio)} and {param('train.warmup_steps', steps)} are both given; give "
                "one of them"
            )
        _expect(ratio is None or 0 <= ratio < 1, "warmup_ratio", ratio, "0 <= warmup_ratio < 1")
        _expect(steps is None or steps >= 0, "warmup_steps", steps, "0 or more")
        _expect(decay is None or 0 < decay <= 1, "decay_ratio", decay, "0 < decay_ratio <= 1")
        if decay is not None and self.schedule != "wsd":
            raise UserError(
                f"{param('train.decay_ratio')} is {decay}, which {param('train.schedule', self.schedule)} does not "
                "read; "
                "it goes with wsd"
            )
        if (ratio or 0) + (decay or 0) > 1:
            raise UserError(
                f"{param('train.warmup_ratio', ratio)} and {param('train.decay_ratio', decay)} are more than the "
                "whole run together"
            )

    @property
    def highest_rate(self) -> float:
        """The learning rate as a number, once `rate.resolved` has made one of auto."""
        assert self.learning_rate != "auto", "a run begins with a number"
        return self.learning_rate

    def tokens_on(self, device: str) -> int:
        """Return the most tokens per forward pass on a kind of device, cpu or cuda."""
        tokens = self.micro_batch_tokens
        return (CPU_TOKENS if device == "cpu" else GPU_TOKENS) if tokens == "auto" else tokens

    def steps(self, rows: int) -> int:
        """Count the optimizer steps of a run over `rows` samples; the last step of an epoch takes what is left.

        A part of an epoch is rounded up to whole steps.
        """
        # As it is written: 0.1 of 30 steps are 3, while the product of the floats is a little more.
        steps = math.ceil(Fraction(str(self.epochs)) * -(-rows // self.batch_size))
        return steps if self.max_steps is None else min(steps, self.max_steps)


def _expect(holds: bool, name: str, value: object, expected: str, group: str = "train") -> None:
    if not holds:
        raise UserError(parameter=f"{group}.{name}", value=value, expected=expected)


FULL = TrainConfig(learning_rate=2e-5)
"""What full fine-tuning begins with: as every weight moves, each moves less."""


PREFERENCE = TrainConfig(epochs=1, learning_rate=2e-5)
"""What preference training begins with: a model that can answer moves a little."""

PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
_BETAS: dict[PreferenceLoss, float] = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Loss by which chosen answers become likelier than rejected ones.

    Args:
        loss: dpo (Rafailov et al. 2023, arXiv:2305.18290); ipo (Azar et al. 2023, arXiv:2310.12036), over means per
            token, as its authors advise and TRL does; simpo (Meng et al. 2024, arXiv:2405.14734) and orpo (Hong et al.
            2024, arXiv:2403.07691), which need no reference; kto (Ethayarajh et al. 2024, arXiv:2402.01306), which
            takes data of single good and bad answers as well. The reference of dpo, ipo and kto is the model as the
            run finds it: the bare base, or with adapter_dir the adapter as it was at the start.
        beta: How much the log probabilities weigh: for dpo, ipo and kto the more, the closer the model stays to its
            reference; for orpo the weight of the odds ratio. 0.1 if it is not given, for simpo 2.
        label_smoothing: Share of pairs taken to be labelled the wrong way round; for dpo and simpo.
        gamma: How far the chosen answer of simpo must lead, in rewards; 0.5 if it is not given.
        sft_weight: Weight of the mean cross entropy of the chosen answer, added to the loss; orpo has it in itself.
        desirable_weight: Weight of good answers in kto.
        undesirable_weight: Weight of bad answers in kto; where one kind has many more rows, choose both so that weight
            times count is about alike.
    """

    loss: PreferenceLoss = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float | None = None
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        losses = get_args(PreferenceLoss)
        _expect(self.loss in losses, "loss", self.loss, f"one of {', '.join(losses)}", "dpo")
        _expect(self.beta is None or 0 < self.beta < math.inf, "beta", self.beta, "more than 0", "dpo")
        _expect(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 to less than 0.5", "dpo")
        _expect(self.gamma is None or 0 <= self.gamma < math.inf, "gamma", self.gamma, "0 or more", "dpo")
        _expect(0 <= self.sft_weight < math.inf, "sft_weight", self.sft_weight, "0 or more", "dpo")
        for name in ("desirable_weight", "undesirable_weight"):
            _expect(0 < getattr(self, name) < math.inf, name, getattr(self, name), "more than 0", "dpo")
        self._goes_with("label_smoothing", self.label_smoothing != 0, "dpo", "simpo")
        self._goes_with("gamma", self.gamma is not None, "simpo")
        self._goes_with("sft_weight", self.sft_weight != 0, "dpo", "ipo", "simpo", "kto")
        for name in ("desirable_weight", "undesirable_weight"):
            self._goes_with(name, getattr(self, name) != 1, "kto")

    def _goes_with(self, name: str, given: bool, *losses: PreferenceLoss) -> None:
        if given and self.loss not in losses:
            raise UserError(
                f"{param(f'dpo.{name}')} is {getattr(self, name)}, which {param('dpo.loss', self.loss)} does not "
                "read; it goes with "
                f"{', '.join(losses)}"
            )

    @property
    def strength(self) -> float:
        """beta, or what it is for this loss where it is not given."""
        return _BETAS[self.loss] if self.beta is None else self.beta

    @property
    def lead(self) -> float:
        """gamma, or what it is where it is not given."""
        return 0.5 if self.gamma is None else self.gamma

    @property
    def refers(self) -> bool:
        """Whether there is a reference."""
        return self.loss not in ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: what trains, on what, how, where.

    Args:
        checkpoint_dir: Base model, a folder in Hugging Face layout; needed unless adapter_dir names it.
        adapter_dir: Adapter to go on with, from here or from PEFT: its values, r, alpha and targets, on its base. The
            result is an adapter of its own in out_dir.
        data_dir: Prepared data folder.
        out_dir: Folder to make for the adapter, report.html, metrics.csv, run.yaml and states/.
        lora: Shape of the adapter.
        dpo: What is learned of the pairs.
        train: Course of the training.
        precision: Of the frozen base and the activations; auto is bf16-true where the hardware is fast at it, 16-mixed
            on a GPU without bfloat16. In the mixed ones only matrix products have 16 bits. The adapter itself is
            always float32.
        quantize: Hold the linear layers of the frozen base in 4 bits (nf4; nf4-dq, a little smaller yet) or 8 (int8),
            which saves most of their memory and costs time; or train with products of 8-bit floats (fp8), faster on
            GPUs that have them and less exact. Merging and generating hold it the same way by themselves.
        dtype: Store the model in this dtype; left out, in that of the base. States are always stored as they train.
        seed: Of the adapter's start, the order of the samples and dropout.
        resume: Continue the run in out_dir from its newest state (auto), or from the state folder named, such as
            OUT/states/step-000100. The result is that of a run that was never stopped. With more train.epochs or
            train.max_steps than before a run is lengthened, a finished one as well.
        loggers: Also tell others: tensorboard, wandb or mlflow, or several of them: [tensorboard,wandb].
        plan: Say what the run needs and whether it fits, and train nothing; config.json and the data are enough.
        plan_memory: The same for a GPU with this much memory, such as 16GB, that is not here.
        plan_device: The same for a kind of GPU, such as v100, t4, a100 or rtx4090, which decides the precision of auto,
            too. Of several sizes of its memory the smallest counts, unless plan_memory is given.
        devices: GPUs of this machine that share the samples of each step, or auto for all of them; without GPUs, as
            many processes on the CPU. The steps are those of one process, and any number of them can continue a run.
            Under torchrun or srun, which start the processes themselves, leave this and num_nodes out.
        num_nodes: Machines that do; each needs the same folders.
        strategy: Each process holds the whole base (ddp), or a part of its layers (fsdp), and where all weights train
            a part of gradients and optimizer, too; auto is ddp where it fits.
        verify: Hash every file that is read, however large, before the work; small ones always are.

    Raises:
        UserError: The seed is out of range.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    data_dir: Path = Path("data/alpaca")
    out_dir: Path = Path("out/lora/alpaca")
    lora: LoRAConfig = LoRAConfig()
    dpo: PreferenceConfig = PreferenceConfig()
    train: TrainConfig = TrainConfig()
    precision: TrainingPrecision = "auto"
    quantize: Quantization | None = None
    dtype: StoredDtype | None = None
    seed: int = 1337
    resume: Resume = "never"
    loggers: LoggerName | list[LoggerName] | None = None
    plan: bool = False
    plan_memory: str | None = None
    plan_device: str | None = None
    devices: Devices = 1
    num_nodes: int = 1
    strategy: Strategy = "auto"
    verify: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def base(self) -> Path:
        """The checkpoint that is trained.

        Raises:
            UserError: Nothing names it.
        """
        if self.checkpoint_dir is None:
            raise UserError(
                "is missing: the base model, a folder in Hugging Face layout",
                parameter="checkpoint_dir",
                remedy=f"or give {param('adapter_dir')}, an adapter to go on with, which names its base",
            )
        return self.checkpoint_dir

    @property
    def only_planned(self) -> bool:
        """Whether nothing is to be trained."""
        return self.plan or self.plan_memory is not None or self.plan_device is not None

    @property
    def all_loggers(self) -> Sequence[LoggerName]:
        """Loggers of the run as a sequence: one, several or none."""
        return [self.loggers] if isinstance(self.loggers, str) else self.loggers or ()

    def settings(self, own: Sequence[str]) -> dict[str, Any]:
        """Return the settings as run.yaml has them.

        Args:
            own: Names of those that not every method has.
        """
        names = ("checkpoint_dir", "data_dir", "out_dir", *own, "train", "precision", "seed", "loggers", "devices")
        values = {name: getattr(self, name) for name in (*names, "num_nodes")}
        values["loggers"] = list(self.all_loggers) or None
        return {name: _as_written(value) for name, value in values.items()}


def _as_written(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) else value


def usual_steps() -> dict[str, int]:
    """Return the settings with which a data folder counts the steps of a run on a CPU: batch_size and
    micro_batch_tokens.
    """
    return {"batch_size": TrainConfig.batch_size, "micro_batch_tokens": CPU_TOKENS}
