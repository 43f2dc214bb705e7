"""What watching costs on a GPU: a sampled step beside one that is not, and where the difference goes."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from attnkit.lab.numerics import StabilityMonitor
from attnkit.training import new_model

pytestmark = pytest.mark.gpu
EVERY, CADENCE, SAMPLES = 4, 50, 10


class Count(TorchDispatchMode):
    """Operators that do work on the GPU, and copies from it, for each of which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.work = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            here = [t.device.type for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            there = [t.device.type for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.work += "cuda" in here + there
            self.copies += "cuda" in here and "cuda" not in there
        return out


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the host has waited for the GPU, as torch tells it."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    called = [w for w in caught if "called a synchronizing" in str(w.message)]
    found += [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in called]


def ms(action: Callable[[], object], count: int) -> float:
    """Median, with the GPU idle before and after."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def sampled(model: Any, step: Callable[[], None]) -> tuple[list[float], list[float], list[float]]:
    """Times of sampled steps with what follows them, of what follows alone, and of the steps between."""
    looked, judged, others = [], [], []
    with StabilityMonitor(model, every=EVERY) as monitor:
        for number in range((SAMPLES + 1) * EVERY):
            first = ms(step, 1)
            second = ms(monitor.step, 1)
            if number < EVERY:
                continue  # kernels of the first sample are compiled in it
            if number % EVERY:
                others.append(first + second)
            else:
                looked.append(first + second)
                judged.append(second)
    assert len({row["step"] for row in monitor.history}) == SAMPLES + 1
    return looked, judged, others


def counted(model: Any, step: Callable[[], None]) -> dict[str, Any]:
    """Operators and waits of a sampled step beyond those of the same step unwatched, and of what follows it."""
    found: dict[str, Any] = {}
    with torch.compiler.set_stance("force_eager"), Count() as plain:
        step()
    with StabilityMonitor(model, every=1) as monitor:
        step()
        monitor.step()
        with Count() as passes:
            step()
        with Count() as after:
            monitor.step()
        found["operators"] = {"in the passes": passes.work - plain.work, "after them": after.work}
        found["copies to the host"] = {"in the passes": passes.copies - plain.copies, "after them": after.copies}
        with waits() as inside:
            step()
        with waits() as behind:
            monitor.step()
    with torch.compiler.set_stance("force_eager"), waits() as usual:
        step()
    found["waits"] = {"of an unwatched step": usual, "of a sampled one": inside, "after it": behind}
    return found


@pytest.mark.parametrize(("compiled", "most"), [(False, 0.01), (True, 0.02)], ids=["plain", "compiled"])
def test_what_sampling_every_fiftieth_step_costs(compiled: bool, most: float, record_property: Any) -> None:
    """A compiled model runs uncompiled in a sampled step, which costs most of what is more."""
    torch.manual_seed(0)
    model = new_model(vocab_size=260, dim=512, layers=8, heads=8, positions=2048).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    ids = torch.randint(260, (16, 2048), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def uncompiled() -> None:
        with torch.compiler.set_stance("force_eager"):
            step()

    ms(step, 5)
    before, graphs = ms(step, 20), counters["stats"]["unique_graphs"]
    ms(uncompiled, 3)
    eager = ms(uncompiled, 20) if compiled else before
    looked, judged, others = sampled(model, step)
    whole, plain, behind = median(looked), median(others), median(judged)
    share = (whole - plain) / (CADENCE * plain)
    print(f"a step {plain:.1f} ms, a sampled one {whole:.1f} ms: {100 * share:.2f} % at every={CADENCE}")
    for name, value in {"a step, ms": plain, "a sampled one, ms": whole, "share at every=50": share}.items():
        record_property(name, round(value, 4))
    rest = whole - eager - behind
    print(f"  of {whole - plain:.1f} ms: {eager - plain:.1f} uncompiled, {rest:.1f} in the passes, {behind:.1f} after them")
    print(f"  a step never watched {before:.1f} ms; graphs compiled since: {counters['stats']['unique_graphs'] - graphs}")
    for name, where in counted(model, step).items():
        print(f"  {name}: {where}")
    assert counters["stats"]["unique_graphs"] == graphs, "a sampled step must compile nothing"
    assert share <= most
