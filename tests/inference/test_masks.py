import pytest
import torch
from oracles import prompt
from transformers import masking_utils as theirs

from attnkit._core.errors import ShapeError, UnsupportedError
from attnkit.inference import apply
from attnkit.inference.masks import Form, recognise
from attnkit.testing import tiny_model

REFUSED = "packed sequences .* bidirectional image blocks, chunked attention and custom or/and masks are not supported"


def ask(mask_function, *, batch=2, queries=range(40), keys=range(40), window=8):
    return recognise(mask_function, batch=batch, queries=queries, keys=keys, window=window, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("mask_function", "form"),
    [
        (theirs.causal_mask_function, Form(causal=True)),
        (theirs.bidirectional_mask_function, Form(causal=False)),
        (theirs.sliding_window_causal_mask_function(8), Form(causal=True, window=8)),
    ],
)
def test_known_forms(mask_function, form):
    assert ask(mask_function) == {form}
    assert form in ask(mask_function, queries=range(39, 40))
    assert form in ask(mask_function, queries=range(30, 40), keys=range(20, 40))
    assert form in ask(mask_function, queries=range(3), keys=range(3))


def test_short_inputs_fit_several_forms():
    assert ask(theirs.causal_mask_function, queries=range(5), keys=range(5)) == {Form(causal=True), Form(causal=True, window=8)}
    assert ask(theirs.causal_mask_function, queries=range(5, 6), keys=range(6)) == {
        Form(causal=True), Form(causal=False), Form(causal=True, window=8),
    }  # fmt: skip


def blocks(start, stop, batch=2, length=40):
    ids = torch.full((batch, length), -1)
    ids[-1, start:stop] = 0
    return theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(ids))


def packed(boundary, batch=2, length=40):
    ids = torch.zeros(batch, length, dtype=torch.long)
    ids[-1, boundary:] = 1
    return theirs.and_masks(theirs.causal_mask_function, theirs.packed_sequence_mask_function(ids))


@pytest.mark.parametrize(
    "mask_function",
    [
        packed(1), packed(20), packed(39), blocks(11, 13), blocks(0, 40), blocks(38, 40),
        theirs.chunked_causal_mask_function(20, torch.zeros(2, dtype=torch.long)),
        theirs.sliding_window_causal_mask_function(9),
        theirs.sliding_window_bidirectional_mask_function(8),
        theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k != 0),
    ],
)  # fmt: skip
def test_anything_else_is_refused(mask_function):
    with pytest.raises(UnsupportedError, match=f"neither causal nor bidirectional nor its sliding window; {REFUSED}"):
        ask(mask_function)


def test_masks_that_need_scalars_are_refused():
    def scalar_only(batch, head, query, key):
        return key <= query if int(query) >= 0 else key > query

    with pytest.raises(UnsupportedError, match="cannot be evaluated by index"):
        ask(scalar_only)


def test_images_that_are_not_there_are_no_obstacle():
    without_images = blocks(0, 0)
    assert ask(without_images) == {Form(causal=True)}
    local = theirs.and_masks(without_images, theirs.sliding_window_overlay(8))
    assert ask(local) == {Form(causal=True, window=8)}


def test_packed_sequences_are_refused_in_a_model():
    model, ids = tiny_model("llama"), prompt(1, 6)
    with (
        torch.no_grad(),
        apply(model, "dense"),
        pytest.raises(UnsupportedError, match=r"packed sequences \(position_ids that restart\)"),
    ):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_flash_style_packing_is_refused(name):
    model, ids = tiny_model("llama"), prompt(1, 6)
    with (
        torch.no_grad(),
        apply(model, "dense"),
        pytest.raises(UnsupportedError, match=f"{name}: .* do not support packed sequences"),
    ):
        model(ids, use_cache=False, **{name: torch.tensor([0, 3, 6])})


def test_bidirectional_gemma3_is_refused():
    model = tiny_model("gemma3", use_bidirectional_attention=True)
    with torch.no_grad(), apply(model, "dense"), pytest.raises(UnsupportedError, match="neither causal"):
        model(prompt(1, 20), use_cache=False)


def test_prepared_masks_are_refused():
    model, ids = tiny_model("llama"), prompt(1, 6)
    with (
        torch.no_grad(),
        apply(model, "dense"),
        pytest.raises(UnsupportedError, match=r"attention_mask has 4 dimensions; .* no prepared ones"),
    ):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))


def test_a_mask_of_another_length_is_refused():
    model, ids = tiny_model("llama"), prompt(1, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with torch.no_grad(), apply(model, "dense") as h:
        cache = h.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ShapeError, match="attention_mask covers 6 tokens; the cache and the new tokens make 12"):
            model(ids, attention_mask=mask, past_key_values=cache)


def test_a_layer_that_contradicts_the_mask_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    with (
        torch.no_grad(),
        apply(model, "dense"),
        pytest.raises(UnsupportedError, match=r"masks this pass as causal, .* asks for bidirectional"),
    ):
        model(prompt(1, 6))


def test_what_a_failed_pass_left_is_forgotten():
    model, ids = tiny_model("gemma3"), prompt(1, 20)
    with torch.no_grad(), apply(model, "dense"):
        expected = model(ids).logits
        with pytest.raises(UnsupportedError):
            model(ids, attention_mask=torch.zeros(1, 1, 20, 20))
        assert torch.equal(model(ids).logits, expected)
