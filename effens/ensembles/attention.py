"""Attention with projections for each member, in place of `nn.MultiheadAttention` and inside the layers made of it."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effens.ensembles.layers import MemberLayer


class MemberAttention(MemberLayer):
    """`nn.MultiheadAttention` whose four projections are member layers; it is called as that is.

    Args:
        plain: with ``batch_first=True``; its weights are taken over.
        members: how many members.
        make: `nn.Linear` to a member layer.
    """

    batch_first = True
    in_proj_bias = None  # which makes PyTorch's transformer layers call this one, and not read its weights

    def __init__(self, plain: nn.MultiheadAttention, members: int, make: Callable[[nn.Linear], MemberLayer]) -> None:
        super().__init__()
        self.members, self.num_heads, self.dropout = members, plain.num_heads, plain.dropout
        weights = plain.in_proj_weight.chunk(3)
        biases = [None] * 3 if plain.in_proj_bias is None else plain.in_proj_bias.chunk(3)
        parts = [(w, b, plain.in_proj_weight.requires_grad) for w, b in zip(weights, biases, strict=True)]
        parts.append((plain.out_proj.weight, plain.out_proj.bias, plain.out_proj.weight.requires_grad))
        self.q, self.k, self.v, self.out = (make(linear(*part)) for part in parts)
        self.train(plain.training)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does: rows ``(members * batch, length, width)``, and their masks."""
        q, k, v = (
            layer(rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (rows, heads, length, width / heads)
            for layer, rows in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = None
        if attn_mask is not None:
            mask = additive(attn_mask, q.dtype)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = additive(key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain `nn.MultiheadAttention`."""
        *parts, out = (cast(nn.Linear, layer.member(m)) for layer in (self.q, self.k, self.v, self.out))
        width, biased = out.out_features, out.bias is not None
        plain = nn.MultiheadAttention(width, self.num_heads, self.dropout, biased, batch_first=True, device="meta")
        trained = parts[0].weight.requires_grad
        plain.in_proj_weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), trained)
        plain.out_proj.weight = out.weight
        if biased:
            biases = [part.bias for part in parts]
            plain.in_proj_bias = nn.Parameter(torch.cat([b.detach() for b in biases]), biases[0].requires_grad)
            plain.out_proj.bias = out.bias
        return plain.train(self.training)


def call_layers(module: nn.Module) -> None:
    """Turn off the fast path of a transformer, which would read weights without calling their layers."""
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # what PyTorch asks before it takes the fast path


def linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    """Return a linear layer with this weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: -inf where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def why_no_attention(module: nn.MultiheadAttention) -> str:
    """Say why attention has no member layer, or nothing if it has."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__}, a kind of attention that has no member layers"
    if not module.batch_first:
        return "MultiheadAttention without batch_first=True, whose rows are not the first axis"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn, which have no member layers"
    return ""
