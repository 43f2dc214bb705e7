"""Learning beforehand what some cache methods want to know of a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import InputError, OptionError
from attnkit._core.events import Event
from attnkit.inference import compat
from attnkit.inference.applied import apply
from attnkit.inference.policy import Policy
from attnkit.kv.calibration import Recorder
from attnkit.kv.context import ScoreContext
from attnkit.kv.pressing import Press
from attnkit.kv.utility import STEM, UtilityCurves

__all__ = ["calibrate"]


@dataclass(frozen=True)
class _Nothing:
    """Asks for what listeners need, and drops nothing with a ratio of 0."""

    needs: frozenset[str]

    def score(self, ctx: ScoreContext) -> Tensor:
        return torch.zeros(ctx.stored.shape, device=ctx.stored.keys.device)


def calibrate(
    model: Any,
    rows: Iterable[Sequence[int] | Tensor],
    *,
    what: Sequence[str] = ("expected_attention_stats", "qfilter", "duo"),
    path: str | Path | None = None,
    sinks: int = 4,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Tensor]:
    """Let a model read texts and gather what some methods want to know of it.

    Args:
        model: a decoder-only transformers model.
        rows: texts as token ids, each a sequence or a tensor [n] or [1, n]; a hundred texts of a few hundred tokens do.
        what: "expected_attention_stats" (mean and covariance of queries that are not rotated, for
            `expected_attention_stats`), "qfilter" (the principal direction of rotated queries, for `qfilter`), "duo" (how far
            back heads look by their positions alone, for `duo_attention`), and one "lukv:METHOD", with options of the method
            behind it (how many keys each head should keep, for `lukv` around this method: see `attnkit.kv.utility`).
        path: a safetensors file to write, which the methods take as an option.
        sinks: first tokens of each text whose queries do not count ("duo" counts all).
        on_event: called before the first text and after each.
    Returns:
        what was written: tensors by name, see `tensors` of `attnkit.kv.calibration.Recorder` and
        `attnkit.kv.utility.UtilityCurves`.
    Raises:
        OptionError: an unknown name in `what`, or a method whose budgets cannot be learnt.
        InputError: no text, or one that is not longer than `sinks`, or of a single token.
    Source: Devoto et al. 2025, arXiv:2510.00636; Godey et al. 2025, arXiv:2503.02812; Xiao et al. 2024, arXiv:2410.10819,
    whose heads are trained: here they are measured with mean queries and keys; LU-KV 2026, arXiv:2602.08585.
    """
    readers = _readers(what, sinks)
    texts = [torch.as_tensor(row, dtype=torch.long).reshape(1, -1) for row in rows]
    if not texts:
        raise InputError("rows is empty; give token ids of at least one text")
    short = min(text.shape[1] for text in texts)
    if short <= max(sinks, 1):
        raise InputError(f"a text has {short} tokens; give texts of more than sinks={sinks}, and of two or more")
    text_model = compat.text_model(model)
    device = next(text_model.parameters()).device
    on_event(Event("plan", f"reads {len(texts)} texts", 0, len(texts)))
    nothing: Any = _Nothing(frozenset[str]().union(*(reader.needs for reader in readers)))
    with torch.no_grad(), apply(model, Policy(cache=Press(nothing, ratio=0.0))) as h:
        for place, ids in enumerate(texts):
            for reader in readers:
                cache, done = h.new_cache(), 0
                for count, listener in reader.passes(ids.shape[1]):
                    for layer in cache.kv_layers:
                        layer.listener = listener
                    text_model(input_ids=ids[:, done : done + count].to(device), past_key_values=cache)
                    done += count
            on_event(Event("step", f"{ids.shape[1]} tokens", place + 1, len(texts)))
    layers = int(text_model.config.num_hidden_layers)
    found = {name: tensor for reader in readers for name, tensor in reader.tensors(layers).items()}
    if path is not None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(path))
    return found


def _readers(what: Sequence[str], sinks: int) -> list[Recorder | UtilityCurves]:
    budgets = [name for name in what if name.startswith(STEM)]
    if len(budgets) > 1:
        raise OptionError(f"what={tuple(what)} is not allowed; a file holds the budgets of one method")
    others = [name for name in what if name not in budgets]
    readers: list[Recorder | UtilityCurves] = [UtilityCurves.of(name) for name in budgets]
    return readers if budgets and not others else [Recorder(others, sinks), *readers]
