"""Files of random weights and tables, as methods want them that were trained or measured beforehand."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["LEARNED", "learned"]

_FOLDER = tempfile.TemporaryDirectory(prefix="attnkit_learned_")
LEARNED = {"lukv": "curves", "kvzap": "weights", "fastkvzip": "weights", "duo_attention": "pattern", "restorekv": "embeddings"}
"""method: the option that takes its file."""


@cache
def learned(method: str, *, kv_heads: int, width: int, layers: int = 3) -> str:
    """The path of a file for this method and shape of model."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: dict[str, torch.Tensor] = {}
    if method == "lukv":
        grid = torch.arange(1, 100).div(100)[:, None, None]
        tensors["lukv"] = (grid + 0.1 * draw(99, layers, kv_heads)).clamp(0, 1)
    if method == "duo_attention":
        tensors["duo"] = draw(layers, kv_heads).sigmoid()
    if method == "restorekv":
        tensors["restore_embeddings"] = draw(5, width)
    for index in range(layers):
        stem = f"layers.{index}"
        if method == "kvzap":
            tensors |= {f"{stem}.0.weight": draw(16, width), f"{stem}.0.bias": draw(16)}
            tensors |= {f"{stem}.2.weight": draw(kv_heads, 16), f"{stem}.2.bias": draw(kv_heads)}
        if method == "fastkvzip":
            rank, group, sinks = 4, 2, 5
            tensors[f"{stem}.q_proj.weight"] = draw(kv_heads * group * rank, width)
            tensors[f"{stem}.q_proj.bias"] = draw(kv_heads * group * rank)
            tensors[f"{stem}.k_proj.weight"] = draw(kv_heads * rank, width)
            tensors |= {f"{stem}.{name}_norm.weight": draw(rank) for name in ("q", "k")}
            tensors |= {f"{stem}.k_base": draw(kv_heads, 1, sinks, rank), f"{stem}.b": draw(kv_heads, 1, group)}
    path = Path(_FOLDER.name) / f"{method}_{kv_heads}_{width}_{layers}.safetensors"
    save_file(tensors, path)
    return str(path)
