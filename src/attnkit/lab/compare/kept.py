"""What a compressed cache holds: how much of each head, and which parts of the text."""

from typing import Any

import torch
from torch import Tensor

from attnkit.kv import KVCache

__all__ = ["BINS", "kept_of"]

BINS = 64


def kept_of(cache: KVCache) -> dict[str, Any]:
    """Look at the cache of one row right after its context.

    Returns:
        heads: [layers][Hkv], the share of the tokens seen that a head stores; places: [layers][bins], the same for each of at
        most 64 equal parts of the text, mean of the heads. Layers with a window of their own are left out.
    """
    heads, places = [], []
    for layer in cache.kv_layers:
        stored = layer.view()
        shape = torch.Size([*stored.keys.shape[:2], stored.positions.shape[-1]])
        real = torch.ones(shape, dtype=torch.bool) if stored.real is None else stored.real.expand(shape).cpu()
        positions = stored.positions.expand(shape).cpu().clamp(max=layer.seen - 1)
        bins = min(BINS, layer.seen)
        found = (positions * bins // layer.seen)[real].bincount(minlength=bins).double()
        size = (torch.arange(layer.seen) * bins // layer.seen).bincount(minlength=bins)
        heads.append(_rounded(real.sum(-1)[0] / layer.seen))
        places.append(_rounded(found / (size * shape[1])))
    return {"heads": heads, "places": places}


def _rounded(shares: Tensor) -> list[float]:
    """To four digits, since files hold many of them."""
    return [round(share, 4) for share in shares.tolist()]
