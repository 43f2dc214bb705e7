"""What calls of attention do to the row sums that their backward pass subtracts, on sampled rows.

The backward pass of fused attention takes delta = rowsum(dO * O) for rowsum(P * dP); the two are equal in exact arithmetic.
With O as it was stored, delta is off by eps = dO . (O_stored - O), and every row of the score gradients then sums to -eps
instead of 0. Both are found here from the output of the rows in float64, so that neither the keys nor the probabilities
have to be kept until the gradient comes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, ShapeError, UnsupportedError
from attnkit.lab.numerics.formats import BF16, FP16, FP32, FP64, FloatFormat, round_to, ulp
from attnkit.lab.numerics.measured import Measured, ProbeReport
from attnkit.lab.numerics.sampled import Sample, heads_last, mix, pick, take
from attnkit.ops.attention.call import AttentionCall, prepare

__all__ = ["FACTS", "Probed", "RoundingBiasProbe", "look_at", "rounds_to_one"]

_FORMATS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32, torch.float64: FP64}
_DENSE = torch.contiguous_format
FACTS = ("o_bias", "tie_rate", "sink_mass", "entropy", "max_logit", "v_anisotropy")


@dataclass(frozen=True)
class Probed:
    """Sampled rows of calls alike before their gradients are known; n sequences of all calls with r rows each.

    Attributes:
        calls: L, how many.
        sequences, rows: [n] and [n, r], which rows of the gradient that `finish` is given.
        used: [n, r, H, Dv], the output that delta is formed from.
        true: [n, r, H, Dv], the output in float64.
        mixed, mass: [n, r, H, Dv] and [n, r, H], sums of P V and of P with the probabilities of the backward pass.
        facts: name -> [L, H], what does not need the gradient.
        largest: "q", "k", "v", "out" -> [L], the largest size in what the sampled rows see of it.
    """

    calls: int
    sequences: Tensor
    rows: Tensor
    used: Tensor
    true: Tensor
    mixed: Tensor
    mass: Tensor
    facts: dict[str, Tensor] = field(repr=False)
    largest: dict[str, Tensor] = field(repr=False)

    @torch.no_grad()
    def finish(self, d_out: Tensor | None = None) -> Measured:
        """What is to be reported, given the gradient of the output: [B, T, H, Dv] or packed [R, H, Dv].

        Of several calls, the sampled rows of each, one after the other, [n, r, H, Dv].
        """
        found, largest = self.facts, self.largest
        if d_out is not None:
            picked = pick(d_out, self.sequences, self.rows)
            grad = picked.double()
            delta, used = ((grad * out).sum(-1) for out in (self.true, self.used))
            eps, size = self._by_head((grad * (self.used - self.true)).sum(-1)), self._by_head(delta.abs())
            leak = self._by_head((grad * self.mixed).sum(-1) - used * self.mass) / size.clamp(min=1e-300)
            found = found | {"eps_bias": eps, "delta_size": size, "shift_leak": leak}
            largest = largest | {"d_out": _largest(picked, self.calls)}
        return Measured(self.rows.numel() // self.calls, found, largest)

    def _by_head(self, t: Tensor) -> Tensor:
        return _by_head(t, self.calls)


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
        """Look at a call whose gradient is known already, or not wanted.

        Args:
            q, k, v, causal, scale, window_size, key_bias, cu_seqlens_q, cu_seqlens_k: of the call, as in
                `attnkit.ops.attention`.
            out: what the call returned; None means the true output rounded once.
            d_out: its gradient; None leaves out what depends on it.
            lse: what its backward pass makes probabilities from, [B, T, H] or packed [R, H]; None means the exact one.
            stable: how the backward pass forms delta. "off" and "dynamic_max": from `out`. "delta": the second half of the
                output is not known from outside, and is taken to be what rounding took from the true one, half a unit in
                the last place at most. "exact_delta": as it should be, so that eps is 0 by construction.
        Raises:
            ShapeError, DTypeError, OptionError, UnsupportedError: as `attnkit.ops.attention` raises them.
            InputError: NaN or infinities in what the sampled rows see, or in their gradient.
        """
        call = prepare(
            q, k, v, causal=causal, scale=scale, window_size=window_size, key_bias=key_bias, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, stable=stable,
        )  # fmt: skip
        return look_at(self.take(call, out, lse)).finish(d_out).report()

    @torch.no_grad()
    def take(self, call: AttentionCall, out: Tensor | None = None, lse: Tensor | None = None) -> Sample:
        """Only copy what `look_at` will need, rows and the keys and values of two sequences, without waiting for the device.

        Args:
            call, out, lse: as above, where `call` is what `attnkit.ops.attention` was asked.
        Raises:
            ShapeError: `out` or `lse` is not of this call, or there is no row.
            UnsupportedError: the call has a softcap, sinks or positions of its rows.
        """
        if call.softcap or call.sinks is not None or call.q_pos is not None:
            raise UnsupportedError("a probe knows no softcap, no sinks and no q_pos; look at a call without them")
        for name, tensor, shape in (("out", out, (*call.q.shape[:-1], call.v.shape[-1])), ("lse", lse, call.q.shape[:-1])):
            if tensor is not None and tensor.shape != shape:
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; that of the call is {tuple(shape)}")
        return take(call, out, lse, self.fmt or _FORMATS[call.q.dtype], self.rows, self.seed)


@torch.no_grad()
def look_at(sample: Sample) -> Probed:
    """Look at what was kept of a call, or of some that were stacked, without waiting for the device."""
    calls, fmt, hidden = sample.calls, sample.fmt, sample.hidden()
    keys, values = sample.keys_and_values(hidden)
    seen = {"q": sample.q, "k": keys, "v": values}
    keys, values = keys.to(torch.float64, memory_format=_DENSE), values.to(torch.float64, memory_format=_DENSE)
    scores = sample.scores(keys, hidden)
    top = scores.amax(-1, keepdim=True)
    highest = top.unflatten(0, (calls, -1)).amax((1, 4, 5)).flatten(1)
    top = top.masked_fill(torch.isneginf(top), 0)
    raw = torch.exp(scores - top)  # [n, Hkv, G, r, S]
    total = raw.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    true = mixed = heads_last(mix(raw, values) / total)
    mass = heads_last((~hidden.all(-1, keepdim=True)).double().expand_as(total))[..., 0]
    if sample.lse is not None:
        base = sample.lse.unflatten(2, raw.shape[1:3]).permute(0, 2, 3, 1, 4).double()
        kept = torch.exp(scores - base.masked_fill(torch.isneginf(base), 0))
        mixed, mass = heads_last(mix(kept, values)), heads_last(kept.sum(-1, keepdim=True))[..., 0]
    out = round_to(true, fmt) if sample.out is None else sample.out
    stored = out.double()
    outward = _by_head(((stored - true) * true.sign()).mean(-1), calls) / _by_head(ulp(true, fmt).mean(-1), calls)
    facts = {"o_bias": outward, **_rates(raw, total, fmt, hidden, calls), "max_logit": highest}
    facts["v_anisotropy"] = _lean(values, hidden, calls).repeat_interleave(raw.shape[2], -1)
    used = _used(stored, true, fmt, sample.stable)
    largest = {name: _largest(part, calls) for name, part in (seen | {"out": out}).items()}
    return Probed(calls, sample.sequences, sample.rows, used, true, mixed, mass, facts, largest)


def rounds_to_one(fmt: FloatFormat) -> float:
    """The smallest number that rounds to 1, to nearest, ties to even: half the spacing below 1 is away from it.

    Raises:
        OptionError: 1 is no normal number of the format.
    """
    if not fmt.emin <= 0 <= fmt.emax:
        raise OptionError(f"format {fmt.name!r} has emin={fmt.emin}, emax={fmt.emax}; probabilities need 1 between them")
    return 1 - 2.0 ** (max(fmt.emin, -1) - fmt.p)


def _rates(raw: Tensor, total: Tensor, fmt: FloatFormat, hidden: Tensor, calls: int) -> dict[str, Tensor]:
    ties = (raw >= rounds_to_one(fmt)).sum(-1, keepdim=True) >= 2
    first = hidden.to(torch.uint8).argmin(-1, keepdim=True).expand_as(total)
    spread = torch.log(total) - torch.xlogy(raw, raw).sum(-1, keepdim=True) / total
    rates = {"tie_rate": ties.double(), "sink_mass": raw.gather(-1, first) / total, "entropy": spread}
    means = _by_head(heads_last(torch.cat(list(rates.values()), -1)), calls)
    return dict(zip(rates, means.unbind(-1), strict=True))


def _lean(values: Tensor, hidden: Tensor, calls: int) -> Tensor:
    """[L, Hkv]: the largest abs(mean) / standard deviation of a channel, over the keys that some sampled row sees."""
    weight = (~hidden.all(-2)).double().expand(*values.shape[:2], 1, values.shape[2])
    count = weight.unflatten(0, (calls, -1)).sum((1, 3, 4))[..., None]
    sums = ((weight @ t).unflatten(0, (calls, -1)).sum((1, 3)) for t in (values, values.square()))
    mean, square = (t / count for t in sums)
    variance = (square - mean.square()).clamp(min=0)
    lean: Tensor = (mean.abs() / variance.sqrt().clamp(min=1e-30)).amax(-1)
    return lean


def _used(stored: Tensor, true: Tensor, fmt: FloatFormat, stable: str) -> Tensor:
    if stable == "exact_delta":
        return true
    if stable == "delta":
        half = ulp(stored, fmt) / 2
        return stored + round_to((true - stored).clamp(-half, half), fmt)
    return stored


def _by_head(t: Tensor, calls: int) -> Tensor:
    """Mean over sampled rows: [n, r, H, *] -> [L, H, *]."""
    mean: Tensor = t.unflatten(0, (calls, -1)).mean((1, 2))
    return mean


def _largest(t: Tensor, calls: int) -> Tensor:
    """[L]: largest size, in one pass over what came; infinite or NaN where an element is."""
    size: Tensor = torch.linalg.vector_norm(t.unflatten(0, (calls, -1)).flatten(1), torch.inf, dim=1)
    return size
