"""System 2: what the gates of an mLSTM do to the size of a signal, before and after the norm of each head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit import ops
from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import heat, table
from attnkit.lab.claims.place import Place

__all__ = ["CLAIM", "transfer_behaviour"]

_FORMS = {"exp": True, "sigmoid": False}  # input gate -> whether it is normalised
_APART = 0.05  # gains after the norm
_FLOOR = 1e-6  # of gains whose logarithm is drawn


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        gates: both gates before exp and sigmoid.
        length: tokens.
        head_dim, head_dim_v: of queries and keys, of values.
        draws: heads with inputs of their own.
        norm_eps: of the norm.
        seeds: of the inputs.
    """

    gates: tuple[float, ...] = (-12.0, -10.0, -8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
    length: int = 128
    head_dim: int = 64
    head_dim_v: int = 64
    draws: int = 16
    norm_eps: float = 1e-6
    seeds: tuple[int, ...] = (0, 1, 2)


def transfer_behaviour(
    q: Tensor, k: Tensor, v: Tensor, gates: Sequence[float], *, input_gate: str, normalize: bool, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """How large an mLSTM's last output is beside its values, where its gates are the same at all tokens.

    Args:
        q, k, v: [N, T, D], [N, T, D] and [N, T, Dv]; N heads.
        gates: values of either gate before exp and sigmoid.
        input_gate, normalize: as of `attnkit.ops.mlstm`.
        norm_eps: of the LayerNorm of each head.
    Returns:
        the gain before and after the norm, [forget gates, input gates] each: the root mean square of the last output over that
        of all values, median over heads.
    Raises:
        ShapeError, DTypeError, OptionError: see `attnkit.ops.mlstm`.
    Source: Beck et al. 2025 (arXiv:2503.14376), "transfer behavior".
    """
    i = torch.tensor(gates, dtype=torch.float64, device=q.device).expand(*q.shape[:2], -1)
    size = v.square().mean().sqrt()
    q, k, v = (t[:, :, None].expand(-1, -1, len(gates), -1) for t in (q, k, v))  # a head for each input gate
    before, after = [], []
    for f in gates:
        out, _ = ops.mlstm(q, k, v, i, torch.full_like(i, f), input_gate=input_gate, normalize=normalize)
        last = out[:, -1]
        before.append(_size(last) / size)
        after.append(_size(F.layer_norm(last, last.shape[-1:], eps=norm_eps)) / size)
    return torch.stack(before), torch.stack(after)


def _size(h: Tensor) -> Tensor:
    """[N, G, Dv] -> [G]."""
    return h.square().mean(-1).sqrt().quantile(0.5, 0)


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"seed {seed}, {gate}", 1, partial(_measure, settings, seed, gate)) for seed in settings.seeds for gate in _FORMS
    ]


def _measure(settings: Settings, seed: int, gate: str, place: Place) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    widths = (settings.head_dim, settings.head_dim, settings.head_dim_v)
    q, k, v = (
        torch.randn(settings.draws, settings.length, width, generator=draw, dtype=torch.float64).to(place.device)
        for width in widths
    )
    found = transfer_behaviour(q, k, v, settings.gates, input_gate=gate, normalize=_FORMS[gate], norm_eps=settings.norm_eps)
    before, after = ([[float(f"{gain:.6g}") for gain in row] for row in gains.tolist()] for gains in found)
    return [{"gate": gate, "seed": seed, "before": before, "after": after}]


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    labels = [f"{gate:g}" for gate in settings.gates]
    gains: dict[tuple[str, str], Tensor] = {}
    figures = []
    for where in ("before", "after"):
        for gate in _FORMS:
            chosen = [row[where] for row in rows if row["gate"] == gate]
            if not chosen:
                continue
            gains[gate, where] = gain = torch.tensor(chosen, dtype=torch.float64).mean(0)
            shown, quantity, bounds = (
                (gain.clamp_min(_FLOOR).log10(), "log10 of the gain", (math.log10(_FLOOR), 2.0))
                if where == "before"
                else (gain, "gain", (0.0, 1.1))
            )
            figures.append(
                heat(
                    f"Gain {where} the norm, {gate} input gate", "input gate", "forget gate", shown.tolist(),
                    quantity=quantity, columns=labels, rows=labels, bounds=bounds,
                )
            )  # fmt: skip
    if len(gains) < 2 * len(_FORMS):
        return Conclusion(Verdict("undecided", "One of the gates is missing."), figures)
    apart = (gains["exp", "after"] - gains["sigmoid", "after"]).abs()
    ratio = (gains["sigmoid", "before"] / gains["exp", "before"]).log().abs().exp()
    numbers = {
        "largest difference after the norm": float(apart.max()),
        "share of points within the bound": float((apart <= _APART).double().mean()),
        "largest ratio before the norm": float(ratio.max()),
    }
    cells = [
        [gate, where, *(float(gain.min()), float(gain.max())), float((gain > 0.5).double().mean())]
        for (gate, where), gain in gains.items()
    ]
    headers = ["input gate", "norm", "least gain", "largest gain", "above 0.5"]
    note = "Over the grid of gates, mean of the seeds; share of its points where the gain is above 0.5."
    return Conclusion(_judge(numbers), figures, [table("Gains", headers, cells, note)])


def _judge(numbers: dict[str, float]) -> Verdict:
    apart, share, ratio = numbers.values()
    reason = (
        f"After the norm the gains of the two gates are at most {apart:.4f} apart; before it one is up to {ratio:.1f} times "
        f"the other."
    )
    outcome = "holds" if share == 1 else "holds in part" if share >= 0.9 else "does not hold"
    return Verdict(outcome, reason, numbers)  # type: ignore[arg-type]


CLAIM = Claim(
    name="mlstm-transfer",
    systems=(2,),
    says="behind the norm of its heads the mLSTM passes signals on alike with exponential and with sigmoid input gates",
    source="Beck et al. 2025 (arXiv:2503.14376)",
    protocol=(
        "Normal queries, keys and values, 128 tokens, gates that are the same at all tokens, in float64; the last output's "
        "size over that of values, over a grid of both gates; exponential gates with the normaliser, sigmoid ones without. "
        f"It holds if gains after the norm are at most {_APART} apart everywhere on the grid; in part at nine of ten points."
    ),
    minutes=0.1,
    device="cpu",
    settings=Settings,
    quick={"gates": (-6.0, 0.0, 6.0), "length": 16, "head_dim": 8, "head_dim_v": 8, "draws": 4, "seeds": (0,)},
    cells=_cells,
    conclude=_conclude,
)
