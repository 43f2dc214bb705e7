"""How far a result is from the true value, and which rounding is to blame."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnkit._core.checks import check_choice
from attnkit._core.errors import InputError, ShapeError
from attnkit.lab.numerics.emulate import Normalizer, emulated_attention
from attnkit.lab.numerics.formats import FloatFormat, round_to, ulp
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.policy import ACCUMULATOR, FORWARD_SITES, SitePolicy
from attnkit.lab.numerics.recurrences import Algorithm

__all__ = ["Deviation", "attribute_sites", "deviation"]

_STORED = ("S", "S_scale", "P", "O_out")  # all that the baseline rounds


@dataclass(frozen=True)
class Deviation:
    """The error e = out - golden of a result. What would be 0/0 is NaN.

    Attributes:
        max_abs, mean_abs, rms: of e.
        rel_fro: norm of e over that of the true value.
        cos: 1 - cosine of the angle between the two.
        ulp_max, ulp_p99, ulp_mean: size of e in units in the last place of the true value; at most 0.5 where the result is the
            true value rounded to nearest. Large where the true value is small by cancellation.
        ulp_row_max: size of e in units in the last place of the row scale, which does not cancel; this one is fit for limits.
        bias_ulp: mean of e in units in the last place.
        z: that mean in standard errors, with rows as samples: elements of a row share the rounding of its probabilities.
        bits_lost: log2 of rms over that of the true value rounded to the format.
    """

    max_abs: float
    mean_abs: float
    rms: float
    rel_fro: float
    cos: float
    ulp_max: float
    ulp_p99: float
    ulp_mean: float
    ulp_row_max: float
    bias_ulp: float
    z: float
    bits_lost: float


def deviation(out: Tensor, golden: Tensor, fmt: FloatFormat, row_scale: Tensor | None = None) -> Deviation:
    """Compare a result with the true value.

    Args:
        out: [..., D], any float dtype.
        golden: the same shape, float64.
        fmt: the format whose units errors are counted in.
        row_scale: the same shape, `sum_j P_ij |V_jd|`, which is `golden_attention(q, k, v.abs())`; None takes
            the size of the true value.
    Raises:
        ShapeError: shapes differ.
        InputError: nothing to compare, or the true value is not finite.
    """
    for name, tensor in (("golden", golden), ("row_scale", row_scale)):
        if tensor is not None and tensor.shape != out.shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)} and out has {tuple(out.shape)}; they must be the same")
    true = golden.double()
    if not true.numel() or not torch.isfinite(true).all():
        raise InputError("golden is empty or not finite; leave out rows without a true value")
    error = out.double() - true
    units = error / ulp(true, fmt)
    size = units.abs().flatten()
    in_row = error.abs() / ulp(true if row_scale is None else row_scale.double(), fmt)
    samples = units.mean(-1).flatten()
    rms = _rms(error)
    return Deviation(
        max_abs=float(error.abs().max()),
        mean_abs=float(error.abs().mean()),
        rms=rms,
        rel_fro=_ratio(rms, _rms(true)),
        cos=_angle(out.double(), true),
        ulp_max=float(size.max()),
        ulp_p99=float(size.kthvalue(max(1, math.ceil(0.99 * size.numel()))).values),
        ulp_mean=float(size.mean()),
        ulp_row_max=float(in_row.max()),
        bias_ulp=float(units.mean()),
        z=_ratio(float(samples.mean()), float(samples.std(correction=0)) / math.sqrt(samples.numel())),
        bits_lost=_log2(_ratio(rms, _rms(round_to(true, fmt) - true))),
    )


def attribute_sites(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: SitePolicy,
    fmt: FloatFormat,
    *,
    mode: Literal["one_in", "one_out"] = "one_in",
    algorithm: Algorithm = "fa2",
    block_k: int = 64,
    causal: bool = False,
    normalizer: Normalizer = "exact",
) -> dict[str, Deviation]:
    """The deviation that each rounding site of a policy causes.

    Args:
        q, k, v: as `emulated_attention` takes them, numbers of the format.
        policy: whose sites are examined.
        fmt: the format whose units errors are counted in.
        mode: "one_in" rounds at one site alone, "one_out" at all but one.
        algorithm, block_k, causal, normalizer: as of `emulated_attention`.
    Returns:
        site -> deviation, for every site that the algorithm has and the policy rounds, in the order of the computation;
        then "accumulator" where the policy has one, and "all", every site of the policy.
    Raises:
        what `emulated_attention` raises, and OptionError for an unknown mode.
    """
    check_choice("mode", mode, ("one_in", "one_out"))
    golden = golden_attention(q, k, v, causal=causal)
    scale = golden_attention(q, k, v.abs(), causal=causal)

    def measure(sites: Collection[str]) -> Deviation:
        out = emulated_attention(
            q, k, v, policy=policy.only(sites), algorithm=algorithm, block_k=block_k, causal=causal, normalizer=normalizer
        )
        return deviation(out, golden, fmt, scale)

    known = _STORED if algorithm == "baseline" else tuple(FORWARD_SITES)
    present = [site for site in known if site in policy.sites] + [ACCUMULATOR] * (policy.accumulator is not None)
    alone = {site: [site] if mode == "one_in" else [other for other in present if other != site] for site in present}
    return {site: measure(sites) for site, sites in alone.items()} | {"all": measure(present)}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _angle(a: Tensor, b: Tensor) -> float:
    """1 - cos, as half the squared distance of unit vectors: the difference itself would cancel."""
    a, b = a.flatten(), b.flatten()
    return float((a / a.norm() - b / b.norm()).square().sum() / 2)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a))


def _log2(x: float) -> float:
    return -math.inf if x == 0 else math.log2(x)
