"""Frequencies scaled once, for every position: position interpolation, NTK-aware base, YaRN."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnkit._core.errors import OptionError, PolicyError
from attnkit.inference.rope import RopeSpec

__all__ = ["NTK", "PI", "YaRN"]


@dataclass(frozen=True)
class PI:
    """Position interpolation: all positions shrink by `factor`, f_i / factor.

    Args:
        factor: at least 1; how many times longer than trained the context may become.
    Raises:
        OptionError: factor below 1.
    Source: Chen et al. 2023, arXiv:2306.15595.
    """

    name: ClassVar[str] = "pi"
    factor: float = 2.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def rescale(self, rope: RopeSpec) -> RopeSpec:
        """The frequencies that this method rotates with."""
        return rope.replace(inv_freq=rope.inv_freq.double() / self.factor, attention_factor=rope.attention_factor)


@dataclass(frozen=True)
class NTK:
    """NTK-aware scaling: the base grows so that the slowest pair shrinks by `factor` and the fastest keeps its pace.

    theta' = theta * factor^(R / (R - 2)), that is f_i * factor^(-2i / (R - 2)) for pair i of R / 2.

    Args:
        factor: at least 1.
    Raises:
        OptionError: factor below 1.
    Source: bloc97 2023, as given in Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """

    name: ClassVar[str] = "ntk"
    factor: float = 2.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def rescale(self, rope: RopeSpec) -> RopeSpec:
        """The frequencies that this method rotates with."""
        pairs = rope.inv_freq.numel()
        slowdown = torch.arange(pairs, dtype=torch.float64, device=rope.inv_freq.device) / max(pairs - 1, 1)
        inv_freq = rope.inv_freq.double() * self.factor**-slowdown
        return rope.replace(inv_freq=inv_freq, attention_factor=rope.attention_factor)


@dataclass(frozen=True)
class YaRN:
    """YaRN: pairs that turn often inside the trained length keep their pace, those that hardly turn are interpolated.

    A pair that turns r times within the trained length keeps f_i for r >= beta_fast, takes f_i / factor for r <= beta_slow,
    and a mixture, linear in the pair's index, in between. Scores grow by the square of 1 + 0.1 ln(factor).

    Args:
        factor: at least 1.
        beta_fast, beta_slow: turns, beta_fast > beta_slow > 0.
    Raises:
        OptionError: factor below 1, or betas in the wrong order.
    Source: Peng et al. 2023, arXiv:2309.00071, section 3.
    """

    name: ClassVar[str] = "yarn"
    factor: float = 2.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not self.beta_fast > self.beta_slow > 0:
            raise OptionError(
                f"beta_fast={self.beta_fast} and beta_slow={self.beta_slow} must satisfy beta_fast > beta_slow > 0"
            )

    def rescale(self, rope: RopeSpec) -> RopeSpec:
        """The frequencies that this method rotates with.

        Raises:
            PolicyError: the model's frequencies are scaled already.
        """
        if rope.rope_type != "default":
            raise PolicyError(
                f"yarn starts from unscaled frequencies, but the model's rope_type is {rope.rope_type!r}; use pi or ntk, which "
                f"scale what is there"
            )
        pairs = rope.inv_freq.numel()
        low = max(math.floor(self._pair(self.beta_fast, rope)), 0)
        high = min(math.ceil(self._pair(self.beta_slow, rope)), rope.rotary_dim - 1)
        span = high - low or 0.001  # a step where both bounds meet
        index = torch.arange(pairs, dtype=torch.float64, device=rope.inv_freq.device)
        interpolated = ((index - low) / span).clamp(0, 1)
        inv_freq = rope.inv_freq.double() * (1 - interpolated + interpolated / self.factor)
        return rope.replace(inv_freq=inv_freq, attention_factor=rope.attention_factor * (1 + 0.1 * math.log(self.factor)))

    def _pair(self, turns: float, rope: RopeSpec) -> float:
        """The (fractional) index of the pair that turns so often within the trained length."""
        return rope.rotary_dim * math.log(rope.max_positions / (2 * math.pi * turns)) / (2 * math.log(rope.theta))


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise OptionError(f"factor={factor} is not allowed; it says how many times longer the context becomes, at least 1")
