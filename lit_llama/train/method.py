"""The ways of fine-tuning: which weights train, and how they are written and read back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lit_llama.model.adapter import CONFIG_FILE, restore_adapter, save_adapter
from lit_llama.model.config import LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import apply_lora, parameter_groups


class Method(Protocol):
    """What one way of fine-tuning has of its own; everything else in this room serves all of them."""

    @property
    def door(self) -> str:
        """The script that runs it."""

    @property
    def result(self) -> str:
        """What it makes, in a word."""

    @property
    def marker(self) -> str:
        """The file that makes a folder a result: it is written last."""

    @property
    def uniform(self) -> bool:
        """Whether every layer is treated alike."""

    def apply(self, model: LLaMA) -> str:
        """Let the weights require gradients that are to train; says in a few words what they are.

        Raises:
            UserError: Settings that do not fit the model.
        """

    def groups(self, model: LLaMA, weight_decay: float) -> list[dict[str, Any]]:
        """What trains, in groups for an optimizer: `params`, `weight_decay`, and `lr_ratio` to the learning rate."""

    def write(self, model: LLaMA, folder: Path, checkpoint_dir: Path) -> None:
        """Write the trained weights into `folder`, in the layout of the result."""

    def restore(self, model: LLaMA, folder: Path) -> None:
        """Put what `write` wrote back into a model after `apply`, bit by bit."""

    def next(self, out_dir: Path) -> str:
        """The command that most people run on the result."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters; the result is an adapter folder in PEFT's layout."""

    config: LoRAConfig
    door: str = "finetune/lora.py"
    result: str = "adapter"
    marker: str = CONFIG_FILE

    @property
    def uniform(self) -> bool:
        config = self.config
        return not any("." in name for name in (*config.targets, *config.rank_pattern, *config.alpha_pattern))

    def apply(self, model: LLaMA) -> str:
        adapted = apply_lora(model, self.config)
        return f"in {len(adapted)} layers"

    def groups(self, model: LLaMA, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(model, self.config.loraplus_lr_ratio, weight_decay)

    def write(self, model: LLaMA, folder: Path, checkpoint_dir: Path) -> None:
        save_adapter(model, self.config, folder, str(checkpoint_dir))

    def restore(self, model: LLaMA, folder: Path) -> None:
        restore_adapter(model, folder)

    def next(self, out_dir: Path) -> str:
        merged = f"checkpoints/{out_dir.name}-merged"
        return f"python finetune/merge.py --adapter_dir {out_dir} --destination_path {merged}"
