"""What transformers asks of an attention implementation, and what all of ours refuse alike."""

from collections.abc import Mapping
from typing import Any

import torch

from attnkit._core.errors import UnsupportedError
from attnkit.inference import compat
from attnkit.inference.masks import Form, recognise

__all__ = ["forms_of", "refuse_arguments"]

# arguments that change what attention means and that none of ours honours; transformers passes the rest for other functions
_REFUSED = {
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "seq_idx": "packed sequences",
    "position_bias": "a bias for each pair of positions",
    "output_attentions": "returning attention weights",
}


def refuse_arguments(given: Mapping[str, Any], who: str) -> None:
    """Refuse what an attention module has passed beyond the arguments that are known.

    Args:
        given: keyword arguments.
        who: does not support them ("hash attention does").
    Raises:
        UnsupportedError: one changes what attention means.
    """
    for name, meaning in _REFUSED.items():
        if given.get(name) is not None and given[name] is not False:
            raise UnsupportedError(f"{name}: {who} not support {meaning}; leave it out")


def forms_of(
    mask_function: Any, *, batch: int, queries: range, keys: range, config: Any, device: torch.device | str
) -> set[Form]:
    """The forms of the mask that transformers wants built: see `masks.recognise`, which is not asked what is plainly causal.

    Args:
        mask_function, batch, queries, keys: as of `masks.recognise`.
        config: the model's, which may have a sliding window.
        device: where the mask function's own tensors are.
    Raises:
        UnsupportedError: none fits.
    """
    if compat.is_plain_causal(mask_function):
        return {Form(causal=True)}
    window = getattr(config, "sliding_window", None)
    return recognise(mask_function, batch=batch, queries=queries, keys=keys, window=window, device=torch.device(device))
