"""Attention as an algorithm with its roundings computes it, in any format, on any machine."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, UnsupportedError
from attnkit.lab.numerics.gradients import EmulatedAttention
from attnkit.lab.numerics.policy import SitePolicy
from attnkit.lab.numerics.problem import heads_last, pose
from attnkit.lab.numerics.recurrences import ALGORITHMS, Algorithm, Emulation
from attnkit.lab.numerics.shift import Shift, dynamic_max_shift

__all__ = ["EmulationStats", "Normalizer", "Order", "Stable", "emulated_attention"]

Normalizer = Literal["exact", "consistent"]
Order = Literal["forward", "reverse"]
Stable = Literal["off", "delta", "exact_delta", "dynamic_max"]

_CAP = 30.0  # of the dynamic maximum, natural units


@dataclass(frozen=True)
class EmulationStats:
    """What an emulated pass knows beside its output.

    Attributes:
        lse: [B, T, H], the log-sum-exp as the algorithm has it.
        rescales: [B, T, H], how often a row's older results were rescaled.
        tiles: tiles of keys that the last row walks over.
    """

    lse: Tensor
    rescales: Tensor
    tiles: int


@overload
def emulated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, policy: SitePolicy, algorithm: Algorithm = ..., block_q: int = ..., block_k: int = ...,
    causal: bool = ..., mask: Tensor | None = ..., scale: float | None = ..., normalizer: Normalizer = ...,
    stable: Stable = ..., beta: float | None = ..., tie_eps: float = ..., shift: Shift | None = ..., lag: float | None = ...,
    swap_axes: bool = ..., kv_order: Order = ..., generator: torch.Generator | None = ..., return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def emulated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, policy: SitePolicy, algorithm: Algorithm = ..., block_q: int = ..., block_k: int = ...,
    causal: bool = ..., mask: Tensor | None = ..., scale: float | None = ..., normalizer: Normalizer = ...,
    stable: Stable = ..., beta: float | None = ..., tie_eps: float = ..., shift: Shift | None = ..., lag: float | None = ...,
    swap_axes: bool = ..., kv_order: Order = ..., generator: torch.Generator | None = ..., return_stats: Literal[True],
) -> tuple[Tensor, EmulationStats]: ...  # fmt: skip
def emulated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    policy: SitePolicy,
    algorithm: Algorithm = "baseline",
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    normalizer: Normalizer = "exact",
    stable: Stable = "off",
    beta: float | None = None,
    tie_eps: float = 0.0,
    shift: Shift | None = None,
    lag: float | None = None,
    swap_axes: bool = False,
    kv_order: Order = "forward",
    generator: torch.Generator | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, EmulationStats]:
    """Attention in float64 with the roundings of an algorithm in another format; gradients are those it would compute.

    Give inputs that are numbers of the format already (`round_to`), and round the gradient of the output likewise.

    Args:
        q: [B, T, H, D], any float dtype.
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv], H a multiple of Hkv.
        policy: what is rounded, and to what.
        algorithm: "baseline" stores scores and probabilities, as plain framework code does, and rounds at S, S_scale, P and
            O_out only. "fa1" and "fa2" are the recurrences of FlashAttention; "lagged" is the second one that follows the
            maximum only where it has risen by more than `lag` (FlashAttention-4).
        block_q, block_k: tile of rows and tile of keys. Tiles of rows matter to gradients of keys and values alone.
        causal: whether row t sees the keys up to t + S - T only.
        mask: [T, S] or [B, T, S] bool, True where a row may see a key.
        scale: of the scores; None means 1/sqrt(D).
        normalizer: "exact" divides by the sum of the probabilities before they are rounded for the product with V, as
            kernels do; "consistent" by the sum of those that were multiplied.
        stable: "delta" keeps what storing the output has cut off (in the format of O_out) and adds it where the backward
            pass forms the row sums of dO times O; "exact_delta" forms them as row sums of P times dP; "dynamic_max"
            subtracts `dynamic_max_shift` of the maximum.
        beta: of the dynamic maximum; None means 4.
        tie_eps: scores that far below a row's maximum count as equal to it, for `shift` or the dynamic maximum.
        shift: another function of (row maximum, number of ties) to subtract, tile by tile.
        lag: of "lagged", in powers of two: probabilities reach 2^lag; None means 8.
        swap_axes: whether keys are tiled by block_q and rows by block_k.
        kv_order: in which order tiles of keys are visited.
        generator: of roundings with mode "sr"; None means torch's own.
        return_stats: whether to return the statistics too.
    Returns:
        [B, T, H, Dv] in float64. Rows that see nothing are zero.
    Raises:
        OptionError: an unknown name or a value outside its range.
        UnsupportedError: an option that is of no use to the algorithm, or a format too narrow for `lag` or the dynamic
            maximum.
        ShapeError, DTypeError, InputError: shapes that do not fit, dtypes that are no floats, NaN or infinities.
    Source: Golden et al. 2024 (arXiv:2405.02803); Qiu & Yao 2025 (arXiv:2510.04212); Dao 2023 (arXiv:2307.08691).
    Complexity: O(T S D) time, some 10 to 50 times that of the golden value; memory of a few tiles.
    """
    for name, value, allowed in (
        ("algorithm", algorithm, ALGORITHMS),
        ("normalizer", normalizer, get_args(Normalizer)),
        ("stable", stable, get_args(Stable)),
        ("kv_order", kv_order, get_args(Order)),
    ):
        check_choice(name, value, allowed)
    if min(block_q, block_k) < 1 or tie_eps < 0 or (lag or 0) < 0:
        raise OptionError(f"block_q={block_q} and block_k={block_k} must be at least 1, tie_eps and lag at least 0")
    dynamic, lagged = stable == "dynamic_max", algorithm == "lagged"
    tiled, counted = algorithm != "baseline", dynamic or shift is not None
    _refuse_idle(
        ("normalizer", normalizer != "exact", tiled, "tiled algorithms"),
        ("stable", stable != "off", tiled, "tiled algorithms"),
        ("shift", shift is not None, tiled, "tiled algorithms"),
        ("kv_order", kv_order != "forward", tiled, "tiled algorithms"),
        ("shift", shift is not None, not dynamic, "calls without stable='dynamic_max'"),
        ("beta", beta is not None, dynamic, "stable='dynamic_max'"),
        ("tie_eps", tie_eps > 0, counted, "shift and stable='dynamic_max'"),
        ("lag", lag is not None, lagged, "algorithm='lagged'"),
    )
    lag = 8.0 if lag is None else lag
    if dynamic:
        shift = partial(dynamic_max_shift, beta=4.0 if beta is None else beta, cap=_CAP)
    _check_range(policy, algorithm, stable, lag)
    rows, keys = (block_k, block_q) if swap_axes else (block_q, block_k)
    emulation = Emulation(
        algorithm, policy, rows, keys, normalizer == "consistent", stable, shift, tie_eps, lag, kv_order == "reverse", generator
    )
    problem = pose(q, k, v, causal=causal, mask=mask, scale=scale)
    results: Any = EmulatedAttention.apply(problem.q, problem.k, problem.v, problem, emulation)  # type: ignore[no-untyped-call]
    out, lse, rescales = (heads_last(t) for t in results)
    if not return_stats:
        return out
    tiles = len(list(emulation.tiles(problem, slice(0, problem.rows))))
    return out, EmulationStats(lse[..., 0], rescales[..., 0].long(), tiles)


def _refuse_idle(*options: tuple[str, bool, bool, str]) -> None:
    """No argument is ignored: (name, whether it was given, whether it is of use, to whom)."""
    for name, given, useful, whom in options:
        if given and not useful:
            raise UnsupportedError(f"{name} is of use to {whom} only; leave it out")


def _check_range(policy: SitePolicy, algorithm: Algorithm, stable: Stable, lag: float) -> None:
    """Refuse what would overflow or vanish in the format of probabilities, whatever the inputs."""
    if "P" not in policy.sites:
        return
    fmt = policy.sites["P"].format
    if algorithm == "lagged" and 2.0**lag > fmt.max:
        raise UnsupportedError(
            f"lag={lag} lets probabilities reach 2^{lag:g}; {fmt.name} ends at {fmt.max:g}; use a smaller lag"
        )
    if stable == "dynamic_max" and math.exp(-_CAP) < 2.0**fmt.emin:
        raise UnsupportedError(
            f"stable='dynamic_max' makes probabilities as small as exp(-{_CAP:g}), which vanish in {fmt.name}; use bf16"
        )
