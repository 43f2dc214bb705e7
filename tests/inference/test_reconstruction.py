"""Errors of hidden states against passes that are written out."""

import pytest
import torch

from attnkit import inference, kv
from attnkit._core.errors import InputError
from attnkit.testing import tiny_model

IDS = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))


def test_nothing_dropped_is_no_error() -> None:
    found = kv.reconstruction_error(tiny_model("llama"), kv.press("knorm", ratio=0), IDS)
    assert torch.equal(found, torch.zeros(2))


def test_it_is_the_distance_of_the_outputs_of_each_layer() -> None:
    model, press = tiny_model("llama"), kv.press("knorm", ratio=0.6)
    found = kv.reconstruction_error(model, press, IDS, tail=4)
    states: list[list[torch.Tensor]] = []
    for policy in (inference.Policy(), inference.Policy(cache=press)):
        seen: list[torch.Tensor] = []
        parts = (model.model.layers[0], model.model.norm)
        hooks = [part.register_forward_hook(lambda *a, seen=seen: seen.append(a[-1])) for part in parts]
        with torch.no_grad(), inference.apply(model, policy) as h:
            cache = h.new_cache()
            model(IDS[:, :36], past_key_values=cache)
            seen.clear()
            model(IDS[:, 36:], past_key_values=cache)
        states.append([value[0] if isinstance(value, tuple) else value for value in seen])
        for hook in hooks:
            hook.remove()
    for got, h, changed in zip(found, *states, strict=True):
        assert got > 0.001
        torch.testing.assert_close(got, ((h - changed).norm(dim=-1) / h.norm(dim=-1)).mean())


def test_what_keeps_more_errs_less() -> None:
    model = tiny_model("llama")
    errors = [kv.reconstruction_error(model, kv.press("tova", ratio=ratio), IDS).mean() for ratio in (0.1, 0.9)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("tail", [0, 40])
def test_both_parts_need_tokens(tail: int) -> None:
    with pytest.raises(InputError, match=f"tail={tail} is not possible with 40 tokens"):
        inference.reconstruction_error(tiny_model("llama"), kv.press("knorm"), IDS, tail=tail)
