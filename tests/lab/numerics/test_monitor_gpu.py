"""What watching costs on a GPU: a sampled step beside one that is not."""

import time
from statistics import median

import pytest
import torch

from attnkit.lab.numerics import StabilityMonitor
from attnkit.training import new_model

pytestmark = pytest.mark.gpu
EVERY, CADENCE = 4, 50


@pytest.mark.parametrize(("compiled", "most"), [(False, 0.01), (True, 0.02)], ids=["plain", "compiled"])
def test_what_sampling_every_fiftieth_step_costs(compiled: bool, most: float) -> None:
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

    for _ in range(5):
        step()
    times = []
    with StabilityMonitor(model, every=EVERY) as monitor:
        for _ in range(10 * EVERY):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            monitor.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    looked = {row["step"] for row in monitor.history}
    assert len(looked) == 10
    times, first = times[EVERY:], EVERY  # kernels of the first sample are compiled in it
    sampled = [t for i, t in enumerate(times, first) if i in looked]
    plain = median(t for i, t in enumerate(times, first) if i not in looked)
    share = (median(sampled) - plain) / (CADENCE * plain)
    print(f"a step {1e3 * plain:.1f} ms, a sampled one {1e3 * median(sampled):.1f} ms: {100 * share:.2f} % at every={CADENCE}")
    assert share <= most
