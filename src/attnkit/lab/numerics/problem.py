"""What the golden value and the emulator are given: checked, in float64, heads of a group side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, check_dtype, check_same, dims
from attnkit._core.errors import InputError, ShapeError

__all__ = ["Problem", "heads_last", "pose", "softmax"]


@dataclass(frozen=True)
class Problem:
    """One attention problem in float64.

    Attributes:
        q: [B, Hkv, G, T, D], G query heads share a key head.
        k, v: [B, Hkv, 1, S, D] and [B, Hkv, 1, S, Dv].
        causal: row t sees the keys up to t + S - T.
        mask: [1 or B, 1, 1, T, S] bool, True where a row may see a key; None hides nothing.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    mask: Tensor | None
    scale: float

    @property
    def rows(self) -> int:
        """T."""
        return self.q.shape[-2]

    @property
    def keys(self) -> int:
        """S."""
        return self.k.shape[-2]

    def reach(self, rows: slice) -> int:
        """The number of keys up to the last one that any of the rows may see."""
        return min(max(rows.stop + self.keys - self.rows, 0), self.keys) if self.causal else self.keys

    def hide(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        """Put -inf where a row must not see a key."""
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask[..., rows, keys], -torch.inf)
        if self.causal and keys.stop > self.reach(slice(rows.start, rows.start + 1)):
            last = torch.arange(rows.start, rows.stop, device=scores.device) + self.keys - self.rows
            beyond = torch.arange(keys.start, keys.stop, device=scores.device) > last[:, None]
            scores = scores.masked_fill(beyond, -torch.inf)
        return scores

    def row_slices(self, width: int, elements: int) -> list[slice]:
        """Runs of rows for which [B, Hkv, G, rows, width] has about that many elements."""
        step = max(1, elements // max(1, self.q.shape[:3].numel() * width))
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]


def pose(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None) -> Problem:
    """Check the arguments that every function of the lab shares.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv], H a multiple of Hkv.
        causal: whether row t sees the keys up to t + S - T only.
        mask: [T, S] or [B, T, S] bool, True where a row may see a key.
        scale: of the scores; None means 1/sqrt(D).
    Raises:
        ShapeError, DTypeError, InputError: shapes that do not fit, dtypes that are no floats, NaN or infinities.
    """
    sizes = dims(q=(q, "B T H D"), k=(k, "B S Hkv D"), v=(v, "B S Hkv Dv"))
    check_dtype("q", q, *FLOATS)
    check_same(q=q, k=k, v=v)
    if not all(sizes.values()):
        raise ShapeError(f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}; every size must be at least 1")
    if sizes["H"] % sizes["Hkv"]:
        raise ShapeError(f"q has {sizes['H']} heads and k has {sizes['Hkv']}; the first must be a multiple of the second")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds NaN or infinities, whose deviation means nothing; remove them")
    if mask is not None:
        check_dtype("mask", mask, torch.bool)
        dims(q=(q, "B T H D"), k=(k, "B S Hkv D"), mask=(mask, "B T S" if mask.dim() == 3 else "T S"))
        mask = mask.to(q.device)[(None,) * (3 - mask.dim())][:, None, None]
    kv_heads = sizes["Hkv"]
    queries = torch.movedim(q.double().unflatten(2, (kv_heads, sizes["H"] // kv_heads)), 1, 3)
    keys, values = (t.double().transpose(1, 2)[:, :, None] for t in (k, v))
    return Problem(queries, keys, values, causal, mask, sizes["D"] ** -0.5 if scale is None else scale)


def heads_last(t: Tensor) -> Tensor:
    """[B, Hkv, G, T, *] -> [B, T, H, *]."""
    return torch.movedim(t, 3, 1).flatten(2, 3)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - maximum), its row sums and the log-sum-exp, the last two of width 1; hidden rows have 0, 1 and -inf.

    Scores of 1e4 are known to 1e-12 only, and so is their log-sum-exp: probabilities are better taken from the first two.
    """
    top = scores.detach().amax(-1, keepdim=True)
    empty = torch.isneginf(top)
    p = torch.exp(scores - top.masked_fill(empty, 0))
    total = p.sum(-1, keepdim=True) + empty
    return p, total, torch.where(empty, -torch.inf, top + torch.log(total))
