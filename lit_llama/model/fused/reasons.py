"""Reasons for which a decoder layer stays as it is."""

import torch
from torch import nn

from lit_llama.model.adapters.low_rank import DoRALinear, LowRank, base_of
from lit_llama.model.adapters.rows import WholeNorm
from lit_llama.model.fused.quantized import kind_of
from lit_llama.model.llama import DecoderLayer


def why_plain(layer: DecoderLayer, product: torch.dtype | None = None) -> str:
    """Explain why a layer cannot be fused, for people; "" if fused layers compute all that it has.

    Args:
        layer: With its adapters.
        product: Dtype of the matrix products, if it is not that of the norms.
    """
    if layer.beyond:
        return layer.beyond
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms: list[nn.Module] = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (attention.q_norm, attention.k_norm) if type(norm) is not nn.Identity]
    kinds = [kind_of(linear) for linear in linears]
    if None in kinds:
        return f"linear layers as {type(linears[kinds.index(None)]).__name__}"
    if len({*kinds}) > 1:
        return "linear layers held in several ways"
    if unknown := [norm for norm in norms if type(norm) not in (nn.RMSNorm, WholeNorm)]:
        return f"norms as {type(unknown[0]).__name__}"
    if any(isinstance(linear, DoRALinear) and linear.dropout.p for linear in linears):
        return "DoRA with dropout"
    weights = [base.weight for base in map(base_of, linears) if isinstance(base, nn.Linear)]
    trained = [weight.requires_grad for weight in weights]
    if any(trained) and (not all(trained) or any(isinstance(linear, LowRank) for linear in linears)):
        return "some weights of the base that train"
    scales = {norm.weight.dtype for norm in norms if isinstance(norm, nn.RMSNorm)}
    dtypes = {weight.dtype for weight in weights} | (scales if product is None else set())
    return "weights of several dtypes" if len(dtypes) > 1 or len(scales) > 1 else ""
