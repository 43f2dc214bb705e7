"""Largest singular values of weights that change slowly: power iterations that go on where the last ones ended."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnkit._core.errors import UnsupportedError

__all__ = ["SpectralNorms"]

_COLD, _WARM = 30, 3  # iterations
_TOGETHER = 2**26  # elements of the matrices that are iterated as one batch


class SpectralNorms:
    """Spectral norms of named matrices; a norm is approached from below."""

    def __init__(self) -> None:
        self._right: dict[str, Tensor] = {}

    def measure(self, matrices: Mapping[str, Tensor]) -> dict[str, float]:
        """The norm of each, with three iterations (thirty the first time); matrices of one shape are iterated together.

        Args:
            matrices: name -> [out, in].
        Raises:
            UnsupportedError: a weight that is sharded over devices.
        """
        alike: dict[tuple[bool, torch.Size, torch.device], list[str]] = {}
        for name, matrix in matrices.items():
            if type(matrix.data) is not Tensor:
                raise UnsupportedError(
                    f"{name} is a {type(matrix.data).__name__}; spectral norms need whole weights, which FSDP does not have"
                )
            alike.setdefault((name in self._right, matrix.shape, matrix.device), []).append(name)
        found: list[tuple[Sequence[str], Tensor]] = []
        for (_, shape, _), names in alike.items():
            step = max(1, _TOGETHER // max(shape.numel(), 1))
            parts = [names[first : first + step] for first in range(0, len(names), step)]
            found += [(part, self._iterate(part, [matrices[name] for name in part])) for part in parts]
        if not found:
            return {}
        home = found[0][1].device
        norms = torch.cat([part.to(home) for _, part in found]).tolist()  # one wait for all
        values = dict(zip([name for part, _ in found for name in part], norms, strict=True))
        return {name: values[name] for name in matrices}

    @torch.no_grad()
    def _iterate(self, names: Sequence[str], matrices: Sequence[Tensor]) -> Tensor:
        """Norms [n] of matrices of one shape, all of them begun before or none."""
        weights = torch.stack([matrix.detach().float() for matrix in matrices])
        count = _WARM
        if names[0] not in self._right:
            count = _COLD
            start = torch.randn(weights.shape[-1], generator=torch.Generator().manual_seed(0)).to(weights.device)
            self._right |= dict.fromkeys(names, start)
        right = torch.stack([self._right[name] for name in names])[..., None]
        for _ in range(count):
            right = torch.nn.functional.normalize(weights.mT @ (weights @ right), dim=1)
        self._right |= dict(zip(names, right[..., 0].unbind(), strict=True))
        norms: Tensor = torch.linalg.vector_norm(weights @ right, dim=(1, 2))
        return norms
