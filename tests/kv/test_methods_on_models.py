"""Every method inside a model: what is dropped is what attention misses, and padding changes nothing."""

import pytest
import torch
from test_pressed_models import MORE, PROMPT, ids_of, masked, run

from attnkit import inference, kv
from attnkit._core.errors import PolicyError
from attnkit.testing import tiny_model

OPTIONS = {"lagkv": {"lag": 6}, "snapkv": {"window": 8}, "pyramidkv": {"window": 2, "beta": 3.0}}
CHANGING = {"think", "attention_matching"}  # what stays changes, so that a mask over dropped tokens is no oracle
# no knorm: the same token twice has the same norm in the first layer, and either may stay
DECODING = ("decode:tova", "decode:snapkv", "decode:expected_attention", "decode:keydiff", "cam:keydiff", "decode:capkv")
WRAPPED = ("rerotate:keydiff", "rerotate:leverage_score", "merge:snapkv", "chunkkv:expected_attention", "block:tova", "think")


def _policy(spec: str, ratio: float = 0.5) -> inference.Policy:
    options = dict(OPTIONS.get(spec.split(":")[-1], {}))
    if spec.split(":")[0] in ("decode", "cam"):
        options |= {"interval": 6, "target": 20}
        options |= {"buffer": 4} if spec.startswith("decode") else {"targets": 3}
    return inference.Policy(cache=kv.press(spec, ratio=ratio, **options))


@pytest.mark.parametrize("spec", [name for name in kv.methods(ready=True) if name not in CHANGING])
def test_what_a_method_drops_is_what_later_tokens_miss(spec: str) -> None:
    model = tiny_model("llama")
    ids, mask = ids_of()
    logits, _, held = run(model, _policy(spec), ids, mask, (PROMPT, *[1] * MORE), context=PROMPT)
    expected = masked(model, ids, mask, held)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spec", DECODING + WRAPPED)
def test_a_row_alone_goes_on_as_in_a_padded_batch(spec: str) -> None:
    model = tiny_model("llama")
    ids, mask = ids_of()
    pieces = (PROMPT, *[1] * MORE)
    together, cache, _ = run(model, _policy(spec), ids, mask, pieces, context=PROMPT)
    alone, *_ = run(model, _policy(spec), ids[1:, 7:], mask[1:, 7:], (PROMPT - 7, *[1] * MORE), context=PROMPT - 7)
    torch.testing.assert_close(together[1:, 7:], alone, rtol=1e-4, atol=1e-4)
    dense, full, _ = run(model, inference.Policy(), ids, mask, pieces)
    assert not torch.allclose(dense, together, atol=1e-4)
    if spec != "think":
        assert cache.nbytes() < full.nbytes()


@pytest.mark.parametrize("spec", ["non_causal_attention", "compactor", "observed_attention"])
def test_methods_that_need_every_query_refuse_a_prefill_in_pieces(spec: str) -> None:
    model = tiny_model("llama")
    ids, mask = ids_of()
    with pytest.raises(PolicyError, match="needs the whole context in one pass"):
        run(model, _policy(spec), ids, mask, (20, PROMPT - 20), context=PROMPT)


@pytest.mark.parametrize("spec", ["snapkv", "tova", "expected_attention", "capkv", "leverage_score"])
def test_a_prefill_in_pieces_keeps_what_one_pass_keeps(spec: str) -> None:
    model = tiny_model("llama")
    ids, mask = ids_of()
    whole = run(model, _policy(spec), ids, mask, (PROMPT, *[1] * MORE), context=PROMPT)[0]
    parts = run(model, _policy(spec), ids, mask, (17, 3, PROMPT - 20, *[1] * MORE), context=PROMPT)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
