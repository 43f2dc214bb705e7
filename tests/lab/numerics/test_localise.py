"""Finding a planted fault by changing one thing at a time, and the rule that a masked tile must not move a maximum."""

import json
import time
from importlib import resources
from typing import Any

import jsonschema
import pytest
import torch
from watched_models import batches, plant_faulty_store, tiny

from attnkit import ops, report
from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit._core.events import Event
from attnkit.lab.numerics import BF16, SitePolicy, emulated_attention, golden_attention, localise
from attnkit.lab.numerics.localiser import changed
from attnkit.modules import SoftmaxAttention
from attnkit.ops import attention


def recorded(count: int) -> list[dict[str, Any]]:
    return [batch for batch, _ in zip(batches(), range(count), strict=False)]


def test_a_planted_fault_is_found_and_what_removes_it(tmp_path: Any) -> None:
    model, read, events = tiny(layers=4), recorded(12), list[Event]()
    plant_faulty_store(model.model.layers[2].mixer, 1, model, read)
    operators = [layer.mixer.operator for layer in model.model.layers]
    started = time.perf_counter()
    document = localise(model, read, on_event=events.append)
    assert time.perf_counter() - started < 60
    found = document["found"]
    assert (found["layer"], found["head"]) == ("model.layers.2.mixer", 1)
    assert found["eps_mean"] > 0
    assert {"float32 output", "float32 in model.layers.2.mixer"} <= set(found["mended_by"])
    assert not {"stable=delta", "stable=dynamic_max", "float32 in model.layers.1.mixer"} & set(found["mended_by"])
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.localise-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    assert [event.done for event in events] == list(range(10))
    assert [layer.mixer.operator for layer in model.model.layers] == operators
    assert {layer.mixer.stable for layer in model.model.layers} == {"off"}
    assert all(weight.grad is None for weight in model.parameters())
    report.write_html(tmp_path / "page.html", [document])
    assert "model.layers.2.mixer, head 1: eps leans one way" in (tmp_path / "page.html").read_text()


def test_a_sound_model_is_not_accused(tmp_path: Any) -> None:
    model = tiny()
    document = localise(model, recorded(8), rows=16)
    assert document["found"] is None
    assert {row["change"] for row in document["rows"] if row["z"] == 0} == {"stable=exact_delta"}
    assert all(layer.mixer.operator is attention for layer in model.model.layers)
    report.write_html(tmp_path / "page.html", [document])
    assert "No head leans one way" in (tmp_path / "page.html").read_text()


def test_refusals() -> None:
    with pytest.raises(InputError, match="7 batch"):
        localise(tiny(), recorded(7))
    with pytest.raises(OptionError, match="precision='fp8'"):
        localise(tiny(), recorded(8), precision="fp8")
    with pytest.raises(UnsupportedError, match="no attnkit"):
        localise(torch.nn.Linear(2, 2), recorded(8))


@pytest.mark.parametrize("top", [-120.0, -0.5, 0.0, 30.0])
def test_tiles_that_a_row_does_not_see_move_no_maximum(top: float) -> None:
    """Rows whose scores are all `top`, tied, and whose later tiles lie wholly above the diagonal.

    Masked scores that count as ties would lift the maximum of these rows to 0 and lose exp(-120) of their precision.
    """
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 64, 2, 16), torch.zeros(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    q[..., 0], k[..., 0] = 4.0, top
    golden = golden_attention(q, k, v, causal=True)
    exact = SitePolicy("exact")
    out = emulated_attention(
        q, k, v, policy=exact, algorithm="fa2", causal=True, block_q=64, block_k=8, stable="dynamic_max", beta=7.0
    )
    torch.testing.assert_close(out, golden, rtol=1e-13, atol=1e-14)
    rounded = emulated_attention(
        q, k, v, policy=SitePolicy.preset("autocast_ref", BF16), algorithm="fa2", causal=True, block_q=64, block_k=8,
        stable="dynamic_max",
    )  # fmt: skip
    torch.testing.assert_close(rounded, golden, rtol=0.05, atol=0.05)
    kernel: Any = ops.attention(q, k, v, causal=True, stable="dynamic_max", backend="triton")
    torch.testing.assert_close(kernel.double(), golden, rtol=1e-5, atol=1e-6)


def test_operators_are_changed_for_a_while() -> None:
    layer = SoftmaxAttention(32, 2, rope=False)
    before = layer.operator
    with pytest.raises(ZeroDivisionError), changed({"a": layer}, {"a": lambda operator: lambda *args, **options: 1 / 0}):
        layer(torch.randn(1, 3, 32))
    assert layer.operator is before
