"""What a kernel is measured on when its tile sizes are chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnkit._core.triton.configs import Config

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """One kernel on one problem.

    Attributes:
        run: runs the kernel with a configuration and returns its outputs.
        outputs: their names; those of gradients begin with "d_".
        inputs: of the public operator, by keyword.
        upstream: gradient of the operator's output; None where no gradient is computed.
        graph: whether it takes less time than Python takes to launch it, so that a CUDA graph has to time it.
    """

    run: Callable[[Config], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    inputs: Mapping[str, Any]
    upstream: Tensor | None
    graph: bool
