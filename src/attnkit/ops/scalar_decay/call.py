"""The prepared call of linear attention with scalar decay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype, check_dtype, dims
from attnkit._core.errors import InputError, OptionError
from attnkit.ops._chunkwise_core.call import RecurrentCall, check_gate, check_recurrent, check_step
from attnkit.ops._chunkwise_core.gates import LOWEST
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops._chunkwise_core.step import StepCall

__all__ = ["ScalarDecayCall", "prepare", "prepare_lightning", "prepare_step"]


@dataclass
class ScalarDecayCall(RecurrentCall):
    """Checked arguments.

    Attributes:
        g: [B, T, Hkv] (packed [R, Hkv]), log decays in the accumulation dtype, finite.
    """

    g: Tensor


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
) -> ScalarDecayCall:
    """Check the arguments of `scalar_decay_attention` (its docstring says what is raised)."""
    base = check_recurrent(q, k, v, scale, initial_state, cu_seqlens, chunk_size, "S")
    g = check_gate("g", g, k)
    if _readable(g) and bool((g > 0).any()):
        raise OptionError(f"g goes up to {float(g.max()):.3g}; log decays must not be above 0, where states grow without bound")
    return ScalarDecayCall(**base.parts(), g=g.clamp(min=LOWEST))


def prepare_lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = None,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
) -> ScalarDecayCall:
    """Check the arguments of `lightning_attention` (its docstring says what is raised)."""
    base = check_recurrent(q, k, v, scale, initial_state, cu_seqlens, chunk_size, "S")
    dims(slopes=(slopes, str(k.shape[-2])))
    acc = accumulator_dtype(k.dtype)
    check_dtype("slopes", slopes, k.dtype, acc)
    if slopes.device != k.device:
        raise InputError(f"slopes are on {slopes.device} but k is on {k.device}; move one of them")
    if _readable(slopes) and not bool(((slopes >= 0) & torch.isfinite(slopes)).all()):
        raise OptionError(f"slopes are {slopes.tolist()[:8]}; they must be finite and not negative: a decay is exp(-slope)")
    return ScalarDecayCall(**base.parts(), g=(-slopes.to(acc)).expand(k.shape[:-1]))


def prepare_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: RecurrentState, *, scale: float | None = None) -> StepCall:
    """Check the arguments of `scalar_decay_step` (its docstring says what is raised)."""
    scale, state = check_step(q, k, v, scale, state, "S")
    return StepCall(q, k, v, None, check_gate("g", g, k), state, "decay", scale)


def _readable(x: Tensor) -> bool:
    """Reading values on a GPU would wait for it, and in a compiled graph break it."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0
