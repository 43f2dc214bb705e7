"""What one call of attention does to the row sums that its backward pass subtracts, on sampled rows.

The backward pass of fused attention takes delta = rowsum(dO * O) for rowsum(P * dP); the two are equal in exact arithmetic.
With O as it was stored, delta is off by eps = dO . (O_stored - O), and every row of the score gradients then sums to -eps
instead of 0. Both are found here from the output of the rows in float64, so that neither the keys nor the probabilities
have to be kept until the gradient comes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, ShapeError
from attnkit.lab.numerics.formats import BF16, FP16, FP32, FP64, FloatFormat, round_to, ulp
from attnkit.lab.numerics.measured import Measured, ProbeReport
from attnkit.lab.numerics.sampled import (
    heads_last,
    keys_and_values,
    pick,
    sample_rows,
    scores_of,
    seen_keys,
)
from attnkit.ops.attention.call import prepare

__all__ = ["FACTS", "Probed", "RoundingBiasProbe"]

_FORMATS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32, torch.float64: FP64}
FACTS = ("o_bias", "tie_rate", "sink_mass", "entropy", "max_logit", "v_anisotropy")


@dataclass(frozen=True)
class Probed:
    """Sampled rows before their gradient is known; m sequences with r rows each.

    Attributes:
        sequences, rows: [m] and [m, r], which ones.
        used: [m, r, H, Dv], the output that delta is formed from.
        true: [m, r, H, Dv], the output in float64.
        mixed, mass: [m, r, H, Dv] and [m, r, H], sums of P V and of P with the probabilities of the backward pass.
        facts: name -> [H], what does not need the gradient.
        finite: "q", "k", "v", "out" -> bool, whether what the sampled rows see of it is finite.
    """

    sequences: Tensor
    rows: Tensor
    used: Tensor
    true: Tensor
    mixed: Tensor
    mass: Tensor
    facts: dict[str, Tensor] = field(repr=False)
    finite: dict[str, Tensor] = field(repr=False)

    def finish(self, d_out: Tensor | None = None) -> Measured:
        """What is to be reported, given the gradient of the output, [B, T, H, Dv] or packed [R, H, Dv]."""
        found, finite = self.facts, self.finite
        if d_out is not None:
            grad = pick(d_out, self.sequences, self.rows)
            delta, used = ((grad * out).sum(-1) for out in (self.true, self.used))
            eps, size = _by_head((grad * (self.used - self.true)).sum(-1)), _by_head(delta.abs())
            leak = _by_head((grad * self.mixed).sum(-1) - used * self.mass) / size.clamp(min=1e-300)
            found = found | {"eps_bias": eps, "delta_size": size, "shift_leak": leak}
            finite = finite | {"d_out": torch.isfinite(grad).all()}
        return Measured(self.rows.numel(), found, finite)


@dataclass(frozen=True)
class RoundingBiasProbe:
    """Looks at one call of attention, on rows that are the same in every call of the same shape.

    Attributes:
        rows: how many, shared among at most two sequences of the batch.
        fmt: what the output and the probabilities are rounded to; None means the format of q.
        seed: of the choice of rows.
    Raises:
        OptionError: no rows.
    Source: Qiu & Yao 2025 (arXiv:2510.04212); that rows of the score gradients sum to -eps is our reading of it.
    Complexity: O(rows S D) a head, in float64, for the S keys of a sequence.

    >>> import torch
    >>> q, k, v, d_out = (torch.randn(1, 32, 2, 16).bfloat16() for _ in range(4))
    >>> found = RoundingBiasProbe(rows=8)(q, k, v, d_out=d_out, causal=True)
    >>> found.rows, found.eps_bias.shape, bool((found.eps_bias.abs() < 0.01 * found.delta_size).all())
    (8, torch.Size([2]), True)
    """

    rows: int = 64
    fmt: FloatFormat | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise OptionError(f"rows={self.rows} must be at least 1")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: Tensor | None = None,
        d_out: Tensor | None = None,
        lse: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        window_size: tuple[int | None, int | None] | None = None,
        key_bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        stable: str = "off",
    ) -> ProbeReport:
        """Look at a call whose gradient is known already, or not wanted: `look(...).finish(d_out).report()`.

        Raises:
            what `look` and `Measured.report` raise.
        """
        return self.look(
            q, k, v, out=out, lse=lse, causal=causal, scale=scale, window_size=window_size, key_bias=key_bias,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, stable=stable,
        ).finish(d_out).report()  # fmt: skip

    @torch.no_grad()
    def look(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        window_size: tuple[int | None, int | None] | None = None,
        key_bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        stable: str = "off",
    ) -> Probed:
        """Look at a call before its gradient is known, without waiting for the device.

        Args:
            q, k, v, causal, scale, window_size, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: of the
                call, as in `attnkit.ops.attention`.
            out: what the call returned; None means the true output rounded once.
            lse: what its backward pass makes probabilities from, [B, T, H] or packed [R, H]; None means the exact one.
            stable: how the backward pass forms delta. "off" and "dynamic_max": from `out`. "delta": the second half of the
                output is not known from outside, and is taken to be what rounding took from the true one, half a unit in
                the last place at most. "exact_delta": as it should be, so that eps is 0 by construction.
        Raises:
            ShapeError, DTypeError, OptionError, UnsupportedError: as `attnkit.ops.attention` raises them.
        """
        call = prepare(
            q, k, v, causal=causal, scale=scale, window_size=window_size, key_bias=key_bias, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, stable=stable,
        )  # fmt: skip
        fmt = self.fmt or _FORMATS[q.dtype]
        for name, tensor, shape in (("out", out, (*q.shape[:-1], v.shape[-1])), ("lse", lse, q.shape[:-1])):
            if tensor is not None and tensor.shape != shape:
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; that of the call is {tuple(shape)}")
        sequences, rows = sample_rows(q, self.rows, self.seed)
        seen = seen_keys(call, sequences, rows)
        keys, values = keys_and_values(call, sequences, seen)
        finite = {"q": pick(q, sequences, rows), "k": keys, "v": values}
        keys, values = keys.double(), values.double()
        scores = scores_of(call, sequences, finite["q"], keys, seen)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(torch.isneginf(top), 0)
        raw = torch.exp(scores - top)  # [m, Hkv, G, r, S]
        total = raw.sum(-1, keepdim=True)
        p = raw / total.masked_fill(total == 0, 1)
        true = mixed = heads_last(p @ values)
        mass = heads_last(p.sum(-1, keepdim=True))[..., 0]
        if lse is not None:
            base = pick(lse[..., None], sequences, rows).unflatten(2, raw.shape[1:3]).permute(0, 2, 3, 1, 4)
            kept = torch.exp(scores - base.masked_fill(torch.isneginf(base), 0))
            mixed, mass = heads_last(kept @ values), heads_last(kept.sum(-1, keepdim=True))[..., 0]
        stored = round_to(true, fmt) if out is None else pick(out, sequences, rows)
        finite["out"] = stored
        outward = _by_head(((stored - true) * true.sign()).mean(-1)) / _by_head(ulp(true, fmt).mean(-1))
        facts = {"o_bias": outward, **_facts(scores, raw, p, fmt, seen), "v_anisotropy": _lean(values, seen)}
        facts["v_anisotropy"] = facts["v_anisotropy"].repeat_interleave(raw.shape[2])
        return Probed(
            sequences,
            rows,
            _used(stored, true, fmt, stable),
            true,
            mixed,
            mass,
            facts,
            {name: torch.isfinite(t).all() for name, t in finite.items()},
        )


def _facts(scores: Tensor, raw: Tensor, p: Tensor, fmt: FloatFormat, seen: Tensor) -> dict[str, Tensor]:
    ties = (round_to(raw, fmt) == 1).sum(-1) >= 2
    first = seen.int().argmax(-1, keepdim=True).expand(*p.shape[:-1], 1)
    spread = -torch.xlogy(p, p).sum(-1)
    rates = {"tie_rate": ties.double(), "sink_mass": p.gather(-1, first)[..., 0], "entropy": spread}
    found = {name: _by_head(heads_last(value[..., None])[..., 0]) for name, value in rates.items()}
    return found | {"max_logit": scores.amax((0, 3, 4)).flatten()}


def _lean(values: Tensor, seen: Tensor) -> Tensor:
    """[Hkv]: the largest abs(mean) / standard deviation of a channel, over the keys that some sampled row sees."""
    weight = seen.any(-2)[..., None, :].double().expand(*values.shape[:-2], 1, values.shape[-2])
    count = weight.sum((0, 2, 4))
    mean, square = ((weight @ t).sum((0, 2, 3)) / count for t in (values, values.square()))
    variance = (square - mean.square()).clamp(min=0)
    return (mean.abs() / variance.sqrt().clamp(min=1e-30)).amax(-1)


def _used(stored: Tensor, true: Tensor, fmt: FloatFormat, stable: str) -> Tensor:
    if stable == "exact_delta":
        return true
    if stable == "delta":
        half = ulp(stored, fmt) / 2
        return stored + round_to((true - stored).clamp(-half, half), fmt)
    return stored


def _by_head(t: Tensor) -> Tensor:
    """Mean over sampled rows: [m, r, H] -> [H]."""
    return t.mean((0, 1))
