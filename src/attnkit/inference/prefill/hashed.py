"""Attention within hash buckets, for models that were trained dense or with it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import OptionError, PolicyError, UnsupportedError
from attnkit.inference.call import LayerCall
from attnkit.modules import LSHHasher

__all__ = ["Hashed"]


@dataclass(frozen=True)
class Hashed:
    """Each query sees the earlier keys of its own bucket, by locality-sensitive hashing of the rotated vectors.

    A model that was trained dense loses more by it than by a window, because one bucket rarely holds what a query looks
    for: several rounds help, training with the same buckets helps most. Layers that have a sliding window of their own are
    left alone.

    Args:
        num_buckets: even, at least 2; the cost of a round falls with it.
        rounds: independent hashes, whose results are merged by their log-sum-exps.
        self_attend: whether a query sees its own key in every round. Without it a token with an empty bucket gives 0.
        dense_decode: single queries see every key: hashing the whole cache for one of them saves nothing.
        seed: of the rotations, one set for each key head, the same in all layers.
    Raises:
        OptionError: an odd number of buckets or one below 2, or no round.
    Source: Pagliardini et al. 2023, arXiv:2306.01160; Kitaev et al. 2020, arXiv:2001.04451.
    """

    name: ClassVar[str] = "hash"
    sparse: ClassVar[bool] = True
    drops_keys: ClassVar[bool] = False
    needs_causal: ClassVar[bool] = True
    needs_rotation: ClassVar[bool] = False
    num_buckets: int = 8
    rounds: int = 2
    self_attend: bool = True
    dense_decode: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_buckets < 2 or self.num_buckets % 2:
            raise OptionError(f"num_buckets={self.num_buckets} is not allowed; it must be even and at least 2")
        if self.rounds < 1:
            raise OptionError(f"rounds={self.rounds} is not allowed; hash at least once")

    def attend(self, call: LayerCall) -> Tensor:
        """Return out [B, T, H, Dv].

        Raises:
            UnsupportedError: a softcap or sinks, which hash attention does not have.
            PolicyError: the cache lacks keys that something has dropped.
        """
        if call.k.shape[1] != call.seen:
            raise PolicyError(f"the cache holds {call.k.shape[1]} keys of {call.seen} tokens; {self} needs all of them")
        if self.dense_decode and call.q.shape[1] == 1:
            return call.dense()
        for argument in ("softcap", "sinks"):
            if getattr(call, argument) is not None:
                raise UnsupportedError(f"the model's attention has {argument}, which hash attention does not support")
        heads, width = call.k.shape[2:]
        with torch.device(call.q.device):
            hasher = LSHHasher(heads, width, self.num_buckets, rounds=self.rounds, seed=self.seed, resample="never")
        options: dict[str, Any] = {"num_buckets": self.num_buckets, "self_attend": self.self_attend, "scale": call.scale}
        if call.padding is not None:
            real = call.padding.mask.bool()
            options |= {"k_keep": real, "q_keep": real[:, call.first :]}
        out: Any = ops.hash_sparse_attention(call.q, call.k, call.v, hasher(call.q), hasher(call.k), **options)
        return out  # type: ignore[no-any-return]
