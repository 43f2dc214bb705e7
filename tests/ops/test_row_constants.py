"""What the keys' backward pass wants to know of query rows, as the queries' backward pass leaves it."""

import math

import pytest
import torch
from torch import Tensor

from attnkit._core.triton import interpreted

triton = pytest.importorskip("triton")
from attnkit.ops._attention_core._triton import launch  # noqa: E402

pytestmark = pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs the interpreter or a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, HEADS, KEPT = 37, 2, 30  # of tokens, those that are in a sequence


def _case(stable: str, packed: bool) -> tuple[launch.Launch, dict[str, Tensor]]:
    """A call, and what its backward pass is given: an output that is not its own, so that who reads it shows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out, out, rest = (torch.randn(1, TOKENS, HEADS, 16, generator=generator).to(DEVICE) for _ in range(6))
    cu = torch.tensor([0, 12, KEPT], dtype=torch.int32, device=DEVICE) if packed else None
    p = launch.Launch(q, k, v, None, None, cu, cu, None, 0.25, -1, 0, 0.0, stable)
    lse = launch.forward(p, q.dtype)[1]
    d_lse = torch.randn(1, TOKENS, HEADS, generator=generator).to(DEVICE)
    return p, {"d_out": d_out, "d_lse": d_lse, "out": out, "lse": lse, "rest": rest}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", ["all", "no rest", "no gradient of the lse"])
def test_delta_is_that_of_the_output_and_of_what_rounding_took(given: str, packed: bool) -> None:
    p, known = _case("delta", packed)
    rest, d_lse = known["rest"], known["d_lse"]
    if given == "no rest":
        rest = known.pop("rest").zero_()
    elif given != "all":
        d_lse = known.pop("d_lse").zero_()
    _, lse2, delta = launch.backward_queries(p, **({"rest": None, "d_lse": None} | known))
    kept = KEPT if packed else TOKENS
    wanted = ((known["d_out"] * (known["out"] + rest)).sum(-1) - d_lse).transpose(1, 2)
    torch.testing.assert_close(delta[..., :kept], wanted[..., :kept])
    torch.testing.assert_close(lse2[..., :kept], (known["lse"] / math.log(2)).transpose(1, 2)[..., :kept])
    assert (lse2[..., kept:] == math.inf).all()


def test_an_exact_delta_comes_from_probabilities_and_not_from_the_output() -> None:
    p, known = _case("exact_delta", False)
    _, _, delta = launch.backward_queries(p, **known)
    scores = 0.25 * torch.einsum("bthd,bshd->bhts", p.q, p.k)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1)
    d_probabilities = torch.einsum("bthd,bshd->bhts", known["d_out"], p.v)
    wanted = (probabilities * d_probabilities).sum(-1) - known["d_lse"].transpose(1, 2)
    torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)
