"""How a model is trained: the few numbers that matter, as one value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """AdamW with a warm-up, a stable and a decay phase.

    Attributes:
        steps: optimizer steps.
        learning_rate: of the stable phase.
        warmup, decay: shares of the steps in which the rate rises from 0, and falls to 0.
        weight_decay: of matrices; norms and biases have none.
        betas: of AdamW.
        clip: largest norm of the gradient; 0 switches clipping off.
        accumulate: rows a step, each a forward and a backward pass, on every device.
        precision: "fp32", or "bf16": matrix products in bf16, weights and optimizer in fp32.
        compile: blocks and loss by torch.compile; worth its minute on a GPU.
        seed: of everything random.
        log_every: steps between lines of the log; losses are means over them.
        save_every: steps between checkpoints, a multiple of `log_every`; 0 saves at the end only.
        validate_every: steps between validations, a multiple of `log_every`; 0 validates at the end only.
    Raises:
        OptionError: a value outside its range.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: float = 0.02
    decay: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    validate_every: int = 0

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is not allowed; choose 1 or more")
        if self.learning_rate <= 0:
            raise OptionError(f"learning_rate={self.learning_rate} is not allowed; choose a positive number")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise OptionError(f"warmup={self.warmup} and decay={self.decay} are shares of the steps; together at most 1")
        for name in ("save_every", "validate_every"):
            if getattr(self, name) < 0 or getattr(self, name) % self.log_every:
                raise OptionError(f"{name}={getattr(self, name)} must be 0 or a multiple of log_every={self.log_every}")

    @property
    def warmup_steps(self) -> int:
        """Steps in which the rate rises."""
        return round(self.warmup * self.steps)

    @property
    def decay_steps(self) -> int:
        """Steps in which it falls."""
        return round(self.decay * self.steps)

    def facts(self) -> Mapping[str, Any]:
        """For result files."""
        return dataclasses.asdict(self)
