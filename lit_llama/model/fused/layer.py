"""A decoder layer with a backward pass of its own: few and large matrix products, little between them, little kept.

Of each token it keeps the input, the rotated queries, keys and values, what attention gives, the stream after it, gate
and up, and the few numbers of the updates. Norms and the gated product are computed again in the backward pass, in the
passes over memory that their gradients need anyway; so are queries and keys that are normalised, which are kept as they
were projected, and what magnitudes multiply (DoRA). The stream may have more bits than the products (mixed precision):
norms.py converts on the way in and out, the projections back to the stream where they are added to it. Which inputs of
updates are dropped is drawn again from its seed. llama.DecoderLayer is its plain twin, and what it was: the modules,
their names and their parameters stay.

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
from lit_llama.model.fused.arena import Arena
from lit_llama.model.fused.heads import turned, turned_back
from lit_llama.model.fused.joined import Dropped, Joined
from lit_llama.model.fused.norms import Norm
from lit_llama.model.fused.quantized import join
from lit_llama.model.fused.reasons import why_plain
from lit_llama.model.llama import Attention, DecoderLayer, LLaMA
from lit_llama.model.operators import pointwise
from lit_llama.model.operators.kernels import native
from lit_llama.model.rope import Rotation


def fuse(
    model: LLaMA,
    leave: Checkpointing = "none",
    product: torch.dtype | None = None,
    *,
    keep_memory: bool = True,
    spread: bool = False,
    device: torch.device | None = None,
) -> int:
    """Replace the layers that can be by fused ones, in place; gives their number.

    Call it when all other replacements are done and the weights are where they stay, or else are to be spread.

    Args:
        model: With its adapters, or as a whole to be trained.
        leave: What is computed again in the backward pass.
        product: Dtype of the matrix products, if it is not that of the norms.
        keep_memory: Layers keep their memory from step to step.
        spread: Their frozen weights will be whole only while a layer computes.
        device: Where they will compute; None for where their weights are.
    """
    layers = model.model.layers
    arena = Arena(1 if leave == "full" else len(layers), kept=keep_memory)
    for index, layer in enumerate(layers):
        if isinstance(layer, DecoderLayer) and not why_plain(layer, product):
            layers[index] = FusedLayer(layer, leave, arena, product, spread=spread, device=device)
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


class _Drops(NamedTuple):
    """Dropout of a forward pass, of the joined layers in their order."""

    qkv: Dropped
    out: Dropped
    gate_up: Dropped
    down: Dropped


class FusedLayer(DecoderLayer):
    """A decoder layer that computes as above where it is given packed samples, and plainly where it is not."""

    def __init__(
        self,
        layer: DecoderLayer,
        leave: Checkpointing,
        arena: Arena,
        product: torch.dtype | None = None,
        *,
        spread: bool = False,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention)
        self.leave, self.arena, self.spread = leave, arena, spread
        heads = (attention.q_norm, attention.k_norm)
        self.head_norms = [Norm(norm) for norm in heads if isinstance(norm, nn.RMSNorm)]
        self.stream_norms = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        weight = layer.input_layernorm.weight
        self.dtype, like = weight.dtype, weight.detach().to(device, product or weight.dtype)
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj], like, spread=spread)
        self.out = join([attention.o_proj], like, spread=spread)
        self.gate_up = join([mlp.gate_proj, mlp.up_proj], like, spread=spread)
        self.down = join([mlp.down_proj], like, spread=spread)
        self.joined = (self.qkv, self.out, self.gate_up, self.down)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Run the layer: (T, C) -> (T, C)."""
        if not isinstance(layout, Packed) or x.dtype != self.dtype:
            return super().forward(x, rotation, layout)
        with torch.autocast(capabilities(x.device).kind, enabled=False):  # lengths of rows are float32
            for joined in self.joined:
                joined.refresh()
        parts: list[Joined | Norm] = [*self.joined, *self.head_norms, *self.stream_norms]
        parameters = [parameter for part in parts for parameter in part.parameters]
        backward = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))  # which the function cannot know
        drops = _Drops(*(joined.draw() for joined in self.joined))
        with torch.autocast(capabilities(x.device).kind, enabled=False):
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
    """What the backward pass needs of a layer; u are the last columns of the buffers, see joined.py.

    Results of products are those that magnitudes have not multiplied yet; raw ones are empty where none do.
    """

    qkv: Tensor  # (T, (H + 2 G) D), rotated; as projected where heads are normalised, or magnitudes train
    attended: Tensor  # (T, H D + R)
    middle: Tensor  # (T, C), the stream between attention and MLP
    u_qkv: Tensor
    u_down: Tensor
    raw_out: Tensor  # (T, C)
    raw_down: Tensor  # (T, C)
    gate_up: Tensor  # (T, 2 I); it and its u are empty where they are computed again
    u_gate_up: Tensor
    attention: Kept

    def tensors(self) -> list[Tensor]:
        *named, attention = vars(self).values()
        return [*named, *attention.tensors]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], graph: Any = None) -> "_Kept":
        qkv, attended, middle, u_qkv, u_down, raw_out, raw_down, gate_up, u_gate_up, *attention = tensors
        named = (qkv, attended, middle, u_qkv, u_down, raw_out, raw_down, gate_up, u_gate_up)
        return cls(*named, Kept(attention, graph))

    @classmethod
    def within(cls, layer: FusedLayer, x: Tensor) -> "tuple[Tensor, Tensor, _Kept]":
        """A piece of memory for the tokens of x (T, C), and in it the places of the layer's result and of these."""
        qkv, out, gate_up, down = layer.joined
        wide = layer.dtype.itemsize // qkv.dtype.itemsize  # of a number of the stream, in those of the products
        result = 0 if layer.spread else down.outputs  # FSDP hooks itself to results, and warns of views
        widths = [result * wide, qkv.outputs, out.inputs + out.tail, out.outputs * wide, qkv.tail, down.tail]
        widths += [out.raw, down.raw, *([0, 0] if layer.leave == "selective" else [gate_up.outputs, gate_up.tail])]
        piece, parts = layer.arena.take(x.new_empty(0, dtype=qkv.dtype), [len(x) * width for width in widths])
        for index in (0, 3):
            parts[index] = parts[index].view(layer.dtype)
        y, *places = (part.view(len(x), part.numel() // len(x)) for part in parts)
        return piece, y if result else x.new_empty(len(x), down.outputs), cls.of(places)


def _forward(
    layer: FusedLayer, x: Tensor, rotation: Rotation, layout: Packed, drops: _Drops
) -> tuple[Tensor, Tensor, _Kept]:
    """The layer, the piece of memory in which its result is, and what its backward pass needs."""
    piece, y, kept = _Kept.within(layer, x)
    normed = layer.qkv.buffer_in(x)
    layer.stream_norms[0](normed[:, : layer.qkv.inputs], x)
    layer.qkv(kept.qkv, normed, dropped=drops.qkv)
    pointwise.copy(kept.u_qkv, normed[:, layer.qkv.inputs :])
    del normed
    heads = layer.heads(layer.qkv.shown(kept.qkv))
    heads = turned(heads, layer.head_norms, rotation)
    attended = kept.attended[:, : layer.out.inputs].unflatten(1, (-1, layer.self_attn.head_dim))  # (T, H, D)
    again = bool(layer.head_norms or layer.qkv.magnitudes)
    kept.attention = attend_into(attended, heads, layout, layer.self_attn.window, again=again)
    del heads
    layer.out.add(kept.middle, kept.raw_out, kept.attended, x, drops.out)
    gate_up = layer.gate_up.shown(_gate_up(layer, kept, drops))
    product = layer.down.buffer_in(x)
    pointwise.swiglu(product[:, : layer.down.inputs], gate_up)
    layer.down.add(y, kept.raw_down, product, kept.middle, drops.down)
    pointwise.copy(kept.u_down, product[:, layer.down.inputs :])
    return y, piece, kept


def _gate_up(layer: FusedLayer, kept: _Kept, drops: _Drops) -> Tensor:
    """Gate and up side by side (T, 2 I), kept with their u where there is a place for them."""
    joined, middle = layer.gate_up, kept.middle
    normed = joined.buffer_in(middle)
    layer.stream_norms[1](normed[:, : joined.inputs], middle)
    gate_up = kept.gate_up if kept.gate_up.numel() else normed.new_empty(len(middle), joined.outputs)
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
        rotation: Rotation,
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
        d_middle, room, mlp, second = _mlp_backward(layer, grad_outputs[0].contiguous(), kept, drops)
        dx, attention, first = _attention_backward(layer, d_middle, room, x, kept, rotation, layout, drops)
        layer.arena.give(piece)
        wanted = dx if ctx.needs_input_grad[0] else None
        return wanted, None, None, None, None, None, *attention, *mlp, *first, *second


def _mlp_backward(
    layer: FusedLayer, dy: Tensor, kept: _Kept, drops: _Drops
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradient of the stream before the MLP (T, C), and in a buffer (T, C + R) that of the projection before it; those
    of what trains in the MLP, and of its norm."""
    down, gate_up = layer.down, layer.gate_up
    gradient = down.buffer_out(dy)
    pointwise.copy(gradient[:, : down.outputs], dy)
    of_down = down.output_gradients(gradient, kept.raw_down)
    product = down.input_gradient(gradient, drops.down)  # (T, I): first the gradient of the gated product, then itself
    d_gate_up = gate_up.buffer_out(dy)
    pointwise.swiglu_backward(d_gate_up[:, : gate_up.outputs], product, gate_up.shown(kept.gate_up))
    of_down = [*down.gradients(product, kept.u_down, gradient, drops.down), *of_down]
    del product
    of_gate_up = gate_up.output_gradients(d_gate_up, kept.gate_up)
    d_normed = gate_up.input_gradient(d_gate_up, drops.gate_up)  # (T, C)
    normed = torch.empty_like(d_normed)
    room = layer.out.buffer_out(dy)
    before = room[:, : layer.out.outputs]
    # They are one where the projection takes the gradient as the stream has it.
    d_middle = torch.empty_like(dy) if layer.out.magnitudes or dy.dtype != room.dtype else before
    of_norm = layer.stream_norms[1].backward(d_middle, normed, d_normed, kept.middle, dy)
    if d_middle is not before:
        pointwise.copy(before, d_middle)
    found = gate_up.gradients(normed, kept.u_gate_up, d_gate_up, drops.gate_up)
    return d_middle, room, [*found, *of_gate_up, *of_down], of_norm


def _attention_backward(
    layer: FusedLayer,
    d_middle: Tensor,
    room: Tensor,
    x: Tensor,
    kept: _Kept,
    rotation: Rotation,
    layout: Packed,
    drops: _Drops,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradient of the layer's input (T, C); those of what trains in its projections, and of its norms."""
    out, qkv = layer.out, layer.qkv
    size = layer.self_attn.head_dim
    of_out = out.output_gradients(room, kept.raw_out)
    d_attended = out.input_gradient(room, drops.out).unflatten(1, (-1, size))  # (T, H, D)
    of_out = [*out.gradients(kept.attended, kept.attended[:, out.inputs :], room, drops.out), *of_out]
    d_qkv = qkv.buffer_out(x)
    attended = kept.attended[:, : out.inputs].unflatten(1, (-1, size))
    shown, places = layer.heads(qkv.shown(kept.qkv)), layer.heads(d_qkv[:, : qkv.outputs])
    heads = turned(shown, layer.head_norms, rotation, again=not qkv.magnitudes)
    found = attend_backward(places, d_attended, attended, kept.attention, heads, layout, layer.self_attn.window)
    del heads
    of_heads = turned_back(places, found, shown, layer.head_norms, rotation)
    of_qkv = qkv.output_gradients(d_qkv, kept.qkv)
    d_normed = qkv.input_gradient(d_qkv, drops.qkv)  # (T, C); without it no du
    normed, dx = torch.empty_like(d_normed), torch.empty_like(x)
    of_norm = layer.stream_norms[0].backward(dx, normed, d_normed, x, d_middle)
    of_qkv = [*qkv.gradients(normed, kept.u_qkv, d_qkv, drops.qkv), *of_qkv]
    return dx, [*of_qkv, *of_out], [*of_heads, *of_norm]
