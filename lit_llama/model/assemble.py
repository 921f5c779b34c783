"""The one order in which a runnable model is put together: load and quantise, adapt, noise, fuse, recompute.

Training, its plan on tensors without content, merging and generation differ in where the weights come from and in what
they ask for; what follows from what is decided here alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lit_llama.model.adapters.low_rank import LoRALinear
from lit_llama.model.adapters.neftune import add_noise
from lit_llama.model.adapters.peft_folder import load_adapter
from lit_llama.model.adapters.rows import WholeLinear
from lit_llama.model.config import Checkpointing
from lit_llama.model.fused.layer import FusedLayer, fuse
from lit_llama.model.fused.reasons import why_plain
from lit_llama.model.llama import DecoderLayer, LLaMA
from lit_llama.model.recompute import recompute_activations

CHUNKED = (nn.Linear, LoRALinear, WholeLinear)
"""Heads whose logits the loss holds a few at a time."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Parts that are put on a loaded model.

    Args:
        adapt: Puts adapters on the model, or lets its weights train; in what, for people.
        begin: Gives what trains the values that it begins with.
        noise: NEFTune's alpha of the noise on the embeddings while training; 0 for none.
        plain: Why no layer is to be fused, for people; "" to fuse all that can be.
        checkpointing: What is computed again in the backward pass.
        product: Dtype of the matrix products, if it is not that of the norms (autocast).
        dress: Changes modules after layers are fused.
        keep_memory: Fused layers keep their memory from step to step.
        spread: The frozen weights of layers will be spread over processes, each layer whole only while it computes.
        device: Where layers will compute; None for where their weights are.
    """

    adapt: Callable[[LLaMA], str] | None = None
    begin: Callable[[LLaMA], object] | None = None
    noise: float = 0.0
    plain: str = ""
    checkpointing: Checkpointing = "none"
    product: torch.dtype | None = None
    dress: Callable[[LLaMA], object] | None = None
    keep_memory: bool = True
    spread: bool = False
    device: torch.device | None = None


@dataclass(frozen=True)
class Assembled:
    """A runnable model and the way its layers compute.

    Attributes:
        model: As it was put together.
        trains: In what weights train, for people.
        fused: Layers with a backward pass of their own.
        plain: Layers without, by the reason.
        head: Why the loss holds all logits at once, for people; "" where it holds a few at a time.
    """

    model: LLaMA
    trains: str
    fused: int
    plain: Mapping[str, int]
    head: str = ""

    def describe(self) -> str:
        """Describe which layers are fused and which are not, and why, in one line."""
        counts = [f"{self.fused} fused"] if self.fused else []
        counts += [f"{count} plain ({reason})" for reason, count in self.plain.items()]
        return f"layers: {', '.join(counts)}" + (f"; head: plain ({self.head})" if self.head else "")


def adapted(folder: Path, remarks: list[str] | None = None) -> Assembly:
    """Return the order for a model that only computes, with the adapter of a folder on it.

    Args:
        folder: The adapter, ours or PEFT's.
        remarks: Takes what people should know of its files.
    """

    def adapt(model: LLaMA) -> str:
        placed = load_adapter(model, folder)
        if remarks is not None:
            remarks.extend(placed.remarks)
        return ""

    return Assembly(adapt=adapt, plain="nothing trains")


def assemble(base: LLaMA | Callable[[], LLaMA], assembly: Assembly) -> Assembled:
    """Put a runnable model together.

    Args:
        base: The model with its weights, quantised as they were read, or what loads it.
        assembly: What is put on it.

    Raises:
        UserError: Settings of `adapt` do not fit the model.
    """
    model = base if isinstance(base, LLaMA) else base()
    trains = assembly.adapt(model) if assembly.adapt else ""
    if assembly.begin:
        assembly.begin(model)
    add_noise(model, assembly.noise)
    reasons: Counter[str] = Counter()
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        if reason := assembly.plain or why_plain(layer, assembly.product):
            reasons[reason] += 1
    if not assembly.plain:
        fuse(
            model,
            assembly.checkpointing,
            assembly.product,
            keep_memory=assembly.keep_memory,
            spread=assembly.spread,
            device=assembly.device,
        )
    if assembly.dress:
        assembly.dress(model)
    recompute_activations(model, assembly.checkpointing)
    fused = sum(isinstance(layer, FusedLayer) for layer in model.model.layers)
    kind = type(model.lm_head)
    head = "" if kind in CHUNKED else f"as {kind.__name__}, all of its logits at once"
    return Assembled(model, trains, fused, dict(reasons), head)
