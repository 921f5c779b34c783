"""Footprint of a forward and backward pass: how many bytes it holds at most, found by running it without numbers.

The real model, its adapters and its loss run on tensors that have a shape and no content, while every storage that
comes and goes is counted. Whatever autograd keeps, recomputes or copies is in the result, for any kind of adapter, and
the result cannot drift from the code. A run begins with its largest micro-batch, with numbers, so that one that does
not fit ends in the first minute.

Shapes: T tokens, C hidden.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_llama.device import Numerics
from lit_llama.model.adapters.low_rank import DoRALinear
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import Checkpointing, LLaMAConfig, Quantization
from lit_llama.model.experts import SparseMLP
from lit_llama.model.files.checkpoint import linear_weights
from lit_llama.model.fused.layer import FusedLayer, can_share
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators.kernels import compiled
from lit_llama.model.quantize import is_quantized, quantize_shapes
from lit_llama.text.dataset.batches import Batch, Rows, largest_group
from lit_llama.train.config import TrainConfig
from lit_llama.train.loss import TokenLoss
from lit_llama.train.methods.method import Method

_FEW = 2
"""Layers, or more if that many kinds of them follow each other in turns, of the smaller of the two models from which a
deep one is extrapolated: each layer more adds the same, or each turn of them."""


QUANTIZED_BYTES: dict[Quantization, float] = {
    "nf4": 0.5 + 4 / 64,
    "nf4-dq": 0.5 + (1 + 4 / 256) / 64,
    "int8": 1.0,
    "fp8": 1.0,
}
"""Bytes for each value, the scales of blocks of 64 values and of blocks of 256 scales among them."""


class Sizes(NamedTuple):
    """Bytes of a model.

    Args:
        base: Bytes of the frozen weights as they are stored in training.
        layers: Those of them in the decoder layers; of weights that train, where all of them do.
        head: Bytes of the head, and of the embedding where that is another matrix.
        plain: Bytes of the frozen weights when they are not quantised.
        trained: Values that are trained.
        trained_bytes: Bytes of these.
        largest: Bytes of the largest matrix, not quantised.
    """

    base: int
    layers: int
    head: tuple[int, int]
    plain: int
    trained: int
    trained_bytes: int
    largest: int


class Shape(NamedTuple):
    """Properties of a micro-batch that its memory depends on.

    Args:
        lengths: Places of each sample, in order.
        trained: How many of all places carry a loss.
        parents: Of the samples that go on from another.
    """

    lengths: Sequence[int]
    trained: int
    parents: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Build:
    """Properties of a run that the memory of its passes depends on."""

    config: LLaMAConfig
    method: Method
    numerics: Numerics
    checkpointing: Checkpointing
    quantize: Quantization | None = None
    noise: float = 0.0
    plain: str = ""
    spread: bool = False

    def assembly(self, begin: Callable[[LLaMA], object] | None = None) -> Assembly:
        """Return the order for the model of a run.

        Args:
            begin: Gives what trains its first values, on a model with weights.
        """
        return Assembly(
            adapt=self.method.apply,
            begin=begin,
            noise=self.noise,
            checkpointing=self.checkpointing,
            plain=self.plain,
            product=self.numerics.product,
            spread=self.spread,
        )

    def sizes(self) -> Sizes:
        """Measure the model, without a pass."""
        with torch.device("meta"):
            model = LLaMA(self.config)
        names = linear_weights(model)
        base = layers = plain = largest = 0
        stored = QUANTIZED_BYTES[self.quantize] if self.quantize else 0
        if self.quantize == "fp8" and not self.plain and self.numerics.device.type == "cuda":
            stored *= 2  # as it is, and turned around
        for name, value in model.named_parameters():
            dtype = self.numerics.linear if name in names else self.numerics.rest
            value.data, itemsize = value.data.to(dtype), dtype.itemsize  # what fused layers hold depends on it
            plain += value.numel() * itemsize
            largest = max(largest, value.numel() * itemsize)
            size = value.numel() * itemsize
            if self.quantize and is_quantized(name):
                size = round(value.numel() * stored)
            base += size
            layers += size if name.startswith("model.layers.") else 0
        ends = [weight.nbytes for weight in (model.lm_head.weight, model.model.embed_tokens.weight)]
        head = ends[0], 0 if self.config.tie_word_embeddings else ends[1]
        assemble(model, replace(self.assembly(), checkpointing="none"))
        joined = [part for layer in model.model.layers if isinstance(layer, FusedLayer) for part in layer.joined]
        extra = sum(part.extra * part.dtype.itemsize for part in joined)
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        if self.method.whole:  # nothing is frozen
            return Sizes(extra, layers, head, 0, trained, plain, largest)
        return Sizes(base + extra, layers, head, plain, trained, 4 * trained, largest)

    def training_peak(self, shape: Shape) -> int:
        """Return the most bytes that a forward and backward pass holds beside the parameters and their gradients."""
        return self._deep(lambda build: build._run(shape, train=True))

    def evaluation_peak(self, shape: Shape) -> int:
        """Return the most bytes that a forward pass without gradients holds beside the parameters."""
        return self._deep(lambda build: build._run(shape, train=False))

    def _deep(self, peak: Callable[["Build"], int]) -> int:
        """The peak of all layers from that of a few, where the layers are alike, or whole turns of some kinds."""
        layers, turn = self.config.num_hidden_layers, self._turn
        few = max(_FEW, turn)
        if layers <= few + turn or layers % turn or not self.method.uniform:
            return peak(self)
        one, other = (peak(self._with_layers(number)) for number in (few, few + turn))
        return other + (layers - few - turn) * (other - one) // turn

    @cached_property
    def _turn(self) -> int:
        """After how many layers their kinds repeat."""
        layers = self.config.num_hidden_layers
        kinds = [(self.config.window(index), self.config.beyond(index)) for index in range(layers)]
        return next(turn for turn in range(1, layers + 1) if kinds == (kinds[:turn] * layers)[:layers])

    @cached_property
    def shares(self) -> bool:
        """Whether what samples begin with is computed once for all of them while training."""
        return self._shares[True]

    @cached_property
    def evaluation_shares(self) -> bool:
        """Whether what samples begin with is computed once for all of them in an evaluation, which drops nothing."""
        return self._shares[False]

    @cached_property
    def _shares(self) -> dict[bool, bool]:
        """Both, by whether it trains."""
        if self.numerics.device.type != "cpu" or compiled() is None:
            return {True: False, False: False}
        with self._empty():
            model = self._representative._model()
            return {train: can_share(model.train(train)) for train in (True, False)}

    def _with_layers(self, number: int) -> "Build":
        return replace(self, config=self.config.shortened(number))

    @property
    def _representative(self) -> "Build":
        """The fewest layers that have one of each kind, and all that an adapter may name."""
        return self._with_layers(self._turn) if self.method.uniform else self

    @cached_property
    def _on_meta(self) -> bool:
        """Whether tensors of the device meta do, which take a quarter of the time of FakeTensorMode's. Autocast knows
        no such device, so that products in 16 bits need the latter, but for fused layers: these cast for themselves,
        except for the norms of DoRA."""
        if self.quantize == "fp8":  # whose product torch lets through there in a GPU's layout alone
            return False
        if self.numerics.product is None:
            return True
        with torch.device("meta"):
            model = LLaMA(self._representative.config)
        names = linear_weights(model)
        for name, value in model.named_parameters():
            value.data = value.data.to(self.numerics.linear if name in names else self.numerics.rest)
        plain = assemble(model, replace(self.assembly(), checkpointing="none")).plain
        return not plain and not any(isinstance(module, DoRALinear) for module in model.modules())

    def _empty(self) -> AbstractContextManager[object]:
        """Make tensors without numbers, in a context."""
        return nullcontext() if self._on_meta else FakeTensorMode(allow_non_fake_inputs=True)

    def _run(self, shape: Shape, *, train: bool) -> int:
        layout = Packed(shape.lengths, parents=shape.parents)
        with self._empty():
            loss_of = self.method.loss_of(self._model()).train(train)
            device = loss_of.model.lm_head.weight.device
            counts = sum(shape.lengths), shape.trained
            ids, targets = (torch.empty(count, dtype=torch.int64, device=device) for count in counts)
            for parameter in loss_of.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with _Count(loss_of) as count, torch.set_grad_enabled(train):
                with replace(self.numerics, device=torch.device("cpu")).autocast():
                    loss = loss_of.of_layout(ids, layout, targets, targets).sum()  # of a number, or of each token's
                if train:
                    loss.backward()
        return count.peak

    def _model(self) -> LLaMA:
        """The assembled model, on tensors without content."""
        on_gpu = self.numerics.device.type == "cuda"
        assembly = replace(self.assembly(), dress=_dress_on_gpu if on_gpu else _share_evenly, keep_memory=False)
        return assemble(self._stored, assembly).model

    def _stored(self) -> LLaMA:
        """The model of the base without content, as checkpoint.load_model stores it."""
        with torch.device("meta"):
            model = LLaMA(self.config)
        names = linear_weights(model)
        device, numbers = "meta" if self._on_meta else "cpu", self.numerics
        state = {
            name: torch.empty(value.shape, dtype=numbers.linear if name in names else numbers.rest, device=device)
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        if self.quantize:
            quantize_shapes(model, self.quantize)
        return model


class _Count(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most they were; what `module` owns does not count, as in sizes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._on_meta = any(parameter.is_meta for parameter in module.parameters())
        own = [tensor for parameter in module.parameters() for tensor in (parameter, parameter.grad)]
        layers = [layer for layer in module.modules() if isinstance(layer, FusedLayer)]
        own += [tensor for layer in layers for joined in layer.joined for tensor in joined.held]  # see `Build.sizes`
        self._known = {tensor.untyped_storage()._cdata for tensor in own if tensor is not None}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        if self._on_meta and any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves(given)):
            given = tree_map_only(Tensor, _emptied, given)  # places and angles, of which there are numbers
        result = function(*given[0], **given[1])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _emptied(value: Tensor) -> Tensor:
    return value if value.is_meta else torch.empty_like(value, device="meta")


def _share_evenly(model: LLaMA) -> None:
    """Let experts have equally many tokens, as there are no numbers to choose by."""
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.evenly = True


def _dress_on_gpu(model: LLaMA) -> None:
    _share_evenly(model)
    _fuse_norms(model)


def _fuse_norms(model: LLaMA) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(module, name, _FusedNorm(child))


class _FusedNorm(nn.Module):
    """A GPU's norm is one kernel that keeps its input; elsewhere it is a chain of operations that keep more."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Norm.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def largest_batch(
    split: Rows, config: TrainConfig, device: str, seed: int, processes: int = 1, *, share: bool = False
) -> Batch:
    """Find the largest micro-batch that the steps of a run meet, in whichever process; `share` as in `collate`."""
    rows = largest_group(
        split.lengths,
        batch_size=config.batch_size,
        micro_batch_tokens=config.tokens_on(device),
        seed=seed,
        steps=config.steps(len(split)),
        shares=processes,
    )
    return split.batch(rows, share=share)


def probe(loss_of: TokenLoss, backward: Callable[[Tensor], object], batch: Batch) -> None:
    """Run `batch` forward and backward and leave no trace: no gradients, the same random numbers afterwards.

    It runs twice, as the second time meets the gradients of the first, and real steps have several micro-batches.
    """
    device = next(loss_of.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            backward(loss_of.of_batch(batch))
    for parameter in loss_of.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
