"""How much of a value the output projection lets through."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import UnsupportedArchitecture

__all__ = ["output_norms"]

_BLOCK = 2048  # keys at a time: what they write into the residual stream is wider than a head


def output_norms(values: Tensor, module: Any, heads: int, order: int) -> Tensor:
    """|W_o^h v|: what each stored value writes into the residual stream through each query head.

    Args:
        values: [B, Hkv, S, Dv].
        module: the attention module; its `o_proj` is a linear layer of [width, H Dv].
        heads: H.
        order: 1 or 2, which norm.
    Returns:
        [B, H, S] float32.
    Raises:
        UnsupportedArchitecture: the module has no output projection of that name and shape.
    """
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    key_heads, width = values.shape[1], values.shape[3]
    if weight is None or weight.dim() != 2 or weight.shape[1] != heads * width:
        found = "nothing" if weight is None else f"a weight of shape {tuple(weight.shape)}"
        raise UnsupportedArchitecture(
            f"{type(module).__name__}.o_proj must be a linear layer of {heads} heads of width {width}; found {found}"
        )
    weight = weight.detach().float().unflatten(1, (key_heads, -1, width))  # [width, Hkv, G, Dv]
    parts = [
        torch.einsum("bksd,nkgd->bkgsn", part.float(), weight).norm(order, dim=-1).flatten(1, 2)
        for part in values.split(_BLOCK, dim=2)
    ]
    return torch.cat(parts, dim=-1)
