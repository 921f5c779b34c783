"""The one choice of what computes attention among packed samples.

On a CPU it is the kernel of operators/attention.py; on a GPU torch's varlen_attn, FlashAttention for samples of any
length (Dao 2023, arXiv:2307.08691); elsewhere, and for what these do not know, reference.py. The kernels keep the
log-sum-exp of the scores and nothing of their square.

Shapes: B samples, T tokens of all, H query heads, G key/value heads, D head size.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lit_llama.device import capabilities
from lit_llama.model.attention.reference import Samples, reference
from lit_llama.model.operators import attention
from lit_llama.model.operators.kernels import native
from lit_llama.model.operators.pointwise import copy

Heads = tuple[Tensor, Tensor, Tensor]
"""q (T, H, D), k and v (T, G, D)."""

Way = Literal["kernel", "varlen", "reference"]


@dataclass
class Kept:
    """Parts of a forward pass that `attend_backward` needs beside inputs and output.

    Attributes:
        tensors: Of the kernel on a CPU, the log-sum-exp (T, H).
        graph: Of varlen_attn, the end of autograd's graph and the q, k and v at its beginnings. Without either, the
            forward pass is computed again.
    """

    tensors: list[Tensor] = field(default_factory=list)
    graph: tuple[GradientEdge, list[Tensor]] | None = None


def way(q: Tensor, samples: Samples, softcap: float | None = None) -> Way:
    """Choose what computes attention for queries (T, H, D) of these samples."""
    if softcap is not None:
        return "reference"
    if native(q):
        return "kernel"
    flash = capabilities(q.device).flash_attention and q.dtype in (torch.bfloat16, torch.float16)
    return "varlen" if flash and not samples.shares and q.shape[2] % 8 == 0 and q.shape[2] <= 256 else "reference"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    samples: Samples,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute causal attention under autograd: q (T, H, D), k and v (T, G, D) -> (T, H, D).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        samples: Which tokens belong together.
        window: Tokens that each one sees, itself among them; None for all before it.
        scale: Of the scores; None is 1 / sqrt(D).
        softcap: Bound that scores come near to and never reach; None for none.
    """
    q, k, v = for_products(q, k, v)
    match way(q, samples, softcap):
        case "kernel":
            y: Tensor = attention.attention(q, k, v, *_described(q, samples, window, scale))[0]
            return y
        case "varlen":
            return _varlen(q, k, v, samples, window, scale)
        case "reference":
            return reference(q, k, v, samples, window, scale, softcap)


def for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors into the dtype of products where autocast is on, as it knows nothing of what follows them."""
    kind = capabilities(tensors[0].device).kind
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def attend_into(
    out: Tensor,
    qkv: Heads,
    samples: Samples,
    window: int | None = None,
    scale: float | None = None,
    *,
    again: bool = False,
) -> Kept:
    """Fill out (T, H, D), which may be columns of a wider tensor, and keep what `attend_backward` needs.

    With `again`, q and k are not kept but made anew for the backward pass: so nothing that holds them is.
    """
    q, k, v = qkv
    match way(q, samples):
        case "kernel":
            return Kept(tensors=[attention.attend(out, q, k, v, *_described(q, samples, window, scale))])
        case "varlen" if not again:
            return _varlen_into(out, qkv, samples, window, scale)
        case _:
            copy(out.flatten(1), attend(q, k, v, samples, window, scale).flatten(1))
            return Kept()


def attend_backward(
    room: Heads,
    dy: Tensor,
    y: Tensor,
    kept: Kept,
    qkv: Heads,
    samples: Samples,
    window: int | None = None,
    scale: float | None = None,
) -> Heads:
    """Compute the gradients of q, k and v, in the room for them or elsewhere; dy and y are (T, H, D)."""
    q, k, v = qkv
    if kept.tensors:
        described = _described(q, samples, window, scale)
        attention.attend_backward(*room, dy, y, *kept.tensors, q, k, v, *described)
        return room
    if kept.graph is not None:
        edge, inputs = kept.graph
        dq, dk, dv = torch.autograd.grad(edge, inputs, dy)
        return dq, dk, dv
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in qkv]
        again = attend(inputs[0], inputs[1], inputs[2], samples, window, scale)
    dq, dk, dv = torch.autograd.grad(again, inputs, dy)
    return dq, dk, dv


def _described(q: Tensor, samples: Samples, window: int | None, scale: float | None) -> tuple[Any, ...]:
    """Arguments of the kernel after q, k and v."""
    seen = len(q) if window is None else window
    return samples.offsets, samples.parent_indices, 1 / math.sqrt(q.shape[2]) if scale is None else scale, seen


def _varlen(q: Tensor, k: Tensor, v: Tensor, samples: Samples, window: int | None, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which a CPU can do without

    offsets, longest = samples.offsets, max(samples.counts)
    left = -1 if window is None else window - 1
    grouped = q.shape[1] != k.shape[1]
    y: Tensor = varlen_attn(  # type: ignore[assignment]
        q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=grouped
    )
    return y


def _varlen_into(out: Tensor, qkv: Heads, samples: Samples, window: int | None, scale: float | None) -> Kept:
    """Fill out, with the graph that autograd makes of it. What the graph keeps of the result is `out` itself, so that
    it is there once.
    """
    boxes: list[list[Tensor]] = []

    def pack(tensor: Tensor) -> list[Tensor]:
        boxes.append([tensor])
        return boxes[-1]

    def unpack(box: list[Tensor]) -> Tensor:
        return box[0]

    inputs = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
        y = _varlen(inputs[0], inputs[1], inputs[2], samples, window, scale)
    copy(out.flatten(1), y.detach().flatten(1))
    for box in boxes:
        if box[0].data_ptr() == y.data_ptr():
            box[0] = out
    return Kept(graph=(get_gradient_edge(y), inputs))
