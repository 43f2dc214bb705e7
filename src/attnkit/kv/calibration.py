"""What some methods learn of a model beforehand, gathered while it reads texts."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.context import LayerCall
from attnkit.kv.scorers.patterns import retrieval_scores

__all__ = ["WHAT", "Recorder"]

WHAT = ("expected_attention_stats", "qfilter", "duo")


class Recorder:
    """Looks at the queries and keys of every layer, as the listener of its cache layers.

    Args:
        what: of WHAT.
        sinks: first tokens of each text whose queries do not count, except for "duo".
    Raises:
        OptionError: an unknown name.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})

    def __init__(self, what: Iterable[str], sinks: int = 4) -> None:
        self.what = tuple(what)
        unknown = sorted(set(self.what) - set(WHAT))
        if unknown or not self.what:
            raise OptionError(f"what={self.what} is not allowed; it names one or more of {', '.join(WHAT)}, lukv:METHOD")
        self.sinks = sinks
        self._moments: dict[int, _Moments] = {}
        self._rotated: dict[int, _Moments] = {}
        self._duo: dict[int, list[Tensor]] = {}
        self._heads: dict[int, int] = {}

    def passes(self, length: int) -> list[tuple[int, Callable[[LayerCall], None]]]:
        """How a text of one row is read: tokens of each pass and who listens."""
        return [(length, self._note)]

    def _note(self, call: LayerCall) -> None:
        positions = torch.arange(call.first, call.seen, device=call.q.device)
        index = call.index
        stored = call.layer.view()
        self._heads[index] = stored.shape[1]
        plain = call.rope.rotate(call.q.float(), -positions)[0].transpose(0, 1)  # [H, T, D]
        if "expected_attention_stats" in self.what:
            asked = plain[:, self.sinks :].clone()
            asked[..., : 2 * call.rope.inv_freq.numel()] /= call.rope.attention_factor  # the rotation put it there
            self._moments.setdefault(index, _Moments()).add(asked)
        if "qfilter" in self.what:
            self._rotated.setdefault(index, _Moments()).add(call.q[0].float().transpose(0, 1)[:, self.sinks :])
        if "duo" in self.what:
            keys = call.rope.rotate(stored.keys.float().transpose(1, 2), -positions)
            scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
            score = retrieval_scores(plain.mean(1)[None], keys.mean(1), call.rope, scale)
            self._duo.setdefault(index, []).append(score[0].cpu())

    def tensors(self, layers: int) -> dict[str, Tensor]:
        """What was learnt, float32 on the CPU; rows of layers that keep no positions are zero.

        Returns:
            "query_mean" [layers, H, D] and "query_cov" [layers, H, D, D] (divided by N - 1), of queries that are not
            rotated; "q_filters" [layers, Hkv, D]; "duo" [layers, Hkv].
        """
        found: dict[str, dict[int, Tensor]] = {}
        if "expected_attention_stats" in self.what:
            found["query_mean"] = {index: moments.mean for index, moments in self._moments.items()}
            found["query_cov"] = {index: moments.covariance() for index, moments in self._moments.items()}
        if "qfilter" in self.what:
            found["q_filters"] = {index: _filter(each, self._heads[index]) for index, each in self._rotated.items()}
        if "duo" in self.what:
            found["duo"] = {index: torch.stack(scores).mean(0) for index, scores in self._duo.items()}
        return {name: _stacked(parts, layers) for name, parts in found.items()}


def _stacked(parts: dict[int, Tensor], layers: int) -> Tensor:
    like = next(iter(parts.values()))
    out = like.new_zeros(layers, *like.shape, device="cpu", dtype=torch.float32)
    for index, part in parts.items():
        out[index] = part
    return out


class _Moments:
    """Count, mean [H, D] and sum of squared deviations [H, D, D] in float64, merged text by text."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self._spread: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Take in x [H, n, D]."""
        new = x.shape[1]
        if not new:
            return
        x = x.double()
        mean = x.mean(1)
        off = x - mean[:, None]
        step = mean - self.mean
        total = self.count + new
        self._spread = self._spread + off.mT @ off + step[..., None] * step[:, None] * (self.count * new / total)
        self.mean = self.mean + step * (new / total)
        self.count = total

    def covariance(self) -> Tensor:
        """[H, D, D], divided by N - 1."""
        return self._spread / max(self.count - 1, 1)  # type: ignore[no-any-return]

    def second(self) -> Tensor:
        """[H, D, D]: the mean of x x^T."""
        return self._spread / self.count + self.mean[..., None] * self.mean[:, None]  # type: ignore[no-any-return]


def _filter(moments: _Moments, heads: int) -> Tensor:
    """[Hkv, D]: against the first principal direction of each query head, mean over the group; keys that lie on the queries'
    side then have -f . k > 0.
    """
    direction: Tensor = torch.linalg.eigh(moments.second()).eigenvectors[..., -1]
    side = (direction * moments.mean).sum(-1, keepdim=True).sign()
    turned: Tensor = direction * torch.where(side == 0, 1.0, side)
    mean: Tensor = turned.unflatten(0, (heads, -1)).mean(1)
    return -mean
