"""The sparse attention mixer: hash buckets, or rows that each head drops."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, UnsupportedError
from attnkit.modules.attention import head_sizes
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.projection import project
from attnkit.modules.rotary import rotate
from attnkit.modules.selection import Kept, LSHHasher, RandomDrop
from attnkit.ops.indexed.api import hash_sparse_attention, indexed_attention

__all__ = ["SparseCausalAttention"]

_ALONE, _NOTHING = MixerContext(), Shared()
_EXACT = 256  # bfloat16 holds integers up to here


class SparseCausalAttention(nn.Module):
    """Causal attention of each head within hash buckets, or of the queries and keys that it keeps.

    Exact for the pattern, at the cost of the pairs that are left. Buckets are those of vectors before they are rotated, so
    that what meets does not depend on positions. What a key is found by travels with it in the cache, as more channels.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim, layer_idx, rope, bias: as of `SoftmaxAttention`.
        mode: "hash", "drop", or "dense": every earlier key (to compare with).
        qk_shared: keys are queries of length 1, without a projection of their own, and each head has a temperature; query
            and key of a token then share a bucket. Needs num_kv_heads = num_heads.
        num_buckets: of "hash", even, up to 256.
        rounds: hashes of "hash"; a key that shares several rounds counts as often.
        self_attend: whether a token sees itself; without it the first of a bucket sees nothing.
        drop_rate: of "drop", what share of queries and of keys is dropped at random, where no masker is given.
        drop_q, drop_k: of "drop", modules that say what to keep (`RandomDrop`, `LearnedDrop`).
        seed, resample: of hashes, and of the default drops.
    Raises:
        OptionError: what `SoftmaxAttention` refuses; an unknown mode; shared queries and keys with grouped heads; more than
            256 buckets.
    Source: Pagliardini et al. 2023 (arXiv:2306.01160).

    >>> import torch
    >>> from attnkit.modules import SparseCausalAttention
    >>> SparseCausalAttention(64, 4, num_buckets=4, qk_shared=True, rope=False)(torch.randn(1, 9, 64)).shape
    torch.Size([1, 9, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        rope: bool = True,
        bias: bool = False,
        mode: str = "hash",
        qk_shared: bool = False,
        num_buckets: int = 16,
        rounds: int = 1,
        self_attend: bool = True,
        drop_rate: float = 0.5,
        drop_q: nn.Module | None = None,
        drop_k: nn.Module | None = None,
        seed: int = 0,
        resample: str = "step",
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("hash", "drop", "dense"))
        num_kv_heads, head_dim = head_sizes(hidden_size, num_heads, num_kv_heads, head_dim)
        if qk_shared and num_kv_heads != num_heads:
            raise OptionError(f"qk_shared needs as many key heads as query heads; they are {num_kv_heads} and {num_heads}")
        if num_buckets > _EXACT:
            raise OptionError(f"num_buckets={num_buckets} is above {_EXACT}, what the cache's number format holds exactly")
        self.mode, self.self_attend, self.num_buckets = mode, self_attend, num_buckets
        self.head_dim, self.layer_idx, self.rope = head_dim, layer_idx, rope
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        if not qk_shared:
            self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.temperature = nn.Parameter(torch.ones(num_heads)) if qk_shared else None
        if mode == "hash":
            self.hasher = LSHHasher(num_kv_heads, head_dim, num_buckets, rounds=rounds, seed=seed, resample=resample)
        if mode == "drop":
            self.drop_q = RandomDrop(drop_rate, seed=2 * seed, resample=resample) if drop_q is None else drop_q
            self.drop_k = RandomDrop(drop_rate, seed=2 * seed + 1, resample=resample) if drop_k is None else drop_k

    def forward(self, x: Tensor, context: MixerContext = _ALONE, shared: Shared = _NOTHING) -> Tensor:
        """[B, T, C] -> [B, T, C]; packed sequences come as [1, R, C] with `context.cu_seqlens`.

        Raises:
            OptionError: the layer rotates and the context has no angles.
            UnsupportedError: a context that is not causal, or a cache with a masker that looks at the whole sequence.
        """
        if not context.causal:
            raise UnsupportedError("sparse causal attention has no form that sees both sides; use mixer 'attention'")
        q, k, v = self._project(x)
        mine, marks, weight, v = self._choose(q, k, v, context)
        if self.temperature is not None:
            q = q * self.temperature.to(q.dtype)[:, None]
        if self.rope:
            q, k = rotate(q, *context.angles()), rotate(k, *context.angles())
        if context.cache is not None:  # caches keep [B, Hkv, S, D]
            k = k if marks is None else torch.cat([k, marks.to(k.dtype)], dim=-1)
            k, v = (t.transpose(1, 2) for t in context.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
            if marks is not None:
                k, marks = k[..., : self.head_dim], k[..., self.head_dim :]
        out = self._meet(q, k, v, mine, marks, context)
        if weight is not None:
            out = out * weight[..., None].to(out.dtype)
        result: Tensor = self.o_proj(out.flatten(-2))
        return result

    def _project(self, x: Tensor) -> list[Tensor]:
        layers = (self.q_proj, self.v_proj) if self.temperature is not None else (self.q_proj, self.k_proj, self.v_proj)
        heads = [t.unflatten(-1, (-1, self.head_dim)) for t in project(x, *layers)]
        if self.temperature is not None:
            heads.insert(1, F.normalize(heads[0], dim=-1).to(heads[0].dtype))  # autocast computes norms in float32
        return heads

    def _choose(
        self, q: Tensor, k: Tensor, v: Tensor, context: MixerContext
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """What queries are found by, [P, B, T, H]; what keys are found by, [B, T, Hkv, P]; weights of outputs; values."""
        if self.mode == "dense":
            return None, None, None, v
        if self.mode == "hash":
            mine = self.hasher(q)
            theirs = mine if self.temperature is not None else self.hasher(k)
            mine, theirs = (t if t.dim() == 4 else t[None] for t in (mine, theirs))
            return mine, theirs.movedim(0, -1), None, v
        first = 0
        if context.cache is not None:
            for masker in (self.drop_q, self.drop_k):
                if not getattr(masker, "causal", False):
                    raise UnsupportedError(f"{type(masker).__name__} looks at the whole sequence and cannot serve a cache")
            first = context.cache.get_seq_length(self.layer_idx)
        kept_q: Kept = self.drop_q(q, first)
        kept_k: Kept = self.drop_k(k, first)
        if kept_k.weight is not None:
            v = v * kept_k.weight[..., None].to(v.dtype)
        return kept_q.keep[None], kept_k.keep[..., None], kept_q.weight, v

    def _meet(
        self, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, marks: Tensor | None, context: MixerContext
    ) -> Tensor:
        options: dict[str, Any] = {}
        if context.padding is not None:
            real = context.padding[:, -k.shape[1] :]
            options |= {"q_keep": real[:, -q.shape[1] :], "k_keep": real}
        document, documents = None, 1
        if context.cu_seqlens is not None:
            documents = context.cu_seqlens.shape[0]  # rows behind the last boundary are one more
            row = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)
            document = torch.searchsorted(context.cu_seqlens[1:], row, right=True, out_int32=True)
        if mine is None or marks is None or self.mode == "drop":
            if mine is not None and marks is not None:
                for name, keep in (("q_keep", mine[0]), ("k_keep", marks[..., 0] > 0)):
                    options[name] = keep & options[name][..., None] if name in options else keep
            if document is not None:
                options |= {"q_group": document, "k_group": document, "num_groups": documents}
            causal = "inclusive" if self.self_attend else "strict"
            return indexed_attention(q, k, v, None, None, causal=causal, **options)  # type: ignore[return-value]
        theirs = marks.movedim(-1, 0).to(torch.int32)
        if document is not None:
            place = document[:, None] * self.num_buckets
            mine, theirs = mine + place, theirs + place
        count = documents * self.num_buckets
        return hash_sparse_attention(  # type: ignore[return-value]
            q, k, v, mine, theirs, num_buckets=count, self_attend=self.self_attend, **options
        )
