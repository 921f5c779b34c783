"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): what is not kept is computed again when needed.

Shapes: T tokens, C hidden, I intermediate.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llama.model.attention.layout import Layout
from lit_llama.model.config import Checkpointing
from lit_llama.model.fused.layer import FusedLayer
from lit_llama.model.llama import MLP, DecoderLayer, LLaMA
from lit_llama.model.rope import Rotation


class RecomputedLayer(DecoderLayer):
    """A decoder layer that keeps its input alone, (T, C), and runs a second time in the backward pass."""

    def __init__(self, layer: DecoderLayer) -> None:
        _adopt(self, layer)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Run the layer: (T, C) -> (T, C). Dropout draws the same again: the state of the generators is put back for
        it.
        """
        y: Tensor = checkpoint(super().forward, x, rotation, layout, use_reentrant=False)
        return y


class RecomputedMLP(MLP):
    """An MLP that keeps its input (T, C) and silu(gate) * up (T, I), of the four of that size that it goes through.

    Gate and up take less than half of a layer's time and about half of its memory; the product is kept so that `down`
    need not run again.
    """

    def __init__(self, mlp: MLP) -> None:
        _adopt(self, mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP: (T, C) -> (T, C)."""
        return self.down(checkpoint(self.product, x, use_reentrant=False))


def recompute_activations(model: LLaMA, mode: Checkpointing) -> None:
    """Replace layers or their MLPs, in place; names, parameters and gradients stay the same.

    Call it when every other replacement is done.
    """
    layers = model.model.layers
    for index, layer in enumerate(layers):
        assert isinstance(layer, DecoderLayer)
        if isinstance(layer, FusedLayer):  # which does it itself
            continue
        if mode == "full":
            layers[index] = RecomputedLayer(layer)
        elif mode == "selective":
            for parent in list(layer.modules()):  # the layer, or the experts of its mixture
                for name, child in list(parent.named_children()):
                    if type(child) is MLP:
                        setattr(parent, name, RecomputedMLP(child))


def _adopt(module: Any, other: nn.Module) -> None:
    """Make `module` hold what `other` holds, instead of building it once more."""
    nn.Module.__init__(module)
    module.__dict__.update(other.__dict__)
