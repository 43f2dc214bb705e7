"""What a probe found of one call of attention: on the device, and as a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import InputError

__all__ = ["NOT_FINITE", "Measured", "ProbeReport", "reports"]

NOT_FINITE = "holds NaN or infinities in the sampled rows; find out where they come from first"


@dataclass(frozen=True)
class ProbeReport:
    """One call, by query head: float64 tensors [H] on the CPU, means over the sampled rows unless said otherwise.

    Attributes:
        rows: how many were sampled.
        eps_bias: delta as the backward pass forms it, less delta in float64; None without the gradient of the output.
        delta_size: abs(delta) in float64, what `eps_bias` is to be compared with; None as above.
        shift_leak: sum of a row's score gradients, which is 0 in exact arithmetic, in terms of `delta_size`; None as above.
            It is -eps_bias / delta_size where the log-sum-exp is exact.
        o_bias: error of the stored output away from zero, in units in the last place: mean error over mean unit, since the
            units of elements that are small by cancellation would drown the others.
        tie_rate: share of the rows in which two keys or more have a probability that rounds to 1 (before the division).
        sink_mass: probability of the first key that a row sees.
        entropy: of the probabilities, nats.
        max_logit: largest scaled score of all rows.
        v_anisotropy: largest abs(mean) / standard deviation of a channel of the values, over the keys.
    """

    rows: int
    eps_bias: Tensor | None
    delta_size: Tensor | None
    shift_leak: Tensor | None
    o_bias: Tensor
    tie_rate: Tensor
    sink_mass: Tensor
    entropy: Tensor
    max_logit: Tensor
    v_anisotropy: Tensor

    def relative_eps(self) -> Tensor:
        """[H]: `eps_bias` in terms of `delta_size`; one number a call, whatever the scale of the loss.

        Raises:
            InputError: the gradient of the output was not known.
        """
        if self.eps_bias is None or self.delta_size is None:
            raise InputError("eps is not known without the gradient of the output; give d_out")
        return self.eps_bias / self.delta_size.clamp(min=1e-300)


@dataclass(frozen=True)
class Measured:
    """Reports of L calls that still lie on the device.

    Attributes:
        rows: how many were sampled of a call.
        found: name -> [L, H], in float64.
        largest: name -> [L], as in `Probed`, and of "d_out".
    """

    rows: int
    found: dict[str, Tensor] = field(repr=False)
    largest: dict[str, Tensor] = field(repr=False)

    def report(self) -> ProbeReport:
        """The report of one call; waits for the device.

        Raises:
            InputError: NaN or infinities in what the sampled rows see, or in their gradient.
        """
        ((report, faults),) = reports([self])
        for name in faults:
            raise InputError(f"{name} {NOT_FINITE}")
        return report


def reports(measured: Sequence[Measured]) -> list[tuple[ProbeReport, list[str]]]:
    """Each call's report, and the names of what was not finite; all of them for one wait for the device."""
    if not measured:
        return []
    parts = [
        torch.cat([torch.stack([*one.found.values()], 1).flatten(1), torch.stack([*one.largest.values()], 1).double()], 1)
        for one in measured
    ]
    home = parts[0].device
    numbers = torch.cat([part.flatten().to(home) for part in parts]).cpu().split([part.numel() for part in parts])
    result = []
    for one, part, flat in zip(measured, parts, numbers, strict=True):
        tables, sizes = flat.view(part.shape).split([part.shape[1] - len(one.largest), len(one.largest)], 1)
        columns = tables.unflatten(1, (len(one.found), -1)).unbind(1)
        heads = [column.unbind() for column in columns]
        for call, finite in enumerate(sizes.isfinite().tolist()):
            named: dict[str, Any] = dict.fromkeys(("eps_bias", "delta_size", "shift_leak"))
            named |= {name: column[call] for name, column in zip(one.found, heads, strict=True)}
            faults = [name for name, fine in zip(one.largest, finite, strict=True) if not fine]
            result.append((ProbeReport(one.rows, **named), faults))
    return result
