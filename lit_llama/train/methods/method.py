"""The ways of fine-tuning: which weights train, and how they are written and read back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from lit_llama.conversion.source import SETTINGS_FILE
from lit_llama.device import Numerics
from lit_llama.model.adapters.lora import apply_lora, parameter_groups
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, restore_adapter, save_adapter
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.weights import Weights
from lit_llama.model.llama import LLaMA
from lit_llama.train.config import PreferenceConfig, RunConfig
from lit_llama.train.distributed.processes import ALONE, Processes
from lit_llama.train.distributed.shards import put
from lit_llama.train.inputs import Inputs, Kind
from lit_llama.train.loss import TokenLoss
from lit_llama.train.methods.preference import PairLoss
from lit_llama.train.methods.warm_start import Start
from lit_llama.train.optim import decay_groups
from lit_llama.wording import call


class Method(Protocol):
    """Method of fine-tuning, with what it has of its own; everything else in this room serves all of them."""

    @property
    def name(self) -> str:
        """Name of the method, as `finetune` has it."""

    @property
    def result(self) -> str:
        """Name of the result, in a word."""

    @property
    def marker(self) -> str:
        """The file that makes a folder a result: it is written last."""

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the settings of a run that other methods have not."""

    @property
    def uniform(self) -> bool:
        """Whether every layer is treated alike."""

    @property
    def whole(self) -> bool:
        """Whether the weights of the base train, so that nothing of it is frozen."""

    @property
    def rows(self) -> Kind:
        """The rows that it learns of."""

    @property
    def refers(self) -> bool:
        """Whether its loss compares with the model as it begins, on every row."""

    def loss_of(self, model: LLaMA, numerics: Numerics | None = None, processes: Processes = ALONE) -> TokenLoss:
        """Build the module of a model together with what is minimized, by these processes."""

    def apply(self, model: LLaMA) -> str:
        """Let the weights require gradients that are to train; says in a few words what they are.

        Raises:
            UserError: Settings that do not fit the model.
        """

    def begin(self, model: LLaMA) -> None:
        """Give what trains the values that it begins with, after `apply` on a model with weights."""

    @property
    def origin(self) -> Mapping[str, str]:
        """Fingerprints of what it begins with beside the base, by name; they must not change when a run goes on."""

    @property
    def starts_with(self) -> str:
        """The parameter by which another run begins with a result."""

    def groups(self, model: LLaMA, weight_decay: float) -> list[dict[str, Any]]:
        """Return what trains, in groups for an optimizer: `params`, `weight_decay`, and `lr_ratio` to the learning
        rate.
        """

    def write(self, model: LLaMA, folder: Path, inputs: Inputs, given: Mapping[str, Tensor], *, exact: bool) -> None:
        """Write the trained weights into `folder`, in the layout of the result.

        Args:
            model: What is trained.
            folder: Where to.
            inputs: What the run has read.
            given: Gives whole weights by their names, where processes have parts of them; see `shards.gather`.
            exact: For a state, which `restore` reads: every bit. Otherwise in the dtype of the result.
        """

    def restore(self, model: LLaMA, folder: Path) -> None:
        """Put what `write` wrote back into a model after `apply`, bit by bit."""

    def next(self, out_dir: Path) -> str:
        """Return the call that most people make on the result."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters; the result is an adapter folder in PEFT's layout.

    Args:
        config: Their shape.
        start: An adapter whose values they begin with; None for a random A, and a B of zeros.
    """

    config: LoRAConfig
    start: Start | None = None
    name: str = "lora"
    starts_with: str = "adapter_dir"
    result: str = "adapter"
    marker: str = CONFIG_FILE
    own: tuple[str, ...] = ("adapter_dir", "lora", "quantize", "strategy")
    whole: bool = False

    @property
    def rows(self) -> Kind:
        return "samples"

    @property
    def refers(self) -> bool:
        return False

    def loss_of(self, model: LLaMA, numerics: Numerics | None = None, processes: Processes = ALONE) -> TokenLoss:
        return TokenLoss(model, numerics)

    @property
    def uniform(self) -> bool:
        config = self.config
        return config.pattern is None and not any(
            "." in name for name in (*config.targets, *config.rank_pattern, *config.alpha_pattern)
        )

    def apply(self, model: LLaMA) -> str:
        adapted = apply_lora(model, self.config)
        return f"in {len(adapted)} layers" + (f" as {self.start.folder} left them" if self.start else "")

    def begin(self, model: LLaMA) -> None:
        if self.start:
            self.start.put_on(model)

    @property
    def origin(self) -> Mapping[str, str]:
        return {"the adapter (fingerprint)": self.start.fingerprint} if self.start else {}

    def groups(self, model: LLaMA, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(model, self.config.loraplus_lr_ratio, weight_decay)

    def write(self, model: LLaMA, folder: Path, inputs: Inputs, given: Mapping[str, Tensor], *, exact: bool) -> None:
        save_adapter(model, self.config, folder, inputs.base["path"])

    def restore(self, model: LLaMA, folder: Path) -> None:
        restore_adapter(model, folder)

    def next(self, out_dir: Path) -> str:
        return call("merge", adapter_dir=out_dir, destination_path=f"checkpoints/{out_dir.name}-merged")


@dataclass(frozen=True)
class Preference(LoRA):
    """Low-rank adapters that make chosen answers likelier than rejected ones.

    The reference is the model as it begins: a B of zeros is the base, and what an adapter begins with counts.

    Args:
        preference: What is learned of the pairs.
    """

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    name: str = "dpo"
    own: tuple[str, ...] = ("adapter_dir", "lora", "dpo", "quantize", "strategy")

    @property
    def rows(self) -> Kind:
        return "answers" if self.preference.loss == "kto" else "pairs"

    @property
    def refers(self) -> bool:
        return self.preference.refers

    def loss_of(self, model: LLaMA, numerics: Numerics | None = None, processes: Processes = ALONE) -> TokenLoss:
        return PairLoss(model, numerics, self.preference, processes)


@dataclass(frozen=True)
class Full:
    """All weights; the result is a checkpoint folder.

    Args:
        dtype: In which the result is stored, such as bfloat16; None for that of each tensor of the base.
    """

    dtype: str | None = None
    name: str = "full"
    starts_with: str = "checkpoint_dir"
    result: str = "model"
    marker: str = SETTINGS_FILE
    own: tuple[str, ...] = ("dtype", "strategy")
    uniform: bool = True
    whole: bool = True
    rows: Kind = "samples"
    refers: bool = False

    def loss_of(self, model: LLaMA, numerics: Numerics | None = None, processes: Processes = ALONE) -> TokenLoss:
        return TokenLoss(model, numerics)

    def apply(self, model: LLaMA) -> str:
        model.requires_grad_(True)
        return "(all of them)"

    def begin(self, model: LLaMA) -> None:
        pass

    @property
    def origin(self) -> Mapping[str, str]:
        return {}

    def groups(self, model: LLaMA, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(model.named_parameters(), weight_decay)

    def write(self, model: LLaMA, folder: Path, inputs: Inputs, given: Mapping[str, Tensor], *, exact: bool) -> None:
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.") if exact else self.dtype
        inputs.frame.write(folder, given, dtype, inputs.template)

    def restore(self, model: LLaMA, folder: Path) -> None:
        stored = Weights(folder)
        for name, parameter in model.named_parameters():
            put(parameter, stored[name])

    def next(self, out_dir: Path) -> str:
        return call("load", folder=out_dir)


def method_of(name: Literal["lora", "full", "dpo"], config: RunConfig) -> Method:
    """Return the method of a name, with its settings in a run."""
    if name == "full":
        return Full(config.dtype)
    return LoRA(config.lora) if name == "lora" else Preference(config.lora, preference=config.dpo)
