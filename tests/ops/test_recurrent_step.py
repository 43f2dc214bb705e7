"""What conformance does not say about steps: the kernel on views, no gradients, no changes in place."""

from typing import Any

import pytest
import torch
from torch.library import opcheck

from attnkit import errors, ops
from attnkit._core.triton import interpreted
from attnkit.ops import RecurrentState
from attnkit.ops._chunkwise_core.step import _run

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
KINDS: dict[str, dict[str, Any]] = {
    "exp": {},
    "sigmoid": {"input_gate": "sigmoid"},
    "plain": {"input_gate": "sigmoid", "normalize": False},
}


def _draw(kind: str, batch: int = 2, width: int = 20, width_v: int = 40) -> tuple[list[torch.Tensor], RecurrentState]:
    """Rows are views of a longer sequence, states one flat tensor, as layers and caches hold them."""
    shapes = ((4, width), (2, width), (2, width_v), (2,), (2,))
    inputs = [torch.randn(batch, 3, *shape)[:, 1] for shape in shapes]
    normalised, stabilised = kind != "plain", kind == "exp"
    flat = torch.randn(batch, 2 * (width * width_v + width * normalised + stabilised))
    return inputs, RecurrentState.unflatten(flat, 2, width, width_v, normalised=normalised, stabilised=stabilised)


@needs_interpreter
@pytest.mark.parametrize("one", [False, True], ids=["states", "one state for all"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_reads_views_and_changes_nothing(kind: str, one: bool) -> None:
    inputs, state = _draw(kind)
    if one:
        state = state.each(lambda part: part[:1])
    before = [part.clone() for part in state.tensors()]
    out, new = ops.mlstm_step(*inputs, state, **KINDS[kind], backend="triton")
    expected, wanted = ops.mlstm_step(*inputs, state, **KINDS[kind], backend="torch")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for found, part in zip(new.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


@needs_interpreter
def test_kernel_without_sequences_and_with_nan() -> None:
    inputs, state = _draw("exp", 0)
    out, new = ops.mlstm_step(*inputs, state, backend="triton")
    assert (out.shape, new.S.shape) == ((0, 4, 40), (0, 2, 20, 40))
    inputs, state = _draw("exp")
    inputs[4][1, 0] = torch.nan
    out, _ = ops.mlstm_step(*inputs, state, backend="triton")
    assert out.isnan().any((0, 2)).tolist() == [True, True, False, False]
    assert not out[0].isnan().any()


@needs_interpreter
def test_gradients_take_the_torch_form() -> None:
    inputs, state = _draw("exp")
    leaf = inputs[0].detach().requires_grad_()
    with pytest.raises(errors.BackendUnavailable, match="gradients"):
        ops.mlstm_step(leaf, *inputs[1:], state, backend="triton")
    with torch.no_grad():
        ops.mlstm_step(leaf, *inputs[1:], state, backend="triton")
    assert ops.mlstm_step(leaf, *inputs[1:], state)[0].requires_grad


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_well_formed(kind: str) -> None:
    (q, k, v, i, f), state = _draw(kind)
    gates = "exp" if kind == "exp" else "sigmoid"
    opcheck(_run, (q, k, v, i, f, *state, gates, 0.2, 1e-6), test_utils=("test_schema", "test_faketensor"))


def test_step_is_chosen_by_name() -> None:
    inputs, state = _draw("exp")
    explained = ops.explain("mlstm_step", *inputs, state)
    assert explained.chosen == "torch"
    with pytest.raises(errors.OptionError, match="no backend 'fast'"):
        ops.mlstm_step(*inputs, state, backend="fast")
