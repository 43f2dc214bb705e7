"""Cache layers that keep the original position of every key they store, and the cache made of them."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from attnkit._core.checks import check_dtype
from attnkit._core.errors import InputError, PolicyError, ShapeError
from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["KVCache", "KVLayer"]


class KVLayer(DynamicLayer):
    """Keys and values of one full-attention layer, of which some tokens may have been dropped.

    How many tokens were seen and how many are stored are two numbers: positions, masks and generation follow `seen`,
    memory follows `stored`.

    This class is the seam between policies and storage. Policies read `positions`, `seen`, `stored`, `floor` and `owner`,
    and change a layer through `keep` alone; they never touch `keys` and `values`. A layer with another storage (pages,
    codecs, tiers) subclasses this one, overrides the methods below, and no policy changes.

    Attributes:
        keys, values: [B, Hkv, S, D] and [B, Hkv, S, Dv], rotated as the model rotated them; None before the first update.
        positions: [B, Hkv or 1, S] int64, the index in its row (padding counted) of each stored token, ascending.
        seen: tokens that went through `update`, less those cropped; what `get_seq_length` returns.
        floor: the shortest length that `crop` may go back to; everything from there on is stored, and so is all that
            those tokens need. 0 as long as nothing was dropped.
        owner: what dropped keys, as `keep` was told; None as long as nothing was dropped.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.positions = torch.empty(0, 1, 0, dtype=torch.long)
        self.seen = 0
        self.floor = 0
        self.owner: object = None

    @property
    def stored(self) -> int:
        """The number of stored tokens, S."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind keys, values and positions."""
        return sum(_storages((self.keys, self.values, self.positions)).values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, widths, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_empty(batch, heads, 0, key_states.shape[-1])
        self.values = value_states.new_empty(batch, heads, 0, value_states.shape[-1])
        self.positions = torch.empty(batch, 1, 0, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append n tokens and return all stored keys and values.

        Args:
            key_states, value_states: [B, Hkv, n, D] and [B, Hkv, n, Dv].
        Returns:
            keys [B, Hkv, S + n, D] and values [B, Hkv, S + n, Dv]; `positions` holds their tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, positions = self._tensors()
        new = torch.arange(self.seen, self.seen + key_states.shape[-2], device=positions.device)
        self.keys = torch.cat([keys, key_states], dim=-2)
        self.values = torch.cat([values, value_states], dim=-2)
        self.positions = torch.cat([positions, new.expand(*positions.shape[:2], -1)], dim=-1)
        self.seen += key_states.shape[-2]
        return self.keys, self.values

    def keep(self, index: Tensor, *, floor: int | None = None, owner: object = None) -> None:
        """Keep the stored tokens that `index` names and drop the rest; `seen` stays as it is.

        Args:
            index: [B, Hkv or 1, S'] int64 into the stored tokens, ascending; one list a head, or one for all heads.
            floor: the shortest length that `crop` may still go back to; None means the present one.
            owner: what decided; a policy refuses a cache that something else has thinned out.
        Raises:
            ShapeError, DTypeError: `index` has another shape or dtype.
            InputError: nothing is stored yet.
        """
        if not self.is_initialized:
            raise InputError("keep() needs stored tokens; the layer is empty")
        check_dtype("index", index, torch.int64)
        keys, values, positions = self._tensors()
        batch, heads = keys.shape[:2]
        if index.dim() != 3 or index.shape[0] != batch or index.shape[1] not in (1, heads):
            raise ShapeError(f"index has shape {tuple(index.shape)}; expected [{batch}, {heads} or 1, S']")
        rows = max(index.shape[1], positions.shape[1])
        self.positions = positions.expand(-1, rows, -1).gather(-1, index.expand(-1, rows, -1))
        self.keys, self.values = (
            states.gather(-2, index[..., None].expand(-1, heads, -1, states.shape[-1])) for states in (keys, values)
        )
        self.floor = self.seen if floor is None else floor
        self.owner = owner

    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` queries meet, and the position that a mask function gives the first of them.

        With dropped keys the stored ones count as the newest, so that causal masks stay right.
        """
        return self.stored + query_length, self.seen - self.stored

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: `crop(-n)` removes n of them.

        Raises:
            InputError: a positive number, or more tokens than were seen.
            PolicyError: a token further back needs keys that were dropped.
        """
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}) is not allowed; crop(-n) removes the newest n tokens")
        remove = -tokens_to_remove
        if remove == 0 or not self.is_initialized:
            return
        if remove > self.seen:
            raise InputError(f"crop(-{remove}) removes more tokens than the {self.seen} that the cache has seen")
        if self.seen - remove < self.floor:
            raise PolicyError(
                f"crop(-{remove}) goes back to {self.seen - remove} tokens, but {self.owner} has dropped keys that tokens "
                f"before {self.floor} need; propose at most {self.seen - self.floor} tokens a step, or use a DynamicCache"
            )
        keys, values, positions = self._tensors()
        end = self.stored - remove
        self.keys, self.values, self.positions = keys[..., :end, :], values[..., :end, :], positions[..., :end]
        self.seen -= remove

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.positions = self.positions.new_empty(0, 1, 0)
        self.is_initialized = False
        self.seen = self.floor = 0
        self.owner = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put row beam_idx[b] into row b."""
        self._rows(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._rows(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names."""
        self._rows(lambda states: states[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values, self.positions = (change(states) for states in self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.keys is not None  # as long as `is_initialized` holds
        assert self.values is not None
        return self.keys, self.values, self.positions


class KVCache(Cache):
    """A cache whose full-attention layers are `KVLayer`s; sliding-window and linear layers are the stock ones.

    Args:
        config: the model's configuration (of the whole model or of its text part).

    >>> cache = KVCache(model.config)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(self, config: Any) -> None:
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[KVLayer() if type(layer) is DynamicLayer else layer for layer in stock])

    def nbytes(self) -> int:
        """Bytes of the memory that all layers hold on to, whatever their kind; memory behind views counts in full."""
        return sum(_storages([vars(layer) for layer in self.layers]).values())

    def clone(self) -> Self:
        """A copy that shares no tensor with this one, for going on in two ways from one prefill."""
        other = copy.copy(self)
        other.layers = []
        for layer in self.layers:
            twin = copy.copy(layer)
            vars(twin).update({name: _copied(value) for name, value in vars(layer).items()})
            other.layers.append(twin)
        return other


def _storages(value: object) -> dict[int, int]:
    """Address -> bytes of every block of memory that the tensors in `value` (nested lists, tuples, dicts) hold on to."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {address: size for part in parts for address, size in _storages(part).items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value
