"""Who meets whom in sparse attention: hash buckets, and which queries and keys a head keeps.

Nothing here draws from a global generator. What is random is a function of a seed, of `draws` (a buffer, saved with the
model) and of an index, so that a forward pass that is run again, as gradient checkpointing does, chooses the same. `advance`
moves on to the next draw; the trainer of `attnkit.training` calls it after every optimiser step.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError

__all__ = ["Kept", "LSHHasher", "LearnedDrop", "RandomDrop", "Redrawn", "TopKDrop", "uniform"]

_WORD = 0xFFFFFFFF
RESAMPLE = ("never", "step", "epoch")


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose bits depend on each other (the constants are Wellons' lowbias32), in int64."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)


def uniform(seed: int | Tensor, draws: Tensor, index: Tensor) -> Tensor:
    """Numbers in (0, 1), float32, of the shape of `index` (int64): a function of the three, on every device. `seed` and
    `index` lie in 0..2^32 - 1."""
    start = _mix(_mix(draws.to(torch.int64) & _WORD) ^ seed)
    bits = _mix(_mix(index & _WORD) ^ start)
    return ((bits >> 9).to(torch.float32) + 0.5) / 2**23


class Redrawn(nn.Module):
    """Something random that stays as it is until `advance` is called.

    Args:
        seed: of the draws.
        resample: what moves on to the next draw: "step" (an optimiser step), "epoch", or "never".
    Raises:
        OptionError: another value of `resample`.
    """

    draws: Tensor

    def __init__(self, seed: int, resample: str) -> None:
        super().__init__()
        check_choice("resample", resample, RESAMPLE)
        self.resample = resample
        # torch.compile makes a graph for every number, but one for all tensors. No buffer: the meta device would lose it
        self.seed = torch.tensor(seed & _WORD, dtype=torch.int64, device="cpu")
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def advance(self, what: str = "step") -> None:
        """Draw anew, where that is what `resample` waits for; in place, and never inside a forward pass."""
        if what == self.resample:
            self.draws.add_(1)


class LSHHasher(Redrawn):
    """Locality-sensitive hashing by random rotations: the bucket of x is the largest of [x R, -x R].

    Vectors at a small angle often share a bucket; the length does not matter. No gradient passes.

    Args:
        num_heads: sets of rotations; an input may have any multiple of it as heads, neighbours sharing a set.
        head_dim: D.
        num_buckets: an even number.
        per_head: each head has its own rotations; False: one set for all.
        rounds: how many independent hashes.
        seed, resample: see `Redrawn`.
    Raises:
        OptionError: an odd number of buckets or one below 2, or no round.
    Source: Andoni et al. 2015 (arXiv:1509.02897); Kitaev et al. 2020 (arXiv:2001.04451).

    >>> import torch
    >>> from attnkit.modules import LSHHasher
    >>> hasher, x = LSHHasher(2, 16, 8), torch.randn(1, 5, 2, 16)
    >>> torch.equal(hasher(x), hasher(3 * x))
    True
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_buckets: int,
        *,
        per_head: bool = True,
        rounds: int = 1,
        seed: int = 0,
        resample: str = "step",
    ) -> None:
        super().__init__(seed, resample)
        if num_buckets < 2 or num_buckets % 2:
            raise OptionError(f"num_buckets={num_buckets} must be even and at least 2: a direction and its opposite are two")
        if rounds < 1:
            raise OptionError(f"rounds={rounds} must be at least 1")
        self.num_heads, self.head_dim, self.num_buckets = num_heads if per_head else 1, head_dim, num_buckets
        self.rounds = rounds

    def rotations(self) -> Tensor:
        """[rounds, heads, D, num_buckets / 2] of the current draw, float32, columns of length 1."""
        shape = (self.rounds, self.num_heads, self.head_dim, self.num_buckets // 2)
        index = torch.arange(2 * math.prod(shape), device=self.draws.device).view(2, *shape)
        radius, angle = uniform(self.seed, self.draws, index)
        normal = (-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * angle)  # Box and Muller
        rotations: Tensor = normal / normal.norm(dim=2, keepdim=True)
        return rotations

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> int32 [B, T, H], with several rounds [P, B, T, H]."""
        rotations = self.rotations().repeat_interleave(x.shape[2] // self.num_heads, 1)
        turned = torch.einsum("bthd,phdn->pbthn", x.float(), rotations)
        bucket = torch.cat([turned, -turned], dim=-1).argmax(-1).int()
        return bucket[0] if self.rounds == 1 else bucket


class Kept(NamedTuple):
    """What a masker says.

    Attributes:
        keep: [B, T, H] bool.
        weight: [B, T, H], what outputs (of queries) and values (of keys) are multiplied with, or None.
    """

    keep: Tensor
    weight: Tensor | None = None


class RandomDrop(Redrawn):
    """Drop each row of each head with one probability, as the paper's language models do.

    In training batch elements differ; in evaluation a token's fate depends on its place and head alone.

    Args:
        rate: what share is dropped, in [0, 1).
        seed, resample: see `Redrawn`.
    Raises:
        OptionError: a rate outside [0, 1).
    Source: Pagliardini et al. 2023 (arXiv:2306.01160), where masks are drawn from the global generator, in evaluation too.
    """

    causal = True

    def __init__(self, rate: float, *, seed: int = 0, resample: str = "step") -> None:
        super().__init__(seed, resample)
        if not 0 <= rate < 1:
            raise OptionError(f"rate={rate} must lie in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor, first: int = 0) -> Kept:
        """Which rows of x [B, T, H, D] are kept; `first` is the place of its first token."""
        batch, rows, heads = x.shape[:3]
        place = torch.arange(first * heads, (first + rows) * heads, device=x.device).view(1, rows, heads)
        element = torch.arange(batch, device=x.device)[:, None, None] if self.training else place.new_zeros(batch, 1, 1)
        return Kept(uniform(self.seed, self.draws, _mix(element) ^ place) >= self.rate)


class _Penalised(torch.autograd.Function):
    """The identity whose gradient is that of penalty * mean(x) as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: float) -> Tensor:
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad + ctx.penalty / max(grad.numel(), 1), None


class LearnedDrop(nn.Module):
    """A gate for every token and head: a = sigmoid(w . x + b); rows with a <= threshold are dropped, others scaled by a.

    The gate learns from what it scales, and is pushed shut by a penalty on the mean of a: its gradient is added in the
    backward pass, with no term in the loss that is reported. A dropped row has no gradient but the penalty's, and opens again
    only as weights that it shares with kept rows change.

    Args:
        num_heads, head_dim: H and D.
        threshold: in [0, 1).
        penalty: weight of mean(a), 0 for none.
        bias: b at the beginning; 1 starts with open gates.
    Raises:
        OptionError: a threshold outside [0, 1), or a penalty below 0.
    Source: the gates in the published code of Pagliardini et al. 2023 (arXiv:2306.01160).
    """

    causal = True

    def __init__(
        self, num_heads: int, head_dim: int, *, threshold: float = 0.5, penalty: float = 0.0, bias: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise OptionError(f"threshold={threshold} must lie in [0, 1)")
        if penalty < 0:
            raise OptionError(f"penalty={penalty} must not be negative")
        self.threshold, self.penalty = threshold, penalty
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.bias = nn.Parameter(torch.full((num_heads,), bias))

    def forward(self, x: Tensor, first: int = 0) -> Kept:
        """Gates of x [B, T, H, D]."""
        gate = torch.sigmoid((x * self.weight.to(x.dtype)).sum(-1) + self.bias.to(x.dtype))
        keep = gate.detach() > self.threshold
        if self.penalty and torch.is_grad_enabled():
            gate = _Penalised.apply(gate, self.penalty)  # type: ignore[no-untyped-call]
        return Kept(keep, gate)


class TopKDrop(nn.Module):
    """Keep the rows of each head with the highest scores w . x, a fixed share of the sequence.

    It looks at the whole sequence before it chooses, so a later token can push an earlier one out: for encoders and
    measurements, and refused where tokens come one after another.

    Args:
        num_heads, head_dim: H and D.
        share: what is kept, in (0, 1]; at least one row.
    Raises:
        OptionError: a share outside (0, 1].
    """

    causal = False

    def __init__(self, num_heads: int, head_dim: int, *, share: float = 0.5) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise OptionError(f"share={share} must lie in (0, 1]")
        self.share = share
        self.weight = nn.Parameter(torch.randn(num_heads, head_dim) / head_dim**0.5)

    def forward(self, x: Tensor, first: int = 0) -> Kept:
        """The choice among x [B, T, H, D], and the gates sigmoid(w . x) that let it learn."""
        score = (x * self.weight.to(x.dtype)).sum(-1)
        count = min(max(round(self.share * x.shape[1]), 1), x.shape[1])
        best = score.detach().topk(count, dim=1).indices
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, value=True)
        return Kept(keep, torch.sigmoid(score))
