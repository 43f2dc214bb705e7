"""Small models that are trained while they are watched, and errors that are planted in them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.lab.numerics import BF16, Measured, Probed, ulp

VOCABULARY, LENGTH = 32, 32


def tiny(seed: int = 0, layers: int = 2) -> Any:
    from attnkit.training import new_model

    return new_model(vocab_size=VOCABULARY, dim=64, layers=layers, heads=4, positions=LENGTH, seed=seed)


def batches(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Sequences whose second half repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(VOCABULARY, (4, LENGTH), generator=generator)
        ids[:, LENGTH // 2 :] = ids[:, : LENGTH // 2]
        yield {"input_ids": ids, "labels": ids, "use_cache": False}


def run(model: Any, steps: int, after: Callable[[], None] = lambda: None, *, seed: int = 0) -> list[float]:
    """Train under bf16 autocast; `after` is called after every step. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch, _ in zip(batches(seed), range(steps), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after()
    return losses


def plant_drift(monkeypatch: pytest.MonkeyPatch, head: int, share: float) -> None:
    """From now on probes find eps = share * |delta| more than there is, in one head of every layer."""
    finish = Probed.finish

    def planted(self: Probed, d_out: Tensor | None = None) -> Measured:
        assert d_out is not None
        grad = d_out[self.sequences[:, None], self.rows].double()
        delta = (grad * self.true).sum(-1, keepdim=True)
        push = share * delta.abs() * grad / grad.square().sum(-1, keepdim=True).clamp(min=1e-300)
        self.used[:, :, head] += push[:, :, head]
        return finish(self, d_out)

    monkeypatch.setattr(Probed, "finish", planted)


def plant_faulty_store(layer: Any, head: int, model: Any, recorded: list[dict[str, Any]]) -> None:
    """Store every fourth element of a head's 16-bit output one unit too far along its gradient, batch after batch."""
    operator, signs, calls = layer.operator, [], 0

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = operator(q, k, v, **options)
        out.register_hook(lambda grad: signs.append(grad[:, :, head].sign()))
        return out

    layer.operator = recording
    for batch in recorded:
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
    model.zero_grad()

    def faulty(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        out: Tensor = operator(q, k, v, **options)
        sign, calls = signs[calls % len(recorded)], calls + 1
        if out.dtype != torch.bfloat16:
            return out
        push = torch.zeros_like(out)
        push[:, :, head, ::4] = (sign * ulp(out[:, :, head].detach().float(), BF16)).to(out.dtype)[..., ::4]
        return out + push

    layer.operator = faulty
