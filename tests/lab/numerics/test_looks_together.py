"""Layers that are looked at together, against each of them alone; what that launches, and what it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnkit.lab.numerics import BF16, FP16, FP32, FP64, RoundingBiasProbe, custom, round_to
from attnkit.lab.numerics import watch as watching
from attnkit.lab.numerics.drift import Drift, normal_score, score
from attnkit.lab.numerics.formats import E4M3, E5M2
from attnkit.lab.numerics.measured import ProbeReport
from attnkit.lab.numerics.probe import rounds_to_one
from attnkit.lab.numerics.watch import Watch
from attnkit.modules import MixerContext, SoftmaxAttention

CALLS = {
    "causal": {},
    "both directions": {"causal": False},
    "packed": {"cu_seqlens": torch.tensor([0, 9, 9, 24], dtype=torch.int32), "max_seqlen": 15},
    "padded": {"padding": torch.arange(24) >= torch.tensor([[0], [5], [9]])},
}


class Stack(nn.Module):
    """Layers one after the other, some with a window, some with delta kept twice as exactly."""

    def __init__(self, windows: tuple[int | None, ...], stable: str = "off") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                f"layer{i}": SoftmaxAttention(64, 4, num_kv_heads=2, window=window, rope=False, stable=stable)
                for i, window in enumerate(windows)
            }
        )

    def forward(self, x: Tensor, context: MixerContext, skip: int = -1) -> Tensor:
        for number, layer in enumerate(self.layers.values()):
            y = layer(x, context)
            x = x + (y.detach() if number == skip else y)
        return x


def look(model: Stack, x: Tensor, context: MixerContext, skip: int = -1) -> tuple[dict[str, ProbeReport], dict[str, Any]]:
    """What a watch finds, and each layer's call with the gradient of its output."""
    layers: Any = dict(model.layers.items())
    watch, calls = Watch(layers, RoundingBiasProbe(rows=10)), {}

    def recording(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            out = operator(q, k, v, **options)
            calls[name] = {"q": q, "k": k, "v": v, "out": out.detach(), **options}
            out.register_hook(lambda grad: calls[name].update(d_out=grad))
            return out

        return recorded

    for name, layer in layers.items():
        layer.operator = recording(name, layer.operator)
    watch.install()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, context, skip).square().sum().backward()
    watch.remove()
    watch.collect()
    assert not watch.lost
    return watch.found, calls


def assert_alone(found: dict[str, ProbeReport], calls: dict[str, Any]) -> None:
    for name, report in found.items():
        call = {key: value for key, value in calls[name].items() if key not in ("max_seqlen_q", "max_seqlen_k")}
        alone = RoundingBiasProbe(rows=10)(call.pop("q"), call.pop("k"), call.pop("v"), **call)
        assert report.rows == alone.rows
        for fact, value in vars(alone).items():
            torch.testing.assert_close(
                getattr(report, fact), value, rtol=1e-9, atol=1e-13, msg=lambda text, n=fact: f"{n}: {text}"
            )


@pytest.mark.parametrize("stable", ["off", "delta"])
@pytest.mark.parametrize("kind", CALLS)
def test_layers_together_are_what_each_is_alone(kind: str, stable: str) -> None:
    x = torch.randn(1 if kind == "packed" else 3, 24, 64)
    found, calls = look(Stack((None, 5, None, 5, 7), stable), x, MixerContext(**CALLS[kind]))
    assert len(found) == 5
    assert_alone(found, calls)


@pytest.mark.parametrize(("most", "groups"), [(1, [1] * 6), (4 * 4032, [4, 2]), (2**25, [5])])
def test_what_is_too_much_to_keep_is_looked_at_earlier(monkeypatch: pytest.MonkeyPatch, most: int, groups: list[int]) -> None:
    """A layer keeps 3,072 numbers of keys and values and has 960 scores; one without a gradient in the end is left out."""
    monkeypatch.setattr(watching, "_TOGETHER", most)
    sizes: list[int] = []
    look_at = watching.look_at
    monkeypatch.setattr(watching, "look_at", lambda sample: sizes.append(sample.calls) or look_at(sample))
    found, calls = look(Stack((None,) * 6), torch.randn(3, 24, 64), MixerContext(), skip=2)
    assert list(found) == [f"layer{i}" for i in (5, 4, 3, 1, 0)]
    assert_alone(found, calls)
    assert sizes == groups


class Count(TorchDispatchMode):
    """Operators that do work, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_further_layer_costs_few_operators() -> None:
    """Rows of q and out, of the gradient; keys and values: five copies, and its share of splitting the result."""

    def work(layers: int) -> int:
        model = Stack((None,) * layers)
        watch: Any = Watch(dict(model.layers.items()), RoundingBiasProbe(rows=10))  # type: ignore[arg-type]
        counts = []
        for watched in (False, True):
            with Count() as count:
                if watched:
                    watch.install()
                with torch.autocast("cpu", torch.bfloat16):
                    model(torch.zeros(3, 24, 64), MixerContext()).sum().backward()
                watch.remove()
                watch.collect()
            model.zero_grad()
            counts.append(count.work)
        return counts[1] - counts[0]

    few, many = work(2), work(12)
    assert (many - few) / 10 <= 6
    assert few < 160


@pytest.mark.parametrize("fmt", [BF16, FP16, FP32, FP64, E4M3, E5M2, custom(5), custom(12, 0), custom(4, -1)])
def test_what_rounds_to_one(fmt: Any) -> None:
    first = torch.tensor(rounds_to_one(fmt), dtype=torch.float64)
    below = torch.nextafter(first, torch.zeros_like(first))
    assert round_to(first, fmt) == 1
    assert round_to(below, fmt) < 1


def test_scores_of_many_are_those_of_each() -> None:
    torch.manual_seed(0)
    drifts, expected = [Drift(window=4) for _ in range(5)], []
    for number, drift in enumerate(drifts):
        samples = [torch.randn(3 if number else 2, dtype=torch.float64) for _ in range(2 + number)]
        for errors in samples:
            drift.add(errors)
        expected.append(normal_score(torch.stack(samples[-4:])))
    drifts[3].forget()
    score(drifts)
    for number in (0, 1, 2, 4):  # the last two have windows of one size
        torch.testing.assert_close(drifts[number].z(), expected[number], rtol=0, atol=1e-12)
    assert drifts[3].z().tolist() == [0, 0, 0]
    drifts[0].add(torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(drifts[0].z(), expected[0])
