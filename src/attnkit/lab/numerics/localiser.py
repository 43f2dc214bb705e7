"""Which layer and head an error comes from, and which single change removes it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnkit import report
from attnkit._core.checks import check_choice
from attnkit._core.devices import device_name
from attnkit._core.errors import InputError
from attnkit._core.events import Event
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.track import Track
from attnkit.lab.numerics.watch import Watch, attention_layers
from attnkit.modules import GroupedAttention, SoftmaxAttention

__all__ = ["SCHEMA", "changed", "localise"]

SCHEMA = "attnkit.localise/1"
_MIN_BATCHES, _FOUND_Z = 8, 4.5  # one test a head, not one a step: less is asked than of an alarm
_AS_IS = "as it is"
Operator = Callable[..., Any]


def localise(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    rows: int = 64,
    precision: str = "bf16",
    command: str = "attnkit.lab.numerics.localise(...)",
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Run recorded batches forward and backward, without a step, with one thing changed at a time; judge by eps.

    First the model as it is. Then all layers with stable="delta", "exact_delta", "dynamic_max", and with the output kept in
    float32; then each layer alone in float32.

    Args:
        model: returns `loss` from a batch's fields; its layers are `attnkit.modules.SoftmaxAttention`. Its weights stay as
            they are, its gradients are cleared.
        batches: different ones, eight at least; one sample each.
        rows: sampled rows of a call.
        precision: "bf16" runs the model under autocast, "fp32" as it is.
        command: to record.
        on_event: told the progress.
    Returns:
        the envelope of attnkit.localise/1: a row for each change, layer and head, with the mean of eps in terms of abs(delta),
        its z and what else the probe says; `found`, the layer and head with the largest abs(z) if that is above 4.5, with the
        changes that bring its z below and its mean to a third; or None.
    Raises:
        InputError: too few batches, or NaN.
        OptionError: an unknown precision.
        UnsupportedError: no layer to look at.
    Source: the ablations of Qiu & Yao 2025 (arXiv:2510.04212).
    Complexity: (5 + layers) passes over the batches.
    """
    check_choice("precision", precision, ("bf16", "fp32"))
    if len(batches) < _MIN_BATCHES:
        raise InputError(f"{len(batches)} batch(es) do not tell a bias from chance; give at least {_MIN_BATCHES}")
    layers, started = attention_layers(model), time.monotonic()
    changes = {_AS_IS: {}, **_everywhere(layers), **{f"float32 in {name}": {name: _in_float32} for name in layers}}
    device = next(model.parameters()).device
    on_event(Event("plan", "", 0, len(changes)))
    found: list[dict[str, Any]] = []
    for done, (change, parts) in enumerate(changes.items(), 1):
        with ExitStack() as stable:
            for name, part in parts.items():
                if isinstance(part, str):
                    stable.callback(setattr, layers[name], "stable", layers[name].stable)
                    layers[name].stable = part
            operators = {name: part for name, part in parts.items() if not isinstance(part, str)}
            tracks = _samples(model, layers, batches, operators, RoundingBiasProbe(rows), precision)
            found += [{"change": change, **row} for name in layers for row in tracks[name].rows(layers[name].stable)]
        on_event(Event("step", change, done, len(changes)))
    return report.envelope(
        SCHEMA, found, command=command, seed=None, device=device_name(device), dtype=precision,
        wall_s=time.monotonic() - started, extra={"found": _culprit(found), "batches": len(batches), "sampled_rows": rows},
    )  # fmt: skip


@contextmanager
def changed(layers: Mapping[str, GroupedAttention], changes: Mapping[str, Callable[[Operator], Operator]]) -> Iterator[None]:
    """Layers with something around their operators.

    Args:
        layers: name -> layer.
        changes: name -> (operator -> the one in its place).
    """
    with ExitStack() as undo:
        for name, change in changes.items():
            undo.callback(setattr, layers[name], "operator", layers[name].operator)
            layers[name].operator = change(layers[name].operator)
        yield


def _everywhere(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modes: dict[str, Any] = {f"stable={mode}": mode for mode in ("delta", "exact_delta", "dynamic_max")}
    return {change: dict.fromkeys(layers, part) for change, part in (modes | {"float32 output": _float32_output}).items()}


def _samples(
    model: nn.Module,
    layers: dict[str, SoftmaxAttention],
    batches: Sequence[Mapping[str, Any]],
    operators: Mapping[str, Callable[[Operator], Operator]],
    probe: RoundingBiasProbe,
    precision: str,
) -> dict[str, Track]:
    """One sample of every layer from every batch."""
    device = next(model.parameters()).device
    watch, tracks = Watch(layers, probe), {name: Track(name) for name in layers}
    for number, batch in enumerate(batches):
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        watch.install()
        try:
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
            with changed(layers, operators), autocast:
                model(**moved).loss.backward()
        finally:
            watch.remove()
            model.zero_grad(set_to_none=True)
        watch.collect()
        for name, reason in watch.lost.items():
            raise InputError(f"{name}, batch {number}: {reason}")
        for name, found in watch.found.items():
            tracks[name].add(number, found, {})
    return tracks


def _in_float32(operator: Operator) -> Operator:
    def wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):  # which would cast back what it finds in float32
            return operator(q.float(), k.float(), v.float(), **options).to(q.dtype)

    return wide


def _float32_output(operator: Operator) -> Operator:
    def wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return operator(q, k, v, out_dtype=torch.promote_types(q.dtype, torch.float32), **options).to(q.dtype)

    return wide


def _culprit(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    before = [row for row in rows if row["change"] == _AS_IS]
    worst = max(before, key=lambda row: abs(row["z"]), default=None)
    if worst is None or abs(worst["z"]) < _FOUND_Z:
        return None
    same = [row for row in rows if (row["layer"], row["head"]) == (worst["layer"], worst["head"])]
    mended = [
        row["change"]
        for row in same
        if abs(row["z"]) < _FOUND_Z and abs(row["eps_mean"]) <= abs(worst["eps_mean"]) / 3
    ]  # fmt: skip
    return {**{name: worst[name] for name in ("layer", "head", "eps_mean", "z")}, "mended_by": mended}
