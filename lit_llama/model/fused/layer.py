"""A decoder layer with a backward pass of its own: few and large matrix products, little between them, little kept.

Of each token it keeps the input, the rotated queries, keys and values, what attention gives, the stream after it, gate
and up, and the few numbers of the updates. Norms and the gated product are computed again in the backward pass, in the
passes over memory that their gradients need anyway; so are queries and keys that are normalised, which are kept as they
were projected. Which inputs of updates are dropped is drawn again from its seed. llama.DecoderLayer is its plain twin,
and what it was: the modules, their names and their parameters stay.

Shapes: T tokens, C hidden, I intermediate, H query heads, G key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model.attention.dispatch import Heads, Kept, attend_backward, attend_into
from lit_llama.model.attention.layout import Layout, Packed
from lit_llama.model.config import Checkpointing
from lit_llama.model.fused.joined import Dropped
from lit_llama.model.fused.quantized import join, kind_of
from lit_llama.model.llama import Attention, DecoderLayer, LLaMA
from lit_llama.model.low_rank import DoRALinear, base_of
from lit_llama.model.operators import pointwise
from lit_llama.model.operators.kernels import native
from lit_llama.model.rope import Rotation

ALIGNED = 64
"""Values at whose multiples parts begin, so that vectors do not cross lines of the cache."""
SLACK = 8
"""A piece is larger than needed by one part in so many, as the next micro-batch may be. Nothing is there until it is
used."""


class Arena:
    """Memory in which the layers of a model keep what their backward passes need, a piece each.

    On a CPU it is one block, used again in every step: pieces made anew would leave holes in the heap, as gradients and
    what the library remembers of its products come to lie between them. A GPU's memory has an allocator for that.

    Args:
        pieces: How many are taken at most until the first is given back.
        kept: Whether pieces are used again; a plan counts each as it comes and goes.
    """

    def __init__(self, pieces: int, *, kept: bool = True) -> None:
        self._pieces, self._size, self._kept = pieces, 0, kept
        self._held = False
        self._free: list[Tensor] = []

    def take(self, like: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return a flat piece, and parts of it of so many values each, as aligned as tensors of their own."""
        spans = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        piece = self._piece(like, sum(spans))
        parts = piece[: sum(spans)].split(spans)
        return piece, [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def _piece(self, like: Tensor, size: int) -> Tensor:
        if not self._kept or not capabilities(like.device).on_cpu:
            return like.new_empty(size)
        if (size > self._size or not self._held) and len(self._free) == self._pieces * self._held:
            self._free.clear()  # first of all, so that its memory can be had again
            if size > self._size:
                self._size = -(-(size + size // SLACK) // ALIGNED) * ALIGNED
            self._held = True
            block = like.new_empty(self._pieces * self._size)
            # By .data autograd takes each for itself: what is written into one does not spoil what another keeps.
            self._free = [piece.data for piece in block.split(self._size)]
        return self._free.pop() if self._free and size <= self._size else like.new_empty(size)

    def give(self, piece: Tensor) -> None:
        """Take it back: nobody needs what is in it."""
        if self._held and piece.numel() == self._size and len(self._free) < self._pieces:
            self._free.append(piece)

    def give_back(self) -> None:
        """Let go of all of it, unless a part is still needed; the next piece brings it back, as large as it was."""
        if self._held and len(self._free) == self._pieces:
            self._free.clear()
            self._held = False


def fuse(model: LLaMA, leave: Checkpointing = "none", *, keep_memory: bool = True) -> int:
    """Replace the layers that can be by fused ones, in place; gives their number.

    Call it when all other replacements are done and the weights are where they stay, and not where autocast is to
    choose other numbers than those of the norms.

    Args:
        model: Frozen but for its adapters.
        leave: What is computed again in the backward pass.
        keep_memory: Layers keep their memory from step to step.
    """
    layers = model.model.layers
    arena = Arena(1 if leave == "full" else len(layers), kept=keep_memory)
    for index, layer in enumerate(layers):
        if isinstance(layer, DecoderLayer) and not why_plain(layer):
            layers[index] = FusedLayer(layer, leave, arena)
    return sum(isinstance(layer, FusedLayer) for layer in layers)


def give_back(model: LLaMA) -> None:
    """Let go of the memory that fused layers keep from step to step, until the next step takes it again."""
    for layer in model.model.layers:
        if isinstance(layer, FusedLayer):
            layer.arena.give_back()


def can_share(model: LLaMA) -> bool:
    """Whether samples may go on from another one at no more cost than their own tokens, with the same result.

    Noise on the embeddings, and while training dropout, is drawn for each token of each sample: of one that several
    have in common it would be the same for all of them. Dynamic positions depend on the whole length of a sample.
    """
    scaling, weight = model.config.rope_scaling, model.lm_head.weight
    return (
        all(isinstance(layer, FusedLayer) and not layer.drops for layer in model.model.layers)
        and model.model.noise is None
        and (scaling is None or not scaling.by_length)
        and native(weight)
    )


def why_plain(layer: DecoderLayer) -> str:
    """Explain why a layer cannot be fused, for people; "" if it has no more than what is written here."""
    if layer.beyond:
        return layer.beyond
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms: list[nn.Module] = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (attention.q_norm, attention.k_norm) if type(norm) is not nn.Identity]
    kinds = [kind_of(linear) for linear in linears]
    if None in kinds:
        unknown = linears[kinds.index(None)]
        return "DoRA" if isinstance(unknown, DoRALinear) else f"linear layers as {type(unknown).__name__}"
    if len({*kinds}) > 1:
        return "linear layers held in several ways"
    if any(type(norm) is not nn.RMSNorm for norm in norms):
        return "norms that train"
    bases = [base_of(linear) for linear in linears]
    weights = [module.weight for module in (*norms, *bases) if isinstance(module, nn.Linear | nn.RMSNorm)]
    if any(weight.requires_grad for weight in weights):
        return "weights of the base that train"
    if any(base.bias is not None and base.bias.requires_grad for base in bases):
        return "biases that train"
    return "weights of several dtypes" if len({weight.dtype for weight in weights}) > 1 else ""


class _Drops(NamedTuple):
    """Dropout of a forward pass, of the joined layers in their order."""

    qkv: Dropped
    out: Dropped
    gate_up: Dropped
    down: Dropped


class FusedLayer(DecoderLayer):
    """A decoder layer that computes as above where it is given packed samples, and plainly where it is not."""

    def __init__(self, layer: DecoderLayer, leave: Checkpointing, arena: Arena) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention)
        self.leave, self.arena = leave, arena
        eps = layer.input_layernorm.eps
        assert eps is not None
        self.eps = eps
        self.head_norms = [norm for norm in (attention.q_norm, attention.k_norm) if isinstance(norm, nn.RMSNorm)]
        like = layer.input_layernorm.weight
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj], like)
        self.out = join([attention.o_proj], like)
        self.gate_up = join([mlp.gate_proj, mlp.up_proj], like)
        self.down = join([mlp.down_proj], like)
        self.joined = (self.qkv, self.out, self.gate_up, self.down)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Run the layer: (T, C) -> (T, C)."""
        if not isinstance(layout, Packed) or x.dtype != self.input_layernorm.weight.dtype:
            return super().forward(x, rotation, layout)
        for joined in self.joined:
            joined.refresh()
        parameters = [parameter for joined in self.joined for parameter in joined.parameters]
        backward = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))  # which the function cannot know
        drops = _Drops(*(joined.draw() for joined in self.joined))
        y: Tensor = _Layer.apply(x, self, rotation, layout, drops, backward, *parameters)  # type: ignore[no-untyped-call]
        return y

    @property
    def drops(self) -> bool:
        """Whether updates drop values of their inputs, as their modes are now."""
        return any(chance for joined in self.joined for chance in joined.chances)

    def heads(self, qkv: Tensor) -> Heads:
        """Return views of (T, (H + 2 G) D)."""
        q, k, v = (part.unflatten(1, (-1, self.self_attn.head_dim)) for part in qkv.split(self.qkv.sizes, dim=1))
        return q, k, v


@dataclass
class _Kept:
    """What the backward pass needs of a layer; u are the last columns of the buffers, see joined.py."""

    qkv: Tensor  # (T, (H + 2 G) D), rotated; as projected where heads are normalised
    attended: Tensor  # (T, H D + R)
    middle: Tensor  # (T, C), the stream between attention and MLP
    u_qkv: Tensor
    u_down: Tensor
    gate_up: Tensor  # (T, 2 I); it and its u are empty where they are computed again
    u_gate_up: Tensor
    attention: Kept

    def tensors(self) -> list[Tensor]:
        named = [self.qkv, self.attended, self.middle, self.u_qkv, self.u_down, self.gate_up, self.u_gate_up]
        return [*named, *self.attention.tensors]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], graph: Any = None) -> "_Kept":
        qkv, attended, middle, u_qkv, u_down, gate_up, u_gate_up, *attention = tensors
        return cls(qkv, attended, middle, u_qkv, u_down, gate_up, u_gate_up, Kept(attention, graph))

    @classmethod
    def within(cls, layer: FusedLayer, x: Tensor) -> "tuple[Tensor, Tensor, _Kept]":
        """A piece of memory for the tokens of x (T, C), and in it the places of the layer's result and of these."""
        qkv, out, gate_up, down = layer.joined
        widths = [down.outputs, qkv.outputs, out.inputs + out.tail, out.outputs, qkv.tail, down.tail]
        widths += [0, 0] if layer.leave == "selective" else [gate_up.outputs, gate_up.tail]
        piece, parts = layer.arena.take(x, [len(x) * width for width in widths])
        y, *places = (part.view(len(x), width) for part, width in zip(parts, widths, strict=True))
        return piece, y, cls.of(places)


def _forward(
    layer: FusedLayer, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Packed, drops: _Drops
) -> tuple[Tensor, Tensor, _Kept]:
    """The layer, the piece of memory in which its result is, and what its backward pass needs."""
    piece, y, kept = _Kept.within(layer, x)
    cos, sin = (part.flatten(1) for part in rotation)  # (T, D/2)
    first = layer.input_layernorm
    normed = layer.qkv.buffer_in(x)
    pointwise.norm(normed[:, : layer.qkv.inputs], x, first.weight, layer.eps)
    layer.qkv(kept.qkv, normed, dropped=drops.qkv)
    pointwise.copy(kept.u_qkv, normed[:, layer.qkv.inputs :])
    del normed
    heads = layer.heads(kept.qkv)
    if layer.head_norms:
        heads = _normalised(layer, heads, cos, sin)
    else:
        for part in heads[:2]:
            pointwise.rotate(part, part, cos, sin)
    attended = kept.attended[:, : layer.out.inputs].unflatten(1, (-1, layer.self_attn.head_dim))  # (T, H, D)
    kept.attention = attend_into(attended, heads, layout, layer.self_attn.window, again=bool(layer.head_norms))
    del heads
    layer.out(kept.middle, kept.attended, residual=x, dropped=drops.out)
    gate_up = _gate_up(layer, kept, drops)
    product = layer.down.buffer_in(x)
    pointwise.swiglu(product[:, : layer.down.inputs], gate_up)
    layer.down(y, product, residual=kept.middle, dropped=drops.down)
    pointwise.copy(kept.u_down, product[:, layer.down.inputs :])
    return y, piece, kept


def _normalised(layer: FusedLayer, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    """Heads as they attend, of those that are projected: queries and keys normalised and rotated, elsewhere."""
    attending = []
    for part, norm in zip(heads[:2], layer.head_norms, strict=True):
        own = _elsewhere(part)
        rows = own.flatten(0, 1)  # (T N, D)
        pointwise.norm(rows, rows, norm.weight, layer.eps)
        pointwise.rotate(own, own, cos, sin)
        attending.append(own)
    return attending[0], attending[1], heads[2]


def _elsewhere(part: Tensor) -> Tensor:
    """A copy of heads (T, N, D) whose rows lie in one piece."""
    own = part.new_empty(part.shape)
    pointwise.copy(own.flatten(1), part.flatten(1))
    return own


def _gate_up(layer: FusedLayer, kept: _Kept, drops: _Drops) -> Tensor:
    """Gate and up side by side (T, 2 I), kept with their u where there is a place for them."""
    joined, norm, middle = layer.gate_up, layer.post_attention_layernorm, kept.middle
    normed = joined.buffer_in(middle)
    pointwise.norm(normed[:, : joined.inputs], middle, norm.weight, layer.eps)
    gate_up = kept.gate_up if kept.gate_up.numel() else middle.new_empty(len(middle), joined.outputs)
    joined(gate_up, normed, dropped=drops.gate_up)
    if kept.gate_up.numel():
        pointwise.copy(kept.u_gate_up, normed[:, joined.inputs :])
    return gate_up


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: FusedLayer,
        rotation: tuple[Tensor, Tensor],
        layout: Packed,
        drops: _Drops,
        backward: bool,
        *parameters: Tensor,
    ) -> Tensor:
        y, piece, kept = _forward(layer, x, rotation, layout, drops)
        ctx.layer, ctx.rotation, ctx.layout, ctx.drops = layer, rotation, layout, drops
        if backward and layer.leave != "full":
            ctx.piece, ctx.graph = piece, kept.attention.graph
            ctx.save_for_backward(x, *kept.tensors())
        else:
            y = y.clone()
            layer.arena.give(piece)
            ctx.save_for_backward(*[x] * backward)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layer, rotation, layout, drops = ctx.layer, ctx.rotation, ctx.layout, ctx.drops
        x, *tensors = ctx.saved_tensors
        if tensors:
            piece, kept = ctx.piece, _Kept.of(tensors, ctx.graph)
        else:
            _, piece, kept = _forward(layer, x, rotation, layout, drops)
        if not kept.gate_up.numel():
            joined = layer.gate_up
            kept.gate_up, kept.u_gate_up = joined.buffer_out(x).split([joined.outputs, joined.tail], dim=1)
            _gate_up(layer, kept, drops)
        d_middle, mlp = _mlp_backward(layer, grad_outputs[0].contiguous(), kept, drops)
        dx, attention = _attention_backward(layer, d_middle, x, kept, rotation, layout, drops, ctx.needs_input_grad[0])
        layer.arena.give(piece)
        return dx, None, None, None, None, None, *attention, *mlp


def _mlp_backward(layer: FusedLayer, dy: Tensor, kept: _Kept, drops: _Drops) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the stream before the MLP, in a buffer (T, C + R) with room for that of the projection before it."""
    down, gate_up, norm = layer.down, layer.gate_up, layer.post_attention_layernorm
    gradient = down.buffer_out(dy)
    pointwise.copy(gradient[:, : down.outputs], dy)
    product = down.input_gradient(gradient, drops.down)  # (T, I): first the gradient of the gated product, then itself
    d_gate_up = gate_up.buffer_out(dy)
    pointwise.swiglu_backward(d_gate_up[:, : gate_up.outputs], product, kept.gate_up)
    found = down.gradients(product, kept.u_down, gradient, drops.down)
    del product
    d_normed = gate_up.input_gradient(d_gate_up, drops.gate_up)  # (T, C)
    normed = torch.empty_like(d_normed)
    d_middle = layer.out.buffer_out(dy)
    pointwise.norm_backward(d_middle[:, : layer.out.outputs], normed, d_normed, kept.middle, norm.weight, dy, layer.eps)
    return d_middle, [*gate_up.gradients(normed, kept.u_gate_up, d_gate_up, drops.gate_up), *found]


def _attention_backward(
    layer: FusedLayer,
    d_middle: Tensor,
    x: Tensor,
    kept: _Kept,
    rotation: tuple[Tensor, Tensor],
    layout: Packed,
    drops: _Drops,
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradient of the layer's input, where it is wanted."""
    out, qkv, norm = layer.out, layer.qkv, layer.input_layernorm
    size = layer.self_attn.head_dim
    d_attended = out.input_gradient(d_middle, drops.out).unflatten(1, (-1, size))  # (T, H, D)
    found = out.gradients(kept.attended, kept.attended[:, out.inputs :], d_middle, drops.out)
    d_qkv = qkv.buffer_out(x)
    attended = kept.attended[:, : out.inputs].unflatten(1, (-1, size))
    projected, room = layer.heads(kept.qkv), layer.heads(d_qkv[:, : qkv.outputs])
    cos, sin = (part.flatten(1) for part in rotation)
    heads = _normalised(layer, projected, cos, sin) if layer.head_norms else projected
    found_heads = attend_backward(room, d_attended, attended, kept.attention, heads, layout, layer.self_attn.window)
    del heads
    for place, part in zip(room[:2], found_heads[:2], strict=True):
        pointwise.rotate(place, part, cos, sin, back=True)
    for place, part, of_heads in zip(room, projected, layer.head_norms, strict=False):  # none, or of queries and keys
        _head_norm_backward(place, part, of_heads, layer.eps)
    if found_heads[2] is not room[2]:
        pointwise.copy(room[2].flatten(1), found_heads[2].flatten(1))
    d_normed = qkv.input_gradient(d_qkv, drops.qkv)  # (T, C); without it no du
    normed, dx = torch.empty_like(d_normed), torch.empty_like(d_normed)
    pointwise.norm_backward(dx, normed, d_normed, x, norm.weight, d_middle[:, : out.outputs], layer.eps)
    return dx if wanted else None, [*qkv.gradients(normed, kept.u_qkv, d_qkv, drops.qkv), *found]


def _head_norm_backward(place: Tensor, part: Tensor, norm: nn.RMSNorm, eps: float) -> None:
    """Turn the gradient of normalised heads, in `place` (T, N, D), into that of the heads as projected, `part`."""
    gradient, rows = (_elsewhere(x).flatten(0, 1) for x in (place, part))  # (T N, D)
    nothing = rows.new_zeros(rows.shape[1]).expand_as(rows)
    pointwise.norm_backward(gradient, rows, gradient, rows, norm.weight, nothing, eps)
    pointwise.copy(place.flatten(1), gradient.view(len(place), -1))
