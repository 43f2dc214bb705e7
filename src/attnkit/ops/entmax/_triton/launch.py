"""Launching the entmax kernels. No host synchronisation."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.triton.launcher import launch, power_of_two
from attnkit.ops.entmax._triton import rows as kernels

__all__ = ["LONGEST_SHORT", "MAX_UPDATES", "backward", "forward"]

LONGEST_SHORT = 8192  # elements of a row that a program keeps on chip
BLOCK = 2048  # elements of a tile of longer rows, and of several shorter ones together
MAX_UPDATES = 48


def _tiles(n: int) -> tuple[dict[str, Any], int]:
    """Flags that depend on the length of rows, and warps of a program."""
    short = n <= LONGEST_SHORT
    width = power_of_two(n, 16) if short else BLOCK
    flags = {"SHORT": short, "BLOCK_R": max(1, BLOCK // width) if short else 1, "BLOCK_N": width}
    return flags, 8 if width > BLOCK else 4


def _kind(x: Tensor, alphas: Tensor | None, alpha: float) -> tuple[str, Tensor | None]:
    """The kernel's form, and alpha - 1 of each row: the special forms know theirs."""
    if alphas is not None:
        return "general", (alphas - 1).contiguous()
    if alpha in (1.5, 2.0):
        return f"{alpha:g}", None
    return "general", torch.full((x.shape[0], 1), alpha - 1, dtype=torch.float32, device=x.device)


def forward(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """Probabilities [R, n] of scores [R, n]; `alphas` [R, 1] float32, where given, stands for `alpha`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    prob = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return prob
    num_rows, n = x.shape
    kind, gaps = _kind(x, alphas, alpha)
    flags, warps = _tiles(n)
    arguments = (x, gaps, prob, num_rows, n, x.stride(0), prob.stride(0), alpha - 1, MAX_UPDATES)
    grid = (-(-num_rows // flags["BLOCK_R"]),)
    launch(kernels.entmax_fwd, grid, arguments, {"KIND": kind} | flags, num_warps=warps)
    return prob


def backward(d_prob: Tensor, prob: Tensor, alphas: Tensor | None, alpha: float, need_alphas: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the scores and of `alphas` (empty where not needed)."""
    d_prob, prob = (t if t.stride(-1) == 1 else t.contiguous() for t in (d_prob, prob))
    d_x = torch.empty_like(prob, memory_format=torch.contiguous_format)
    needed = alphas if need_alphas else None
    d_alphas = prob.new_empty(0) if needed is None else torch.zeros_like(needed, memory_format=torch.contiguous_format)
    if prob.numel() == 0:
        return d_x, d_alphas
    num_rows, n = prob.shape
    kind, gaps = _kind(prob, alphas, alpha)
    flags, warps = _tiles(n)
    arguments = (
        d_prob, prob, gaps, d_x, None if needed is None else d_alphas,
        num_rows, n, d_prob.stride(0), prob.stride(0), d_x.stride(0),
    )  # fmt: skip
    grid = (-(-num_rows // flags["BLOCK_R"]),)
    launch(kernels.entmax_bwd, grid, arguments, {"KIND": kind, "ALPHAS": needed is not None} | flags, num_warps=warps)
    return d_x, d_alphas
