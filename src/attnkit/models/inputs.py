"""From a model's arguments to what mixers are given, with everything refused that would be wrong in silence."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnkit._core.checks import check_dtype, dims
from attnkit._core.errors import OptionError, ShapeError, UnsupportedError
from attnkit.models.configuration import HybridConfig
from attnkit.modules import MixerContext

__all__ = ["Packed", "make_context", "mask_starts"]


@dataclass(frozen=True)
class Packed:
    """Boundaries of packed sequences, as transformers' `DataCollatorWithFlattening` names them.

    Attributes:
        cu_seq_lens_q, cu_seq_lens_k: [N + 1] int32, equal; both None where nothing is packed.
        max_length_q, max_length_k: rows of the longest sequence; None where it is not known.
    """

    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None

    def boundaries(self) -> Tensor | None:
        """The one list of boundaries, or None.

        Raises:
            OptionError: one of the two is missing, or they differ.
        """
        first, second = self.cu_seq_lens_q, self.cu_seq_lens_k
        if first is None and second is None:
            if self.max_length_q is not None or self.max_length_k is not None:
                raise OptionError(
                    "max_length_q and max_length_k describe packed sequences; give cu_seq_lens_q and cu_seq_lens_k"
                )
            return None
        if first is None or second is None:
            raise OptionError("cu_seq_lens_q and cu_seq_lens_k belong together; give both")
        if first is not second and _readable(first) and not torch.equal(first, second):
            raise OptionError("cu_seq_lens_q and cu_seq_lens_k differ; queries and keys of a model are the same tokens")
        return first


def make_context(
    config: HybridConfig,
    x: Tensor,
    rotary: nn.Module | None,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    packed: Packed,
) -> MixerContext:
    """Check the arguments of a forward pass against each other and against every mixer.

    Args:
        config: of the model.
        x: [B, T, C], embeddings.
        rotary: positions -> (cos, sin), or None where no mixer rotates.
        attention_mask: [B, past + T], nonzero for real tokens.
        position_ids: [B or 1, T]; None counts rows, from 0 in every packed sequence.
        cache: what is cached, or None.
        packed: boundaries of packed sequences.
    Raises:
        ShapeError, DTypeError, OptionError, UnsupportedError: the message names the argument, and the layer that refuses.
    """
    batch, length = x.shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    cu_seqlens = packed.boundaries()
    if cu_seqlens is not None:
        _check_packed(config, cu_seqlens, batch, length, attention_mask, cache)
    padding = None if attention_mask is None else _padding(config, attention_mask, batch, past + length)
    if position_ids is None:
        position_ids = _positions(length, past, cu_seqlens, x.device)
    else:
        _check_positions(position_ids, batch, length, free=padding is not None or cu_seqlens is not None)
    return MixerContext(
        causal=not config.bidirectional,
        cache=cache,
        padding=padding,
        rope=None if rotary is None else rotary(position_ids),
        cu_seqlens=cu_seqlens,
        max_seqlen=packed.max_length_q,
    )


def mask_starts(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Labels [1, R] in which no sequence's first token is a target: what stands before it is another sequence."""
    length = labels.shape[1]
    first = torch.zeros(length + 1, dtype=torch.bool, device=labels.device)  # empty sequences at the end start behind the row
    first[cu_seqlens.long()] = True
    return labels.masked_fill(first[:length], -100)


def _readable(tensor: Tensor) -> bool:
    """Reading values on a GPU would wait for it, and in a compiled graph break it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_packed(
    config: HybridConfig, cu_seqlens: Tensor, batch: int, length: int, attention_mask: Tensor | None, cache: Any
) -> None:
    if attention_mask is not None:
        raise OptionError(
            "attention_mask and cu_seq_lens_q were both given; packed sequences have no padding, leave the mask out"
        )
    if cache is not None:
        raise OptionError("packed sequences and a cache were both given; leave out past_key_values, or give one sequence a row")
    if batch != 1:
        raise ShapeError(f"packed sequences come as one row [1, R]; input_ids has {batch} rows")
    dims(cu_seq_lens_q=(cu_seqlens, "N+1"))
    check_dtype("cu_seq_lens_q", cu_seqlens, torch.int32)
    if _readable(cu_seqlens) and (
        cu_seqlens.numel() < 2 or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any())
    ):
        raise ShapeError(f"cu_seq_lens_q must rise from 0 to {length}, the tokens; it holds {cu_seqlens.tolist()[:8]}...")
    for index, spec in config.mixers():
        if not spec.packing:
            raise UnsupportedError(f"layer {index} ({spec.name}) does not keep packed sequences apart; give one sequence a row")


def _padding(config: HybridConfig, attention_mask: Tensor, batch: int, total: int) -> Tensor | None:
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UnsupportedError(
            "attention_mask must be [B, past + T], nonzero for real tokens; prepared masks are not supported"
        )
    if attention_mask.shape != (batch, total):
        raise ShapeError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [{batch}, {total}], cached tokens included"
        )
    padding = attention_mask.bool()
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None  # plain kernels are faster than masked ones
    for index, spec in config.mixers():
        if not spec.padding and spec.cache_type is not None:
            raise UnsupportedError(f"layer {index} ({spec.name}) does not leave padding out; give sequences of one length")
    return padding


def _positions(length: int, past: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    rows = torch.arange(past, past + length, device=device)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].contiguous()
        starts = cu_seqlens[torch.searchsorted(ends, rows.to(ends.dtype), right=True)]
        rows = rows - starts
    return rows[None]


def _check_positions(position_ids: Tensor, batch: int, length: int, *, free: bool) -> None:
    if position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
        raise ShapeError(f"position_ids has shape {tuple(position_ids.shape)}; expected [{batch}, {length}] or [1, {length}]")
    if free or length == 1 or torch.compiler.is_compiling():
        return
    if bool((position_ids.diff(dim=1) < 0).any()):
        raise OptionError(
            "position_ids start again inside a row: packed sequences need cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
            "max_length_k too, since nothing else keeps them apart"
        )
