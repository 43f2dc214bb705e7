"""Largest singular values of weights that change slowly: power iterations that go on where the last ones ended."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnkit._core.errors import UnsupportedError

__all__ = ["SpectralNorms"]

_COLD, _WARM = 30, 3  # iterations


class SpectralNorms:
    """Spectral norms of named matrices; a norm is approached from below."""

    def __init__(self) -> None:
        self._right: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, matrices: Mapping[str, Tensor]) -> dict[str, float]:
        """The norm of each, with three iterations (thirty the first time).

        Args:
            matrices: name -> [out, in].
        Raises:
            UnsupportedError: a weight that is sharded over devices.
        """
        found: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            if type(matrix.data) is not Tensor:
                raise UnsupportedError(
                    f"{name} is a {type(matrix.data).__name__}; spectral norms need whole weights, which FSDP does not have"
                )
            weight = matrix.detach().float()
            right = self._right.get(name)
            count = _COLD if right is None else _WARM
            if right is None:
                generator = torch.Generator().manual_seed(0)
                right = torch.randn(weight.shape[1], generator=generator).to(weight.device)
            for _ in range(count):
                right = torch.nn.functional.normalize(weight.T @ (weight @ right), dim=0)
            self._right[name] = right
            found[name] = (weight @ right).norm()
        return {name: float(value) for name, value in found.items()}
