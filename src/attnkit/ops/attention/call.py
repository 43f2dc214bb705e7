"""The prepared call that every attention backend judges and runs, and the checks that operators on the core share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_choice, check_dtype, check_same, dims
from attnkit._core.errors import OptionError, ShapeError, UnsupportedError

__all__ = ["AttentionCall", "CoreCall", "check_core", "check_per_head", "prepare"]

MIN_WIDTH, MAX_WIDTH = 16, 256
STABLE = ("off", "delta", "exact_delta", "dynamic_max")


@dataclass
class CoreCall:
    """Checked arguments that every operator on the core has, with the options resolved.

    `left` and `right` bound the window around a row's position (-1 unbounded); causal calls have `right == 0`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    left: int
    right: int
    softcap: float
    key_bias: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    q_pos: Tensor | None


@dataclass
class AttentionCall(CoreCall):
    """Checked arguments of softmax attention."""

    sinks: Tensor | None
    return_lse: bool
    out_dtype: torch.dtype
    deterministic: bool | None
    stable: str

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward pass."""
        if not torch.is_grad_enabled():
            return False
        return any(t is not None and t.requires_grad for t in (self.q, self.k, self.v, self.sinks, self.key_bias))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    q_pos: Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
    stable: str = "off",
) -> AttentionCall:
    """Check the arguments of `attention` and `query_sparse_attention` (their docstrings say what is raised)."""
    num_k, scale, left, right, softcap = check_core(
        q, k, v, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window_size, softcap
    )
    if sinks is not None:
        check_per_head("sinks", sinks, q)
    if stable not in STABLE:
        check_choice("stable", stable, STABLE)
    if q_pos is not None:
        _check_positions(q_pos, q, num_k, cu_seqlens_q)
    out_dtype = out_dtype or q.dtype
    if out_dtype not in (q.dtype, accumulator_dtype(q.dtype)):
        raise OptionError(f"out_dtype={out_dtype} is not allowed; choose {q.dtype} or {accumulator_dtype(q.dtype)}")
    return AttentionCall(
        q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, q_pos, sinks,
        return_lse, out_dtype, deterministic, stable,
    )  # fmt: skip


def check_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
    window_size: tuple[int | None, int | None] | None,
    softcap: float | None,
) -> tuple[int, float, int, int, float]:
    """Check what every operator on the core is given, and resolve its options.

    Returns:
        The number of keys, the scale, the window's left and right side (-1: unbounded) and the softcap (0: none).
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    rows, keys = ("R", "S") if packed else ("B T", "B S")
    sizes = dims(q=(q, f"{rows} H D"), k=(k, f"{keys} Hkv D"), v=(v, f"{keys} Hkv Dv"))
    check_dtype("q", q, *FLOATS)
    check_same(q=q, k=k, v=v)
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
        raise ShapeError(f"q has {sizes['H']} heads and k has {sizes['Hkv']}; the first must be a multiple of the second")
    for name, width in (("D", sizes["D"]), ("Dv", sizes["Dv"])):
        if not MIN_WIDTH <= width <= MAX_WIDTH:
            raise UnsupportedError(
                f"head width {name}={width} is outside {MIN_WIDTH}..{MAX_WIDTH}; pad narrower heads with zeros"
            )
    if packed:
        _check_packed(sizes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise OptionError("max_seqlen_q and max_seqlen_k describe packed sequences; give cu_seqlens_q and cu_seqlens_k too")
    if key_bias is not None:
        _check_key_bias(key_bias, q, k, keys)
    if softcap is not None and softcap <= 0:
        raise OptionError(f"softcap={softcap} must be positive; leave it out to switch it off")
    left, right = _window(window_size, causal)
    scale = sizes["D"] ** -0.5 if scale is None else float(scale)
    return sizes["S"], scale, left, right, 0.0 if softcap is None else float(softcap)


def check_per_head(name: str, tensor: Tensor, q: Tensor) -> None:
    """Refuse what is not one number for each query head, in q's dtype or that of its sums, beside q."""
    dims(**{name: (tensor, str(q.shape[-2]))})
    _check_side(name, tensor, q)


def _window(window_size: tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    left, right = (-1, -1) if window_size is None else window_size
    left, right = (-1 if side is None else int(side) for side in (left, right))
    if left < -1 or right < -1:
        raise OptionError(f"window_size={window_size} must hold counts of keys >= 0, or None for an unbounded side")
    return left, 0 if causal else right


def _check_packed(
    sizes: dict[str, int], cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None
) -> None:
    if cu_q is None or cu_k is None:
        missing = "cu_seqlens_q" if cu_q is None else "cu_seqlens_k"
        raise OptionError(f"{missing} is missing; packed sequences need the boundaries of queries and of keys")
    dims(cu_seqlens_q=(cu_q, "N+1"), cu_seqlens_k=(cu_k, "N+1"))
    if cu_q.numel() < 2:
        raise ShapeError(
            f"cu_seqlens_q has {cu_q.numel()} entries; N sequences need N + 1 boundaries, and N must be at least 1"
        )
    for name, cu, total, longest in (("q", cu_q, sizes["R"], max_q), ("k", cu_k, sizes["S"], max_k)):
        check_dtype(f"cu_seqlens_{name}", cu, torch.int32)
        if cu.device.type != "cpu" or torch.compiler.is_compiling():
            continue  # reading values there would wait for the device, or break the graph
        lengths = cu.diff()
        if int(cu[0]) != 0 or int(cu[-1]) != total or bool((lengths < 0).any()):
            raise ShapeError(
                f"cu_seqlens_{name} must rise from 0 to {total}, the rows of {name}; it holds {cu.tolist()[:8]}..."
            )
        if longest is not None and int(lengths.max()) > longest:
            raise OptionError(f"max_seqlen_{name}={longest} is below the longest sequence, {int(lengths.max())}")


def _check_side(name: str, tensor: Tensor, q: Tensor) -> None:
    check_dtype(name, tensor, q.dtype, accumulator_dtype(q.dtype))
    if tensor.device != q.device:
        raise OptionError(f"{name} is on {tensor.device} but q is on {q.device}; move one of them")


def _check_key_bias(key_bias: Tensor, q: Tensor, k: Tensor, keys: str) -> None:
    per_head = key_bias.dim() == k.dim() - 1
    dims(k=(k, f"{keys} Hkv D"), key_bias=(key_bias, f"{keys} Hkv" if per_head else keys))
    _check_side("key_bias", key_bias, q)


def _check_positions(q_pos: Tensor, q: Tensor, num_k: int, cu_seqlens_q: Tensor | None) -> None:
    check_dtype("q_pos", q_pos, torch.int32, torch.int64)
    if cu_seqlens_q is not None:
        dims(q=(q, "R H D"), q_pos=(q_pos, "R"))
    else:
        dims(q=(q, "B T H D"), q_pos=(q_pos, "B T" if q_pos.dim() > 1 else "T"))
    if q_pos.device != q.device:
        raise OptionError(f"q_pos is on {q_pos.device} but q is on {q.device}; move one of them")
    if q_pos.device.type == "cpu" and not torch.compiler.is_compiling() and q_pos.numel():
        low, high, lowest = int(q_pos.min()), int(q_pos.max()), 0 if cu_seqlens_q is None else -1
        if low < lowest or high >= num_k:
            raise OptionError(f"q_pos ranges over {low}..{high}; positions must lie in {lowest}..{num_k - 1}, the keys")
        if cu_seqlens_q is not None:
            falls = q_pos[1:] < q_pos[:-1]
            falls[cu_seqlens_q[1:-1][(cu_seqlens_q[1:-1] > 0) & (cu_seqlens_q[1:-1] < q_pos.numel())].long() - 1] = False
            if falls.any():
                row = int(falls.int().argmax()) + 1
                raise OptionError(f"q_pos falls at row {row}, inside a sequence; sort the rows of each sequence by position")
