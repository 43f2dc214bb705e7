"""Small trainings whose attention has chosen roundings, watched while they run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.errors import InputError, UnsupportedError
from attnkit.lab.numerics.drift import normal_score
from attnkit.lab.numerics.emulate import Stable, emulated_attention
from attnkit.lab.numerics.formats import BF16, custom, round_to
from attnkit.lab.numerics.localiser import changed
from attnkit.lab.numerics.measured import ProbeReport
from attnkit.lab.numerics.policy import Preset, SitePolicy
from attnkit.lab.numerics.probe import RoundingBiasProbe
from attnkit.lab.numerics.spectral import SpectralNorms
from attnkit.lab.numerics.watch import Watch, attention_layers

__all__ = ["Arm", "Training", "majority_batches", "text_batches", "train"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arm:
    """What attention does in one training.

    Attributes:
        name: in results.
        policy: a preset of `SitePolicy` in bf16, emulated in float64; None runs the model's own operator under bf16 autocast.
        bits: significant bits of the running output and of what is added to it, the dose.
        stable: as of `emulated_attention`, or of `attnkit.ops.attention` where nothing is emulated.
        beta: of the dynamic maximum.
        offset: what is subtracted from the scores beside their maximum.
    """

    name: str
    policy: Preset | None = "autocast_ref"
    bits: int = 8
    stable: Stable = "off"
    beta: float | None = None
    offset: float = 0.0

    def operator(self) -> Callable[..., Any]:
        """Attention with the arm's roundings, before the output is stored in bf16.

        With "off" and "dynamic_max" the emulator stores, as its backward pass reads what is stored. With "delta" it reads both
        halves of the output, that is the output before it is stored, whatever the running output has lost until then.
        """
        assert self.policy is not None
        dose = custom(self.bits, BF16.emin, BF16.emax)
        overrides = {"O_acc": dose, "PV": dose} if self.policy == "autocast_ref" else {}
        sites = SitePolicy.preset(self.policy, BF16, overrides | ({"O_out": None} if self.stable == "delta" else {}))
        stable: Stable = "off" if self.stable == "delta" else self.stable
        offset = self.offset

        def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if options["window_size"] or options.get("key_bias") is not None or "cu_seqlens_q" in options:
                raise UnsupportedError("emulated attention is dense or causal; train without windows, padding and packing")
            return emulated_attention(
                *(round_to(t.double(), BF16, grad_format=BF16) for t in (q, k, v)),
                policy=sites, algorithm="fa2", causal=options["causal"], stable=stable, beta=self.beta,
                shift=(lambda top, ties: top + offset) if offset else None,
            )  # fmt: skip

        return attention


def _stored(operator: Callable[..., Any]) -> Callable[..., Any]:
    """What the rest of the model sees of an emulated output, and what comes back."""

    def stored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return round_to(operator(q, k, v, **options), BF16, grad_format=BF16).to(q.dtype)

    return stored


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, betas 0.9 and 0.95, clipping at norm 1, a linear warm-up over a tenth of the steps.

    Attributes:
        steps: of the optimizer.
        learning_rate: after the warm-up.
        samples: steps that are looked at, evenly spread, as far as there are so many.
        rows: sampled rows of a call.
    """

    steps: int
    learning_rate: float
    samples: int = 50
    rows: int = 64


def train(model: Any, batches: Iterator[Batch], arm: Arm, training: Training) -> list[dict[str, Any]]:
    """Train in place, and look at some of the steps.

    Args:
        model: returns `logits` from `input_ids`; its layers are `attnkit.modules.SoftmaxAttention`.
        batches: token ids and targets, [B, T] each, on the model's device.
        arm: what attention does.
        training: how long and how fast.
    Returns:
        a row a layer, of the head that leans most: "layer", "head"; "z" of its eps in terms of |delta|; means over samples
        and heads of "eps_size", the size of these, "tie_rate", "v_anisotropy" and "o_bias"; "loss", of the last sample; and
        "series", lists with a number a sample: "step", "loss", "eps_total" (summed so far), "norm_q", "norm_k".
    Raises:
        UnsupportedError: no layer to look at, or a model that emulation cannot serve.
    """
    layers = attention_layers(model)
    emulated = arm.policy is not None
    for layer in layers.values():
        layer.stable = "off" if emulated and arm.stable != "exact_delta" else arm.stable
        if emulated:
            layer.operator = arm.operator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    watch, norms = Watch(layers, RoundingBiasProbe(training.rows, BF16)), SpectralNorms()
    series = {name: _Series() for name in layers}
    device = next(model.parameters()).device
    for step in range(training.steps):
        sampled = step % max(1, training.steps // training.samples) == 0
        ids, targets = next(batches)
        with ExitStack() as undo:
            if sampled:
                undo.callback(watch.remove)
                watch.install()
            undo.enter_context(changed(layers, dict.fromkeys(layers, _stored) if emulated else {}))
            with torch.autocast(device.type, torch.bfloat16, enabled=not emulated):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if sampled:
            watch.collect()
            for name, found in watch.found.items():
                weights = {f"{name}.{side}": getattr(layers[name], f"{side}_proj").weight for side in "qk"}
                series[name].add(step, loss.item(), found, list(norms.measure(weights).values()))
    return [{"layer": name, **one.row()} for name, one in series.items()]


class _Series:
    """What was seen of one layer."""

    def __init__(self) -> None:
        self._reports: list[ProbeReport] = []
        self._lines: list[tuple[int, float, float, float]] = []

    def add(self, step: int, loss: float, found: ProbeReport, norms: list[float]) -> None:
        self._reports.append(found)
        self._lines.append((step, loss, norms[0], norms[1]))

    def row(self) -> dict[str, Any]:
        leans = torch.stack([found.relative_eps() for found in self._reports])
        z = normal_score(leans)
        head = int(z.abs().argmax())
        means = {
            name: float(torch.stack([getattr(found, name) for found in self._reports]).mean())
            for name in ("tie_rate", "v_anisotropy", "o_bias")
        }
        steps, losses, q, k = zip(*self._lines, strict=True)
        numbers = {"loss": losses, "eps_total": leans[:, head].cumsum(0).tolist(), "norm_q": q, "norm_k": k}
        series = {"step": list(steps), **{name: [_short(value) for value in values] for name, values in numbers.items()}}
        facts = {"head": head, "z": float(z[head]), "eps_size": float(leans.abs().mean()), "loss": losses[-1]}
        return {**facts, **means, "series": series}


def _short(value: float) -> float:
    """Five digits: a result file is to be read, and there are many."""
    return float(f"{value:.5g}")


def text_batches(text: bytes, seed: int, *, batch: int, length: int, device: torch.device) -> Iterator[Batch]:
    """Pieces of a text as bytes, drawn at random, with the next byte as the target.

    Args:
        text: longer than a piece.
        seed: of the places.
        batch, length: B and T.
        device: of the batches.
    Raises:
        InputError: the text is too short.
    """
    if len(text) <= length:
        raise InputError(f"the text has {len(text)} bytes; pieces of {length} need a longer one")
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(whole) - length, (batch, 1), generator=generator)
        pieces = whole[starts + torch.arange(length + 1)].long().to(device)
        yield pieces[:, :-1], pieces[:, 1:]


def majority_batches(seed: int, *, batch: int, length: int, alphabet: int) -> Iterator[Batch]:
    """Tokens of which one is half, and the most frequent token so far as the target: equal keys, so equal scores.

    Args:
        seed: of the tokens.
        batch, length: B and T.
        alphabet: how many tokens there are.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        favourite = torch.randint(alphabet, (batch, 1), generator=generator)
        others = torch.randint(alphabet, (batch, length), generator=generator)
        ids = torch.where(torch.rand(batch, length, generator=generator) < 0.5, favourite, others)
        yield ids, F.one_hot(ids, alphabet).cumsum(1).argmax(-1)
