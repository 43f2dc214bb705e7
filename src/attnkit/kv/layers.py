"""Cache layers that keep the original position of every key they store."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from attnkit._core.checks import check_dtype
from attnkit._core.errors import InputError, PolicyError, ShapeError
from attnkit._core.lazy import require
from attnkit.kv.codecs import Codec, Raw
from attnkit.kv.context import Stored
from attnkit.kv.notes import Notes
from attnkit.kv.paged import Paged
from attnkit.kv.pages import PageStore
from attnkit.kv.selectors import Kept
from attnkit.kv.storage import copied, storages

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers.cache_utils import DynamicLayer  # noqa: E402

__all__ = ["KVLayer"]


class KVLayer(DynamicLayer):
    """Keys and values of one full-attention layer, of which some tokens may have been dropped.

    How many tokens were seen and how many are stored are two numbers: positions, masks and generation follow `seen`,
    memory follows `stored`.

    This class is the seam between policies and storage. A layer begins plain, all heads alike, in `keys` and `values`;
    windows thin it out through `keep`. `compress` moves it into `pages`, where every head has tokens of its own and codecs
    may shrink them. Pages are read by `attend` (attnkit's attention under `inference.apply`); any other attention gets
    them unpacked where all heads hold equally many, and an error where they do not.

    Args:
        codec: how pages are written.
        page_size: tokens a page; None is the codec's own.
        context: tokens after which the prefill is complete; None is the first pass.

    Attributes:
        keys, values: [B, Hkv, S, D] and [B, Hkv, S, Dv], rotated as the model rotated them; None before the first update
            and when the layer is in pages.
        positions: [B, Hkv or 1, S] int64, the index in its row (padding counted) of each stored token, ascending; of a plain
            layer.
        pages: the tokens of a compressed layer, or None.
        seen: tokens that went through `update`, less those cropped; what `get_seq_length` returns.
        floor: the shortest length that `crop` may go back to; everything from there on is stored, and so is all that
            those tokens need. 0 as long as nothing was dropped.
        owner: what dropped keys, as `keep` and `compress` were told; None as long as nothing was dropped.
        notes: what presses remember of this layer.
        listener: called with each attention call in place of the press, while a method reads the context again.
        served: whether the attention that runs now reads pages.
    """

    is_croppable = True

    def __init__(self, *, codec: Codec | None = None, page_size: int | None = None, context: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.codec = codec
        self.page_size = page_size
        self.context = context
        self.pages: Paged | None = None
        self.notes: dict[Any, Notes] = {}
        self.listener: Callable[[Any], None] | None = None
        self.served = False
        self.positions = torch.empty(0, 1, 0, dtype=torch.long)
        self.seen = 0
        self.floor = 0
        self.owner: object = None

    @property
    def stored(self) -> int:
        """The number of stored tokens, S; of pages those of the longest head, which asks the device."""
        if self.pages is not None:
            return int(self.pages.store.lengths.max())
        return 0 if self.keys is None else int(self.keys.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind keys, values and positions; notes of presses are not counted."""
        paged = [] if self.pages is None else self.pages.store.tensors()
        return sum(storages([self.keys, self.values, self.positions, *paged]).values())

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
            keys [B, Hkv, S + n, D] and values [B, Hkv, S + n, Dv]; `positions` holds their tokens. Of a layer in pages the n
            tokens alone, where `served` says that the caller reads the rest through `attend`.
        Raises:
            PolicyError: heads hold different numbers of tokens, and the caller does not read pages.
        """
        if self.pages is not None:
            self.seen += key_states.shape[-2]
            return self.pages.update(key_states, value_states, self.seen, served=self.served)
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

    def compress(self, stored: Stored, kept: Kept, *, owner: object = None) -> None:
        """Move the layer into pages: of `stored`, what `view` gave or a changed copy of it, the tokens that `kept` names.

        `crop` cannot go back behind this.
        """
        size = self.page_size or self._codec.page_size
        old, self.pages = self.pages, Paged(PageStore.build(stored, kept, codec=self._codec, page_size=size))
        if old is not None:
            old.release()
        self.keys = self.values = None
        self.positions = self.positions.new_empty(0, 1, 0)
        self.floor = self.seen
        self.owner = owner

    def settle(self, padding: Any) -> None:
        """Write a plain layer into pages as its codec says, all real tokens; without a codec nothing happens."""
        if self.codec is None or self.pages is not None or not self.stored or self.seen < (self.context or 0):
            return
        stored = self.view(padding)
        everything = torch.arange(stored.shape[2], device=stored.keys.device).expand(stored.shape)
        kept = Kept(everything) if stored.real is None else Kept.of_mask(stored.real.expand(stored.shape))
        self.compress(stored, kept, owner=self.owner)

    def view(self, padding: Any = None) -> Stored:
        """The stored tokens side by side.

        Args:
            padding: what knows the real tokens of a padded batch ([B, seen] bool as `mask`), or None.
        """
        if self.pages is not None:
            return self.pages.view()
        keys, values, positions = self._tensors()
        real = None
        if padding is not None:
            everywhere = positions.expand(keys.shape[0], -1, -1)
            real = padding.mask.bool()[:, None].expand(-1, everywhere.shape[1], -1).gather(-1, everywhere)
        return Stored(keys, values, positions, real)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, softcap: float | None, sinks: Tensor | None, padding: Any
    ) -> Tensor:
        """Attention of the newest tokens over everything in pages and, causally, each other: see `Paged.attend`."""
        assert self.pages is not None
        real = None if padding is None else padding.mask[:, self.seen - q.shape[1] :].bool()
        return self.pages.attend(q, k, v, real, scale=scale, softcap=softcap, sinks=sinks)

    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` queries meet, and the position that a mask function gives the first of them.

        With dropped keys the stored ones count as the newest, so that causal masks stay right. Pages have positions of their
        own, so that masks are those of a cache that holds everything.
        """
        if self.pages is not None:
            return self.seen + query_length, 0
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
        for notes in self.notes.values():
            notes.forget(remove)
        if self.pages is not None:
            self.pages.crop(remove)
            self.seen -= remove
            return
        keys, values, positions = self._tensors()
        end = self.stored - remove
        self.keys, self.values, self.positions = keys[..., :end, :], values[..., :end, :], positions[..., :end]
        self.seen -= remove

    def reset(self) -> None:
        """Forget everything."""
        if self.pages is not None:
            self.pages.release()
        self.pages = None
        self.notes = {}
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

    def fork(self) -> Self:
        """A copy to go on with in another way; full pages, which never change, are shared."""
        other = copy.copy(self)
        vars(other).update({name: copied(value) for name, value in vars(self).items() if name not in ("pages", "notes")})
        other.pages = None if self.pages is None else self.pages.fork()
        other.notes = {press: notes.copy() for press, notes in self.notes.items()}
        return other

    @property
    def _codec(self) -> Codec:
        return Raw() if self.codec is None else self.codec

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for notes in self.notes.values():
            notes.rows(change)
        if self.pages is not None:
            self.pages.rows(change)
        elif self.is_initialized:
            self.keys, self.values, self.positions = (change(states) for states in self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.keys is not None  # as long as `is_initialized` holds and there are no pages
        assert self.values is not None
        return self.keys, self.values, self.positions
