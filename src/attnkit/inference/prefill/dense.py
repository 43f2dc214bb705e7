"""Dense attention: the baseline, and what a policy uses that changes something else."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnkit.inference.call import LayerCall

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """Every query sees every earlier key that the cache still holds."""

    name: ClassVar[str] = "dense"
    sparse: ClassVar[bool] = False
    drops_keys: ClassVar[bool] = False
    needs_causal: ClassVar[bool] = False

    @property
    def needs_rotation(self) -> bool:
        """Never."""
        return False

    def attend(self, call: LayerCall) -> Tensor:
        """Return out [B, T, H, Dv]."""
        return call.dense()
