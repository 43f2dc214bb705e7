"""Calls of transformers' attention interface, as samples."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnkit._core.errors import UnsupportedError
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.sampled import Sample
from attnkit.ops.attention.call import prepare

__all__ = ["KNOWN", "sample_call"]

KNOWN = ("eager", "sdpa")  # others are given no mask, or one of their own form
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")


@torch.no_grad()
def sample_call(
    probe: RoundingBiasProbe, name: str, module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None,
    options: Mapping[str, Any], out: Tensor,
) -> Sample:  # fmt: skip
    """Rows of one call.

    Args:
        probe: which rows.
        name: of the implementation, one of KNOWN.
        module: that called it.
        tensors: query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv].
        mask: [B or 1, 1, T, S] or wider, bool, or numbers to add that are 0 or, where a row does not see a key, very small.
        options: the other arguments.
        out: [B, T, H, Dv].
    Raises:
        UnsupportedError: the call asks for something that is not known here.
    """
    asked = [option for option in _UNKNOWN if options.get(option) is not None]
    if options.get("dropout"):
        asked.append("dropout")
    if asked:
        raise UnsupportedError(f"{', '.join(asked)}: not known here")
    q, k, v = (t.transpose(1, 2) for t in tensors)
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    causal = causal and name == "sdpa" and mask is None and q.shape[1] > 1
    if causal and q.shape[1] != k.shape[1]:
        raise UnsupportedError("causal without a mask, and other keys than queries")
    sample = probe.take(prepare(q, k, v, causal=causal, scale=options.get("scaling")), out)
    return sample if mask is None else replace(sample, mask=_shown(mask, sample, q.shape[0], k.shape[1]))


def _shown(mask: Tensor, sample: Sample, batch: int, keys: int) -> Tensor:
    """[n, r, S] bool of the sampled rows."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise UnsupportedError(f"a mask of shape {tuple(mask.shape)}; known are [B, 1, T, S]")
    rows = mask[:, 0, :, :keys].expand(batch, -1, -1)[sample.sequences[:, None], sample.rows]
    if rows.dtype == torch.bool:
        return rows
    shown = rows == 0
    if not (shown | (rows <= torch.finfo(rows.dtype).min / 2)).all():
        raise UnsupportedError("a mask with other numbers than 0 and very small ones")
    return shown
