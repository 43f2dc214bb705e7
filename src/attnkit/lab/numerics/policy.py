"""Where an algorithm rounds, and to what: named sites, and the presets that papers and kernels amount to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError
from attnkit.lab.numerics.formats import FP32, FP64, FloatFormat, Mode, round_to

__all__ = ["ACCUMULATOR", "BACKWARD_SITES", "FORWARD_SITES", "PRESETS", "Preset", "Rounding", "SitePolicy"]

FORWARD_SITES: Mapping[str, str] = {
    "S": "products q k, before scaling",
    "S_scale": "scaled scores",
    "X": "scores less the maximum, the argument of the exponential",
    "P": "probabilities as an operand of the product with V",
    "P_sum": "probabilities as they are summed",
    "m": "running maximum",
    "alpha": "factor by which older results are rescaled",
    "l": "running sum of probabilities",
    "PV": "product of one tile of probabilities with its values",
    "O_acc": "running output",
    "O_norm": "output after the division by the sum",
    "O_out": "output as it is stored",
}
BACKWARD_SITES: Mapping[str, str] = {
    "delta": "row sum of dO times O (or of P times dP)",
    "dP": "products dO v",
    "dS": "gradient of the scores as an operand",
    "dQ_acc": "running gradient of q",
    "dK_acc": "running gradient of k",
    "dV_acc": "running gradient of v",
    "grad_out": "gradients as they are stored",
}
ACCUMULATOR = "accumulator"  # as a site of its own, where sites are compared
_SITES = (*FORWARD_SITES, *BACKWARD_SITES)
Preset = Literal["paper", "kernel", "autocast_ref", "all"]
PRESETS: tuple[Preset, ...] = ("paper", "kernel", "autocast_ref", "all")


@dataclass(frozen=True)
class Rounding:
    """A rounding: to which format, and how (`round_to` lists the modes)."""

    format: FloatFormat
    mode: Mode = "rne"


@dataclass(frozen=True)
class SitePolicy:
    """Roundings by site; a site without one is exact and costs nothing.

    Attributes:
        name: in results.
        sites: site -> rounding; FORWARD_SITES and BACKWARD_SITES list them with what is rounded there.
        accumulator: rounding of the partial sums inside matrix products and row sums; None sums exactly.
        accum_block: terms that are summed exactly before each rounding of the accumulator, the depth of one matrix
            instruction. This is a model of matrix units, not a description of one.
    Raises:
        OptionError: an unknown site, or accum_block below 1.
    """

    name: str
    sites: Mapping[str, Rounding] = field(default_factory=dict)
    accumulator: Rounding | None = None
    accum_block: int = 16

    def __post_init__(self) -> None:
        for site in self.sites:
            check_choice("site", site, _SITES)
        if self.accum_block < 1:
            raise OptionError(f"accum_block={self.accum_block} must be at least 1")

    @classmethod
    def preset(
        cls, name: Preset, fmt: FloatFormat, overrides: Mapping[str, FloatFormat | Rounding | None] | None = None
    ) -> "SitePolicy":
        """A named policy.

        Args:
            name: "paper" rounds every step of the recurrence to `fmt`, running statistics and output included (how Golden
                et al. 2024, arXiv:2405.02803, get their result). "kernel" is what real kernels do: probabilities and
                results in `fmt`, everything else in float32 (in float64 where `fmt` is wider than float32).
                "autocast_ref" is tiled attention in plain PyTorch under autocast: exponentials and sums in float32, what
                is kept between tiles in `fmt` (the setting of Qiu & Yao 2025, arXiv:2510.04212). "all" is "paper" with
                sums inside products rounded to `fmt` after every 16 terms.
            fmt: the format under study.
            overrides: site -> another rounding, or None for exact.
        Raises:
            OptionError: an unknown preset or site.
        """
        check_choice("name", name, PRESETS)
        low = Rounding(fmt)
        wide = Rounding(FP32 if fmt.p <= FP32.p else FP64)
        every = {site: low for site in _SITES if site not in ("S", "PV", "O_norm")}
        if name == "kernel":
            sites = every | dict.fromkeys(
                ("S_scale", "X", "P_sum", "m", "alpha", "l", "O_acc", "O_norm", "delta", "dP", "dQ_acc", "dK_acc", "dV_acc"),
                wide,
            )
        elif name == "autocast_ref":
            sites = every | dict.fromkeys(("X", "P_sum", "alpha", "delta"), wide) | {"PV": low}
        else:
            sites = every
        for site, rounding in (overrides or {}).items():
            check_choice("site", site, _SITES)
            sites.pop(site, None)
            if rounding is not None:
                sites[site] = Rounding(rounding) if isinstance(rounding, FloatFormat) else rounding
        return cls(name, sites, low if name == "all" else None)

    def only(self, sites: Collection[str]) -> "SitePolicy":
        """The policy at some of its sites; ACCUMULATOR among them keeps the accumulator."""
        kept = {site: self.sites[site] for site in sites if site != ACCUMULATOR}
        return SitePolicy(self.name, kept, self.accumulator if ACCUMULATOR in sites else None, self.accum_block)

    def round(self, site: str, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Round a tensor of that site."""
        rounding = self.sites.get(site)
        return x if rounding is None else _apply(rounding, x, generator)

    def dot(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """The product a @ b with the accumulator of the policy."""
        if self.accumulator is None:
            return a @ b
        total = torch.zeros((), dtype=a.dtype, device=a.device)
        for start in range(0, a.shape[-1], self.accum_block):
            terms = slice(start, start + self.accum_block)
            total = _apply(self.accumulator, total + a[..., terms] @ b[..., terms, :], generator)
        return total


def _apply(rounding: Rounding, x: Tensor, generator: torch.Generator | None) -> Tensor:
    return round_to(x, rounding.format, rounding.mode, generator=generator if rounding.mode == "sr" else None)
